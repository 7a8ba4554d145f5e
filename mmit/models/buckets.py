"""The passes around and inside attention over buckets of nodes, as few as they can be.

Owns how a bucket's queries and keys are picked out of a row in the very layout that its matrix products read, how its
output goes back, and attention written out for few keys. In: tensors and the index plan of `attention.py`. Nothing
here knows which tokens may see each other: that is in the plan.

Dimensions: T tokens in the row, H query heads, KV key heads, D head size; a bucket has G nodes of Lq queries and Lk
keys. A table is a row's states as (T * heads, D), token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch._ops import ops


class Indexed(Protocol):
    """What is read of a bucket, see `attention.Bucket`."""

    queries: torch.Tensor
    keys: torch.Tensor
    keep: torch.Tensor
    size: tuple[int, int, int]


@dataclass(slots=True)
class BucketLayout:
    """A plan for given numbers of heads; made once, used by every layer."""

    queries: list[torch.Tensor]  # per bucket (G * H * Lq,) places in the table of queries; padded with 0
    keys: list[torch.Tensor]  # per bucket (G * KV * Lk,) places in the tables of keys and values; padded with 0
    slots: list[torch.Tensor]  # as `queries`, padded with T * H, a row of zeros
    inverse: torch.Tensor  # (T * H,) where each row of the table of outputs sits in the buckets' outputs
    masks: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)  # additive; by bucket and what it hides


def make_layout(buckets: Sequence[Indexed], tokens: int, *, heads: int, kv: int) -> BucketLayout:
    """Spread a plan of (T,) row positions over heads.

    Args:
        buckets: the plan: of each bucket the positions of its queries (G, Lq) and keys (G, Lk).
        tokens: T, tokens of the row.
        heads, kv: query heads H and key heads KV.

    Returns:
        positions in the tables (T * H, D) of queries and (T * KV, D) of keys, and the way back to rows.
    """
    device = buckets[0].queries.device
    head, kv_head = torch.arange(heads, device=device), torch.arange(kv, device=device)
    inverse = torch.empty(tokens, heads, dtype=torch.int64, device=device)
    layout = BucketLayout([], [], [], inverse.view(-1))
    before = 0
    for b in buckets:
        g, lq, lk = b.size
        layout.queries.append((b.queries.view(g, 1, lq) * heads + head[:, None]).view(-1))
        layout.keys.append((b.keys.view(g, 1, lk) * kv + kv_head[:, None]).view(-1))
        node, place = b.keep // lq, b.keep % lq
        # Inside a bucket's output: node by node, in it head by head, in it query by query.
        rows = (node * heads * lq + place)[:, None] + head * lq
        tokens_of = b.queries.index_select(0, b.keep)
        inverse.index_copy_(0, tokens_of, rows + before)
        # Padding points to a row of zeros behind the table, so that the gradient of what nobody reads is 0 and not some
        # other token's.
        slots = torch.full((g * heads * lq,), tokens * heads, dtype=torch.int64, device=device)
        slots.index_copy_(0, rows.view(-1), (tokens_of[:, None] * heads + head).view(-1))
        layout.slots.append(slots)
        before += g * heads * lq
    return layout


def pick(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BucketLayout) -> tuple[torch.Tensor, ...]:
    """Gather what each bucket computes with.

    Args:
        q: (T * H, D) queries. k, v: (T * KV, D) keys and values.
        layout: of `make_layout`.

    Returns:
        each bucket's (G * heads * L, D), flat: q, k, v of the first, q, k, v of the second, ...
    """
    return _Pick.apply(q, k, v, layout)


def place(outs: Sequence[torch.Tensor], layout: BucketLayout) -> torch.Tensor:
    """The buckets' outputs, (G * H * Lq, D) each, -> table of outputs (T * H, D)."""
    return _Place.apply(layout, *outs)


def small_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention written out: scores in the input's dtype, softmax in float32 inside.

    Args:
        q: (G, H, Lq, D). k, v: (G, KV, Lk, D). mask: from `additive`. scale: factor on the scores.

    Returns:
        (G, H, Lq, D of v)
    """
    return _SmallAttention.apply(q, k, v, mask, scale)


class _Pick(torch.autograd.Function):
    """Tables (T * H, D), (T * KV, D), (T * KV, D) -> for each bucket (G * H * Lq, D) and twice (G * KV * Lk, D).

    Its backward sums in float32: a prefix key collects gradient from many branches.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BucketLayout
    ) -> tuple[torch.Tensor, ...]:
        ctx.layout, ctx.rows = layout, len(k)
        picked: list[torch.Tensor] = []
        for queries, keys in zip(layout.queries, layout.keys, strict=True):
            picked += [q.index_select(0, queries), k.index_select(0, keys), v.index_select(0, keys)]
        return tuple(picked)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        dk, dv = (_sum_rows(grads[i::3], ctx.layout.keys, ctx.rows) for i in (1, 2))
        # Every query is in one bucket, so its gradient is picked; a key may be in several, so those are summed.
        return _join(grads[0::3]).index_select(0, ctx.layout.inverse), dk, dv, None


class _Place(torch.autograd.Function):
    """The buckets' outputs (G * H * Lq, D) -> (T * H, D); its backward gives padding nothing."""

    @staticmethod
    def forward(ctx: Any, layout: BucketLayout, *outs: torch.Tensor) -> torch.Tensor:
        ctx.layout = layout
        return _join(outs).index_select(0, layout.inverse)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        table = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        return None, *(table.index_select(0, slots) for slots in ctx.layout.slots)


class _SmallAttention(torch.autograd.Function):
    """(G, H, Lq, D), 2 x (G, KV, Lk, D), mask (G * KV, H / KV * Lq, Lk) -> (G, H, Lq, D).

    Keeps the attention weights, (G * KV, H / KV * Lq, Lk), in the input's dtype. The heads of a group lie below each
    other, so that the products with the keys they share are one.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        # The heads of a group share their keys.
        queries, keys, values = (q * scale).view(len(mask), -1, q.shape[-1]), k.flatten(0, 1), v.flatten(0, 1)
        weights = torch.baddbmm(mask, queries, keys.transpose(1, 2)).softmax(-1)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scale = scale
        return torch.bmm(weights, values).view(*q.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        queries, keys, values, weights = ctx.saved_tensors
        shape, groups = grad.shape[:3], grad.shape[0]
        grad = grad.reshape(len(weights), -1, grad.shape[-1])
        dv = torch.bmm(weights.transpose(1, 2), grad)
        slope = torch.bmm(grad, values.transpose(1, 2))
        # torch's own kernel: weights * (slope - sum(weights * slope)) in one pass over the scores.
        slope = ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
        dq = torch.bmm(slope, keys).mul_(ctx.scale).view(*shape, -1)
        dk = torch.bmm(slope.transpose(1, 2), queries)
        return dq, dk.unflatten(0, (groups, -1)), dv.unflatten(0, (groups, -1)), None, None


def additive(mask: torch.Tensor, *, heads: int, kv: int, dtype: torch.dtype) -> torch.Tensor:
    """Spread a mask over heads, grouped as the batched product has them.

    Args:
        mask: (G, 1, Lq, Lk) True = visible.
        heads, kv: query heads H and key heads KV; H / KV queries share a key head.
        dtype: of the scores.

    Returns:
        (G * KV, H / KV * Lq, Lk) zeros and minus infinity, to be added to scores.
    """
    g, _, lq, lk = mask.shape
    hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return hidden.expand(g, heads, lq, lk).reshape(g * kv, heads // kv * lq, lk)


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _sum_rows(parts: Sequence[torch.Tensor], places: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    total = torch.zeros(rows, parts[0].shape[1], dtype=dtype, device=parts[0].device)
    for part, place in zip(parts, places, strict=True):
        total.index_add_(0, place, part.to(dtype))
    return total.to(parts[0].dtype)
