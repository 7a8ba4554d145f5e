"""Attention of a whole packed row in few calls of a variable-length kernel.

Owns the layouts such kernels want. Where many keys are shared, a call for each depth of the tree reads them where they
lie (`prefix_tree.py`). Where few are, or a window slides over them, one call gets queries one node after the other, and
for every node its ancestors' keys followed by its own. The kernel aligns its causal mask to the bottom right, so query
i of a node with b ancestors sees keys 0 to b + i, which is what a node may see. Where nodes share nothing, the row is
that layout already and nothing is gathered. Refuses nothing: `usable` says where the kernel runs (CUDA, half
precision), and the caller has another way.

Dimensions: T tokens in the row, G keys gathered for all nodes, K nodes, H query heads, KV key heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mmit.models.prefix_tree import FEW, FLASH, Call, Level, Parts, Tree, TreeAttention, make_levels
from mmit.models.sending import send

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build without it
    varlen_attn = None  # type: ignore[assignment]

MAX_HEAD = 256  # of the flash kernels
_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 and later


@dataclass(slots=True)
class Segments:
    """Index tensors of a row for a variable-length kernel."""

    keys: torch.Tensor | None  # (G,) row positions, node by node; None: the row itself
    cu_queries: torch.Tensor  # (K + 1,) int32, where each node's queries begin
    cu_keys: torch.Tensor  # (K + 1,) int32; the very same tensor where nothing is gathered, which kernels look at
    longest_query: int
    longest_key: int
    levels: list[Level] | None = None  # the calls that copy no keys, where that pays

    def to(self, device: torch.device | str) -> Segments:
        """Copy to a device."""
        queries = send(self.cu_queries, device)
        if self.keys is None:
            return Segments(None, queries, queries, self.longest_query, self.longest_key)
        keys, cu_keys = send(self.keys, device), send(self.cu_keys, device)
        levels = None if self.levels is None else [level.to(device) for level in self.levels]
        return Segments(keys, queries, cu_keys, self.longest_query, self.longest_key, levels)


def make_segments(table: list[list[int]], paths: Sequence[np.ndarray]) -> Segments:
    """Lay a row out for the kernel.

    Args:
        table: first token, length, parent of each node, which follow each other in the row.
        paths: int64 row positions of each node's ancestors.
    """
    # The kernel takes where sequences end, not a mask: a sequence of queries is a node, its keys are the node's path.
    lengths = [row[1] for row in table]
    queries = _ends(lengths)
    if not any(len(path) for path in paths):
        return Segments(None, queries, queries, max(lengths), max(lengths))
    pieces = [(path, np.arange(start, start + length)) for path, (start, length, _) in zip(paths, table, strict=True)]
    keys = np.concatenate([part for piece in pieces for part in piece])
    sizes = [len(path) + length for path, length in zip(paths, lengths, strict=True)]
    # The keys above are a copy for every node that reads them. Where they would be many more than the row has, the
    # calls of `prefix_tree` read each where it lies instead.
    levels = make_levels(table) if len(keys) > (1 + FEW) * sum(lengths) else None
    return Segments(torch.from_numpy(keys), queries, _ends(sizes), max(lengths), max(sizes), levels)


def _ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def usable(q: torch.Tensor) -> bool:
    """Whether the kernel takes queries (..., D) like these: half precision, CUDA, compute capability 8 or more."""
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= MAX_HEAD and runs_on(q.device, q.dtype)


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on a device in a number format."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def as_taken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (G, KV, D) as the kernel takes them, and keeps them: torch 2.11 wants one for each query head."""
    # Repeated outside of the autograd of the kernel: torch's own backward of the repetition then adds the gradients of
    # a group up.
    groups = 1 if _GROUPS else q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


def kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, window: int | None = None
) -> torch.Tensor:
    """Attention by torch's variable-length kernel.

    Args:
        q: (T, H, D) queries of all segments, one after the other.
        k, v: (G, KV, D) keys and values, gathered as the segments have them.
        segments: where each segment's queries and keys begin.
        scale: factor on the scores.
        window: keys that a query sees, its own among them; None for all before it.

    Returns:
        (T, H, D)
    """
    k, v = as_taken(q, k, v)
    more: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    s = segments
    more["window_size"] = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, s.cu_queries, s.cu_keys, s.longest_query, s.longest_key, scale=scale, **more)
    assert isinstance(out, torch.Tensor)  # a pair only where the log-sums are asked for
    return out


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, float, int | None], torch.Tensor]


class Kernels(NamedTuple):
    """What computes a row: `run` one whose keys are gathered or its own, `parts` one whose keys are shared."""

    run: Kernel
    parts: Parts


TORCH = Kernels(kernel, FLASH)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    *,
    window: int | None = None,
    kernels: Kernels = TORCH,
) -> torch.Tensor:
    """Attention of one row.

    A path's keys follow each other in their order, so a window over keys is one over positions.

    Args:
        q: (T, H, D).
        k, v: (T, KV, D).
        segments: from `make_segments` on the row's nodes, on the same device.
        scale: factor on the scores.
        window: of a sliding window, in keys, the query's own among them; None for none.
        kernels: what computes it; others count operations, or run in float64.

    Returns:
        (T, H, D)
    """
    # A window cuts through the levels: which of an ancestor's keys a query sees then depends on the query.
    if segments.levels is not None and window is None:
        longest = segments.longest_query
        own = Call(segments.cu_queries, segments.cu_queries, longest, longest, causal=True)
        out: torch.Tensor = TreeAttention.apply(q, k, v, Tree(own, segments.levels), scale, kernels.parts)
        return out
    if segments.keys is not None:
        k, v = (_Gather.apply(x, segments.keys) for x in (k, v))
    return kernels.run(q, k, v, segments, scale, window)


class _Gather(torch.autograd.Function):
    """(T, KV, D), index (G,) -> (G, KV, D), `rows[index]`.

    Its backward sums in float32: a prefix key collects gradient from many branches.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.length = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        # In float32 whatever the format: in bf16 a sum of many small gradients stops growing.
        total = torch.zeros(ctx.length, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return total.index_add_(0, index, grad.float()).to(grad.dtype), None
