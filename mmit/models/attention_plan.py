"""Which tokens of a packed row compute with which, as index tensors: made once for a row, used by every layer.

Owns the plan on the CPU, whose parts are made when they are first asked for, and its form on the device of a layer.
Nodes of like size make a bucket, computed as a batch; for a variable-length kernel the row is segments (`varlen.py`).
Takes a row's nodes; knows neither queries nor keys. A plan may be made in one process and used in another.

Dimensions: T tokens in the row, K nodes, G nodes in a bucket, Lq / Lk their longest query / key length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from mmit.models.sending import send
from mmit.models.varlen import Segments, make_segments

if TYPE_CHECKING:
    from mmit.models.buckets import BucketLayout
    from mmit.models.visibility import Visibility

LONE = 128  # tokens; a longer node without ancestors is a bucket of its own, without a mask
Nodes: TypeAlias = list[list[int]]  # first token, length, parent (or -1) of each node; parents before children
Paths: TypeAlias = list["np.ndarray[Any, np.dtype[np.int64]]"]  # row positions that a node's tokens see before it


@dataclass(slots=True)
class Bucket:
    """Nodes of similar size, computed in one call."""

    queries: torch.Tensor  # (G * Lq,) row positions, padded with 0
    keys: torch.Tensor  # (G * Lk,) row positions: ancestors first, then the node itself, padded with 0
    keep: torch.Tensor  # positions inside (G * Lq,) that are not padding
    before: torch.Tensor  # (G,) keys of each node's ancestors; stays on the CPU
    size: tuple[int, int, int]  # G, Lq, Lk
    masked: bool  # False: plain causal, without a mask

    def to(self, device: torch.device) -> Bucket:
        """Copy the index tensors to a device."""
        queries, keys, keep = (send(tensor, device) for tensor in (self.queries, self.keys, self.keep))
        return Bucket(queries, keys, keep, self.before, self.size, self.masked)

    def causal(self, device: torch.device) -> torch.Tensor:
        """(G, 1, Lq, Lk) True = visible: query i of a node sees its b ancestors and its own first i + 1 tokens."""
        _, queries, keys = self.size
        # Keys 0 .. b + i in every node of the bucket, so that one comparison makes the mask of all.
        limit = send(self.before, device)[:, None] + torch.arange(queries, device=device)[None, :]
        return (torch.arange(keys, device=device)[None, None, :] <= limit[:, :, None])[:, None]


class RowPlan:
    """The plan of a row, on the CPU.

    Its tensors travel between processes as one array for each number format: torch would take shared memory, of which
    containers have 64 MB, and an open file for every one of them. Masks are not among them: they are larger than all
    the rest, and one comparison makes them where they are used.
    """

    def __init__(self, nodes: Nodes, known: int = 0) -> None:
        """Plan a row.

        Args:
            nodes: they follow each other, parents before children.
            known: tokens of the first nodes whose keys are there already: no queries; those of the others count from 0.
        """
        self.nodes, self.known = nodes, known

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The row for attention that is written out or fused for batches."""
        return make_buckets(self.nodes, self.known)

    @cached_property
    def segments(self) -> Segments | None:
        """The row for a variable-length kernel; None where not all of its keys are new."""
        return None if self.known else make_segments(self.nodes, ancestors(self.nodes))

    @cached_property
    def longest(self) -> int:
        """Tokens on the longest path."""
        return max(before + node[1] for before, node in zip(_counts(self.nodes), self.nodes, strict=True))

    @property
    def nbytes(self) -> int:
        """Of its tensors that are made, each once."""
        found: dict[int, torch.Tensor] = {}
        _replaced([*self.__dict__.values()], torch.Tensor, lambda tensor: found.setdefault(id(tensor), tensor))
        return sum(tensor.nbytes for tensor in found.values())

    def __getstate__(self) -> dict[str, Any]:
        tensors: list[torch.Tensor] = []
        numbers: dict[int, int] = {}  # by id: a tensor that is there twice travels once

        def taken_out(tensor: torch.Tensor) -> _Number:
            number = numbers.setdefault(id(tensor), len(tensors))
            if number == len(tensors):
                tensors.append(tensor)
            return _Number(number)

        facts = {key: _replaced(value, torch.Tensor, taken_out) for key, value in self.__dict__.items()}
        same: dict[str, list[torch.Tensor]] = {}
        for tensor in tensors:
            same.setdefault(str(tensor.dtype), []).append(tensor)
        return {
            "facts": facts,
            "kinds": [str(tensor.dtype) for tensor in tensors],
            "sizes": {kind: [len(tensor) for tensor in those] for kind, those in same.items()},
            "joined": {kind: torch.cat(those).numpy() for kind, those in same.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = {k: iter(torch.from_numpy(array).split(state["sizes"][k])) for k, array in state["joined"].items()}
        tensors = [next(parts[kind]) for kind in state["kinds"]]
        for key, value in state["facts"].items():
            self.__dict__[key] = _replaced(value, _Number, lambda number: tensors[number.place])


class _Number(NamedTuple):
    """In the place of a tensor that travels apart."""

    place: int


def _replaced(value: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """The value with all of a kind replaced in it and in the lists and dataclasses that it holds."""
    if isinstance(value, kind):
        return replace(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_replaced(getattr(value, part.name), kind, replace) for part in fields(value)))
    if isinstance(value, list):
        return [_replaced(part, kind, replace) for part in value]
    return value


@dataclass
class AttentionPlan:
    """The plan of a row on one device, and what layers have made of it there."""

    row: RowPlan
    device: torch.device = torch.device("cpu")
    layouts: dict[tuple[int, int], BucketLayout] = field(default_factory=dict)  # by H and KV, made when first needed
    masks: dict[tuple[int, Visibility | None], torch.Tensor] = field(default_factory=dict)  # by bucket and pattern

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The plan for a device; layouts and masks are made anew there."""
        return AttentionPlan(self.row, torch.device(device))

    @property
    def longest(self) -> int:
        """Tokens on the longest path."""
        return self.row.longest

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Copied when they are asked for: a variable-length kernel never reads them."""
        return [bucket.to(self.device) for bucket in self.row.buckets]

    @cached_property
    def segments(self) -> Segments | None:
        """As `RowPlan.segments`."""
        return None if self.row.segments is None else self.row.segments.to(self.device)

    def mask(self, number: int, pattern: Visibility | None = None) -> torch.Tensor | None:
        """Mask (G, 1, Lq, Lk) of a bucket under a layer's pattern, made once; None for plain causal."""
        bucket = self.buckets[number]
        if pattern is None and not bucket.masked:
            return None
        if (number, pattern) not in self.masks:
            if pattern is None:
                mask = bucket.causal(self.device)
            else:
                mask = pattern.mask(send(bucket.before, self.device), bucket.size[1], bucket.size[2])
                # A query that pads a node may lie where the window holds no key: the softmax of nothing is NaN, and
                # times its gradient of zero that is NaN in every key. It sees all of them instead; its output is never
                # read.
                mask = mask | ~mask.any(-1, keepdim=True)
            self.masks[number, pattern] = mask
        return self.masks[number, pattern]


def make_plan(nodes: torch.Tensor, known: int = 0) -> AttentionPlan:
    """Plan a row on the CPU: (K, 3) first token, length, parent node (or -1); see `RowPlan`."""
    return AttentionPlan(RowPlan(nodes.tolist(), known))


def ancestors(nodes: Nodes) -> Paths:
    """Row positions of the ancestors of each node, from the root on."""
    paths: Paths = []
    for _, _, parent in nodes:
        if parent < 0:
            paths.append(np.zeros(0, dtype=np.int64))
        else:
            start, length, _ = nodes[parent]
            paths.append(np.concatenate([paths[parent], np.arange(start, start + length)]))
    return paths


def _counts(nodes: Nodes) -> list[int]:
    """How many tokens the ancestors of each node have."""
    counts: list[int] = []
    for _, _, parent in nodes:
        counts.append(0 if parent < 0 else counts[parent] + nodes[parent][1])
    return counts


def make_buckets(nodes: Nodes, known: int) -> list[Bucket]:
    """Sort the nodes of a row into buckets; see `RowPlan` for the arguments."""
    paths, counts = ancestors(nodes), _counts(nodes)
    new = [n for n in range(len(nodes)) if nodes[n][0] >= known]
    # Sorted, so that nodes that may share a bucket are neighbours and one pass finds all buckets.
    by_size = sorted(new, key=lambda n: (nodes[n][1], counts[n]))
    groups: list[list[int]] = []
    for n in by_size:
        # Against the first of the bucket, its smallest node: against the last, sizes could creep up, and padding with
        # them.
        if groups and _alike(nodes, counts, groups[-1][0], n):
            groups[-1].append(n)
        else:
            groups.append([n])
    return [_bucket(nodes, paths, group, known) for group in groups]


def _alike(nodes: Nodes, counts: list[int], a: int, b: int) -> bool:
    """Padding two nodes to one size wastes little. Long nodes without ancestors run alone, without a mask."""
    if nodes[b][1] > LONE and not counts[b]:
        return False
    queries, keys = nodes[b][1] / nodes[a][1], (counts[b] + 16) / (counts[a] + 16)
    return (nodes[b][1] <= 8 or queries <= 1.5) and 0.5 <= keys <= 2.0


def _bucket(nodes: Nodes, paths: Paths, group: list[int], known: int) -> Bucket:
    before = [len(paths[n]) for n in group]
    longest_q = max(nodes[n][1] for n in group)
    longest_k = max(nodes[n][1] + count for n, count in zip(group, before, strict=True))
    queries = np.zeros((len(group), longest_q), dtype=np.int64)
    keys = np.zeros((len(group), longest_k), dtype=np.int64)
    keep = []
    for g, (n, count) in enumerate(zip(group, before, strict=True)):
        start, length, _ = nodes[n]
        own = np.arange(start, start + length)
        queries[g, :length] = own - known
        keep.append(np.arange(g * longest_q, g * longest_q + length))
        # Ancestors first, then the node: what a query sees is then the first keys of its line, see `Bucket.causal`.
        keys[g, :count] = paths[n]
        keys[g, count : count + length] = own
    return Bucket(
        queries=torch.from_numpy(queries.reshape(-1)),
        keys=torch.from_numpy(keys.reshape(-1)),
        keep=torch.from_numpy(np.concatenate(keep)),
        before=torch.tensor(before),
        size=(len(group), longest_q, longest_k),
        masked=len(group) > 1 or before[0] > 0 or longest_q <= LONE,
    )
