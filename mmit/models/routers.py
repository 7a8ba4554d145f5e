"""The auxiliary loss of a mixture of experts, record by record: how evenly its tokens are spread over the experts.

In: a causal LM, and the row it runs. Out: one loss for each record, that of transformers' own function for the record
alone (Switch Transformer, arXiv:2101.03961, equations 4 to 6), so that it does not depend on what shares a row. Which
modules decide is what the model's class says it records as `router_logits`. Refuses a model whose class has no such
loss: DeepSeek-V3 and its like balance by a bias that no gradient reaches.

Dimensions: T tokens in the row, S targets, R records, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from mmit.errors import ModelError
from mmit.models.padded import is_flat

LOSS = "load_balancing_loss_func"


@dataclass(frozen=True, slots=True)
class Routers:
    """What the auxiliary loss of one model needs."""

    gates: tuple[tuple[nn.Module, int], ...]  # in the order of the layers, and which of its outputs are the logits
    loss: Callable[..., Any]
    experts: int
    chosen: int  # experts per token
    factor: float

    @contextmanager
    def watched(self) -> Iterator[list[torch.Tensor]]:
        """Inside, the list grows by the (T, E) logits of every layer."""
        seen: list[torch.Tensor] = []

        def keep(_: Any, given: Any, made: Any, *, index: int) -> None:
            logits = made[index] if isinstance(made, (tuple, list)) else made
            seen.append(logits.flatten(0, -2))

        hooks = [gate.register_forward_hook(partial(keep, index=index)) for gate, index in self.gates]
        try:
            yield seen
        finally:
            for registered in hooks:
                registered.remove()

    def losses(
        self, seen: list[torch.Tensor], *, nodes: torch.Tensor, at: torch.Tensor, records: torch.Tensor, padded: bool
    ) -> torch.Tensor:
        """The loss of each target's record, times the factor.

        Args:
            seen: from `watched`.
            nodes: (K, 3) of the row, see `attention_plan.make_plan`. at: (S,) where each target is predicted.
            records: (S,) the record of each target. padded: the row ran as a padded batch.

        Returns:
            (S,) float32
        """
        # Shared tokens count for every record that has them: alone, each would run them.
        paths, owners = record_paths(nodes, at, records)
        if padded and is_flat(nodes):
            paths = [_in_batch(path, nodes) for path in paths]
        found = []
        for path in paths:
            mine = tuple(logits.index_select(0, path.to(logits.device)) for logits in seen)
            # transformers' own function, on one record: over a row it would average over records, and a record's loss
            # would hang on its neighbours.
            found.append(self.loss(mine, self.experts, self.chosen).float())
        return self.factor * torch.stack(found)[owners.to(found[0].device)]


def record_paths(
    nodes: torch.Tensor, at: torch.Tensor, records: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Row positions of every record's tokens, and which of these paths each target belongs to.

    A record ends where its last target is predicted: later tokens are not run.

    Returns:
        R tensors of positions, (S,) numbers of paths
    """
    table: list[list[int]] = nodes.tolist()
    above: list[list[int]] = []
    for _, _, parent in table:
        start, length, _ = table[parent]
        above.append([] if parent < 0 else above[parent] + list(range(start, start + length)))
    owner = {start + i: n for n, (start, length, _) in enumerate(table) for i in range(length)}
    ends: dict[int, list[int]] = {}
    for record, position in zip(records.tolist(), at.tolist(), strict=True):
        node = owner[position]
        path = above[node] + list(range(table[node][0], position + 1))
        if len(path) > len(ends.get(record, ())):
            ends[record] = path
    number = {record: n for n, record in enumerate(ends)}
    owners = torch.tensor([number[record] for record in records.tolist()], dtype=torch.int64)
    return [torch.tensor(path) for path in ends.values()], owners


def _in_batch(path: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """Row positions of one record as places of a padded batch laid flat."""
    row = int(torch.searchsorted(nodes[:, 0].contiguous(), path[0], right=True)) - 1
    return path - nodes[row, 0] + row * nodes[:, 1].max()


def gates_of(llm: Any) -> tuple[tuple[nn.Module, int], ...]:
    """Modules whose outputs the model's class records as router logits, and the place of the logits in them."""
    inner: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    found: dict[int, tuple[nn.Module, int]] = {}
    recorders = [
        recorder
        for module in inner.modules()
        for recorder in _listed((getattr(module, "_can_record_outputs", None) or {}).get("router_logits"))
    ]
    for recorder in recorders:
        kind, name = getattr(recorder, "target_class", recorder), getattr(recorder, "layer_name", None)
        for path, module in inner.named_modules():
            here = name is None or f".{name}." in f".{path}."
            if here and isinstance(kind, type) and issubclass(type(module), kind):
                found[id(module)] = (module, int(getattr(recorder, "index", 0)))
    return tuple(found.values())


def _listed(recorders: Any) -> list[Any]:
    return [] if recorders is None else list(recorders) if isinstance(recorders, (list, tuple)) else [recorders]


def has_loss(llm: Any) -> bool:
    """Whether the model has routers, and its class an auxiliary loss for them."""
    inner: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    return hasattr(sys.modules.get(type(inner).__module__), LOSS) and bool(gates_of(inner))


def read_routers(llm: Any, factor: float) -> Routers:
    """Find what the auxiliary loss needs.

    Raises:
        ModelError: the model has no experts, or its class no such loss.
    """
    inner: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    loss = getattr(sys.modules.get(type(inner).__module__), LOSS, None)
    gates = gates_of(inner)
    if loss is None or not gates:
        problem = f"transformers has no auxiliary loss for routers of {type(inner).__name__}"
        raise ModelError(problem, where="train.router_loss", remedy="set train.router_loss=null")
    config = inner.config.get_text_config()
    experts = getattr(inner, "num_experts", None) or getattr(config, "num_local_experts", None) or config.num_experts
    chosen = getattr(inner, "num_experts_per_tok", None) or config.num_experts_per_tok
    return Routers(gates, loss, int(experts), int(chosen), factor)
