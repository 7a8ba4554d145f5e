"""The row that is being run, for modules that transformers gives no argument for it.

Owns the facts of a row that a layer may need (its plan of attention, the path of every record through it) and where
they are kept while a model runs: per thread, set around a forward and set again when activation checkpointing runs a
layer a second time. Knows no model.

Dimensions: T tokens in the row, K nodes, G paths run together, L the longest of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

ATTENTION, MIXER = "attention", "mixer"
SLACK = 16  # tokens of padding that two paths may always have between them


@dataclass
class RowState:
    """A row of several nodes.

    `nodes` lists first token, length and parent (or -1) of each; parents come first. `plan` is that of
    `attention_plan.make_plan`. `calls` has an entry for each layer that kept the row's records apart: its kind.
    """

    nodes: list[list[int]]
    plan: Any
    device: torch.device
    calls: list[str] = field(default_factory=list)
    _elsewhere: dict[torch.device, RowState] = field(default_factory=dict)

    def on(self, device: torch.device) -> RowState:
        """The same row for a layer on another device: a device map spreads an LLM over several."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            # `calls` is the same list on every device: whether any layer kept records apart is asked of the row as a
            # whole.
            self._elsewhere[device] = replace(self, plan=self.plan.to(device), device=device)
        return self._elsewhere[device]

    @cached_property
    def paths(self) -> list[list[int]]:
        """Row positions from the root to the end of each node that has no children."""
        # Contract: a node without children ends a record. A record that ends where another goes on has a node of its
        # own there.
        inner = {parent for _, _, parent in self.nodes}
        above: list[list[int]] = []
        for start, length, parent in self.nodes:
            above.append(([] if parent < 0 else above[parent]) + list(range(start, start + length)))
        return [path for n, path in enumerate(above) if n not in inner]

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """(G, L) row positions of paths of like length, padded on the right with the row's first token."""
        groups: list[list[list[int]]] = []
        for path in sorted(self.paths, key=len):
            # Sorted by length, so a path of a batch is at most half longer than its shortest, and SLACK.
            if groups and len(path) <= 1.5 * len(groups[-1][0]) + SLACK:
                groups[-1].append(path)
            else:
                groups.append([path])
        # On the right: states and convolutions run from left to right, so what follows a record cannot reach it.
        padded = [[path + [0] * (len(group[-1]) - len(path)) for path in group] for group in groups]
        return [torch.tensor(rows).to(self.device) for rows in padded]

    @cached_property
    def places(self) -> torch.Tensor:
        """(T,) where each token of the row is found in all batches laid flat, one after the other."""
        found: dict[int, int] = {}
        before = 0
        by_length = iter(sorted(self.paths, key=len))
        for batch in self.batches:
            count, width = batch.shape
            for row in range(count):
                for column, token in enumerate(next(by_length)):
                    # A token on several paths is computed on each, and alike: the first is taken.
                    found.setdefault(token, before + row * width + column)
            before += count * width
        return torch.tensor([found[token] for token in range(len(found))]).to(self.device)

    @cached_property
    def path_lengths(self) -> torch.Tensor:
        """(2, T) length of the shortest and of the longest path each token is on."""
        low: dict[int, int] = {}
        high: dict[int, int] = {}
        for path in self.paths:
            for token in path:
                low[token] = min(low.get(token, len(path)), len(path))
                high[token] = max(high.get(token, 0), len(path))
        count = len(low)
        return torch.tensor([[low[t] for t in range(count)], [high[t] for t in range(count)]]).to(self.device)


_local = threading.local()


def current_row() -> RowState | None:
    """The row that this thread runs; None for an ordinary sequence or batch."""
    return getattr(_local, "row", None)


@contextmanager
def running(row: RowState | None) -> Iterator[None]:
    """Inside, `current_row` is `row`."""
    before = current_row()
    _local.row = row
    try:
        yield
    finally:
        _local.row = before


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch's checkpointing: the backward pass runs a layer again with the row of its forward."""
    return nullcontext(), running(current_row())
