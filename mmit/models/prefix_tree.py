"""Attention of a row whose nodes share beginnings, without a copy of a shared key.

Every node attends causally to itself, in one call of a variable-length kernel. Nodes lie depth first, so all that goes
on from an inner node is one block of queries behind it, and reads the node's keys whole: one more call for each depth
of the tree. Partial results are merged by their log-sums. A flash backward computes the gradient of a part from the
merged result and log-sum, as ring attention does (arXiv:2310.01889), so what is kept is linear in tokens: queries,
keys, values, result, and a log-sum for each query and head. Refuses nothing: `make_levels` is None where nodes lie
otherwise. Known limit: nobody has run it on a GPU.

Dimensions: T tokens in the row, H query heads, KV key heads, D head size, B parts of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from mmit.models.sending import send

# Calls of their own cost more than they save while no more than this share of the row's keys would be copied. So what
# is kept exceeds a copy of each key by at most this.
FEW = 0.05


@dataclass(frozen=True, slots=True)
class Call:
    """Where the parts of a call of the kernel begin and end."""

    cu_queries: torch.Tensor  # (B + 1,) int32
    cu_keys: torch.Tensor  # (B + 1,) int32
    longest_query: int
    longest_key: int
    causal: bool

    def to(self, device: torch.device | str) -> Call:
        """Copy to a device."""
        queries = send(self.cu_queries, device)
        keys = queries if self.cu_keys is self.cu_queries else send(self.cu_keys, device)
        return Call(queries, keys, self.longest_query, self.longest_key, self.causal)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a table: from `start` to `end`, or those of `rows` where they are not one piece."""

    start: int
    end: int
    rows: torch.Tensor | None

    def pick(self, table: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (rows, ...); a view of one piece."""
        return table[self.start : self.end] if self.rows is None else table.index_select(0, self.rows)

    def put(self, table: torch.Tensor, values: torch.Tensor) -> None:
        """Replace the rows; no row is named twice, so nothing hangs on the order of writes."""
        if self.rows is None:
            table[self.start : self.end] = values
        else:
            table.index_copy_(0, self.rows, values)

    def to(self, device: torch.device | str) -> Block:
        """Copy to a device."""
        return Block(self.start, self.end, None if self.rows is None else send(self.rows, device))


@dataclass(frozen=True, slots=True)
class Level:
    """The inner nodes of one depth, and what goes on from them."""

    queries: Block
    keys: Block
    call: Call

    def to(self, device: torch.device | str) -> Level:
        """Copy to a device."""
        return Level(self.queries.to(device), self.keys.to(device), self.call.to(device))


class Tree(NamedTuple):
    """The calls of a row: every node on itself, and for each depth what goes on from its inner nodes."""

    own: Call
    levels: list[Level]


class Parts(NamedTuple):
    """A kernel that computes a call: forward and backward."""

    forward: Forward
    backward: Backward


class Forward(Protocol):
    """(queries, H, D), (keys, KV, D), (keys, KV, D) -> result (queries, H, D) and log-sums (H, queries)."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the parts of a call."""


class Backward(Protocol):
    """Gradients of queries, keys and values from that of the result; `known` are the result and its log-sums."""

    def __call__(
        self,
        grad: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        known: tuple[torch.Tensor, torch.Tensor],
        call: Call,
        scale: float,
        /,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the gradients of a call."""


def make_levels(table: list[list[int]]) -> list[Level] | None:
    """The levels of a row's tree.

    Args:
        table: first token, length, parent (or -1) of each node, which follow each other in the row.

    Returns:
        None where nodes do not lie depth first, so that what goes on from a node is no single block.
    """
    depths: list[int] = []
    # Where the last token below a node ends; grows as descendants are met.
    ends = [start + length for start, length, _ in table]
    path: list[int] = []  # from a root to the node before
    for n, (start, length, parent) in enumerate(table):
        # Depth first means that a node's parent is the node before it or one of that one's ancestors. Whoever is not
        # there any more when the path is empty was laid elsewhere, and has no block.
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            return None
        depths.append(len(path))
        for above in path:
            ends[above] = start + length
        path.append(n)
    levels = []
    for depth in range(max(depths)):
        # A leaf has nothing below it, and takes part in the call of each node on itself alone.
        inner = [n for n, d in enumerate(depths) if d == depth and ends[n] > table[n][0] + table[n][1]]
        below = [(table[n][0] + table[n][1], ends[n]) for n in inner]
        own = [(table[n][0], table[n][0] + table[n][1]) for n in inner]
        call = Call(_bounds(below), _bounds(own), _longest(below), _longest(own), causal=False)
        levels.append(Level(_block(below), _block(own), call))
    return levels


def _bounds(pieces: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([0, *(end - start for start, end in pieces)]).cumsum(0).to(torch.int32)


def _longest(pieces: list[tuple[int, int]]) -> int:
    return max(end - start for start, end in pieces)


def _block(pieces: list[tuple[int, int]]) -> Block:
    if len(pieces) == 1:
        return Block(*pieces[0], None)
    return Block(0, 0, torch.cat([torch.arange(start, end) for start, end in pieces]))


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float, /
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = _repeats(q, k)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out, sums, _ = torch.ops.torch_attn._varlen_attn(q, k, v, *_arguments(call), call.causal, scale, _window(call))
    return out, sums


def _flash_backward(
    grad: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    known: tuple[torch.Tensor, torch.Tensor],
    call: Call,
    scale: float,
    /,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = states
    kv, groups = k.shape[1], _repeats(q, k)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    # Of the generator, which only dropout reads.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    backward = torch.ops.torch_attn._varlen_attn_backward
    dq, dk, dv = backward(grad, q, k, v, *known, *_arguments(call), call.causal, state, scale, _window(call))
    if groups > 1:
        dk, dv = (x.unflatten(1, (kv, groups)).sum(2, dtype=torch.float32) for x in (dk, dv))
    return dq, dk, dv


def _repeats(q: torch.Tensor, k: torch.Tensor) -> int:
    """How often key heads must be repeated, for the call alone: torch 2.11 takes as many as there are query heads."""
    arguments = torch.ops.torch_attn._varlen_attn.default._schema.arguments
    return 1 if any(a.name == "enable_gqa" for a in arguments) else q.shape[1] // k.shape[1]


def _arguments(call: Call) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return call.cu_queries, call.cu_keys, call.longest_query, call.longest_key


def _window(call: Call) -> list[int]:
    # A window as wide as the longest key hides nothing. Without one, torch would take cuDNN's kernel for long parts,
    # and give its backward log-sums that are laid out as flash kernels lay them.
    return [-1, 0] if call.causal else [call.longest_key, call.longest_key]


FLASH = Parts(_flash_forward, _flash_backward)


class TreeAttention(torch.autograd.Function):
    """Attention of one row: (T, H, D), (T, KV, D), (T, KV, D) -> (T, H, D); every part adds up in float32."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float, parts: Parts
    ) -> torch.Tensor:
        """Every node on itself, then what goes on from it on its keys.

        Args:
            ctx: autograd's.
            q: (T, H, D) queries. k, v: (T, KV, D) keys and values.
            tree: the calls of the row, level by level.
            scale: factor on the scores.
            parts: the kernels, forward and backward.

        Returns:
            (T, H, D) in the dtype of the kernel.
        """
        first, sums = parts.forward(q, k, v, tree.own, scale)
        sums = sums.T.contiguous()  # (T, H)
        out = first.to(sums.dtype)
        for level in tree.levels:
            # With a and b the log-sums of two sets of keys, the softmax over both is the two results weighed by
            # exp(a - log(e^a + e^b)) and exp(b - log(e^a + e^b)): exact, whatever the order of the levels.
            keys, values = level.keys.pick(k), level.keys.pick(v)
            more, added = parts.forward(level.queries.pick(q), keys, values, level.call, scale)
            # Log-sums in the kernel's float32; merged there too, since exp of a difference in bf16 would lose what a
            # small part adds.
            before, added = level.queries.pick(sums), added.T
            total = torch.logaddexp(before, added)
            merged = level.queries.pick(out) * (before - total).exp()[..., None]
            level.queries.put(out, merged + more * (added - total).exp()[..., None])
            level.queries.put(sums, total)
        out = out.to(first.dtype)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.tree, ctx.scale, ctx.parts = tree, scale, parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """(T, H, D) -> (T, H, D), 2 x (T, KV, D): the same parts, each with the merged result and log-sums.

        With the log-sum over all keys a part's weights come out as they are in the whole softmax, so the gradients of
        the parts add up to that of the whole without a correction.
        """
        q, k, v, out, sums = ctx.saved_tensors
        # The kernels read it as rows of H * D numbers without gaps.
        grad = grad.contiguous()
        found = ctx.parts.backward(grad, (q, k, v), (out, sums.T.contiguous()), ctx.tree.own, ctx.scale)
        # Sums of all parts in float32, rounded once at the end: an ancestor's key gets a part from every level below
        # it.
        totals = [x.to(sums.dtype) for x in found]
        for level in ctx.tree.levels:
            blocks = (level.queries, level.keys, level.keys)
            states = tuple(block.pick(x) for block, x in zip(blocks, (q, k, v), strict=True))
            known = (level.queries.pick(out), level.queries.pick(sums).T.contiguous())
            more = ctx.parts.backward(level.queries.pick(grad), states, known, level.call, ctx.scale)
            for block, total, part in zip(blocks, totals, more, strict=True):
                block.put(total, block.pick(total) + part)
        return (*(total.to(x.dtype) for total, x in zip(totals, (q, k, v), strict=True)), None, None, None)
