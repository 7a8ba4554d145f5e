"""Which keys of its own record a layer lets a query see: all before it, a sliding window, its chunk, another pattern.

transformers describes a layer's mask by a function of positions. Here that function is read for a packed row, where
the position that counts is the one on the record's path through the row. Owns the marker that travels to the layers in
place of a mask, and attention written out for what no fused kernel computes (sinks, soft caps, dropout of weights).
Refuses patterns that hang on more than positions.

Dimensions: G sequences, Lq / Lk queries and keys, H query heads, KV key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mmit.errors import ModelError
from mmit.models.row_state import current_row

MARK = "mmit_visibility"  # on the tensor that layers get for a mask
BLOCK = 1 << 26  # attention weights that may be alive at once where attention is written out


@dataclass(frozen=True, slots=True)
class Visibility:
    """A pattern within the causal one. `reach`: paths up to this length lose nothing by it."""

    function: Callable[..., Any]
    reach: int
    window: int | None = None  # the pattern is this sliding window

    def mask(self, before: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
        """(G, 1, Lq, Lk) True = visible, for queries that start after `before` (G,) keys of their own path."""
        q = before[:, None, None, None] + torch.arange(queries, device=before.device)[None, None, :, None]
        # Contract: keys are counted on the record's own path, so the pattern sees the record as if it stood alone.
        k = torch.arange(keys, device=before.device)[None, None, None, :]
        zero = torch.zeros((), dtype=torch.int64, device=before.device)
        return self.function(zero, zero, q, k) & (k <= q)


def row_mask(
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **given: Any,
) -> torch.Tensor | None:
    """What transformers calls to make a mask: its own outside packed rows, inside them a marker with the pattern.

    Args:
        mask_function: (batch, head, query, key) positions -> True where the query sees the key.
        local_size: keys of a window or chunk, None without one.
        use_vmap: the pattern is more than an expression of index tensors.
        device: of the marker.
        given: the rest of what transformers gives; only its own mask needs it.

    Returns:
        (1, 1, 1, 1) in a row; a mask (B, 1, Lq, Lk) or None elsewhere.

    Raises:
        ModelError: the pattern is not a function of positions alone.
    """
    row = current_row()
    if row is None:
        return sdpa_mask(mask_function=mask_function, local_size=local_size, use_vmap=use_vmap, device=device, **given)
    # transformers asks for vmap where the pattern is more than an expression of index tensors: it then reads something
    # of the row besides positions, which would be that of other records.
    if use_vmap:
        raise ModelError(
            "the model lays a pattern of its own over its attention, which hangs on more than positions",
            remedy="set data.packing=false",
        )
    # A tensor, because a mask goes through transformers' own code, which asks for its shape; of one element, because
    # nothing is to be computed with it.
    marker = torch.zeros(1, 1, 1, 1, device=device)
    # Nothing on the marker means plain causal, the case that every fused kernel has.
    if mask_function is not causal_mask_function:
        setattr(marker, MARK, Visibility(mask_function, local_size or 0, _window(mask_function, local_size)))
    return marker


def _window(function: Callable[..., Any], size: int | None) -> int | None:
    """`size` if that many keys before a query, itself among them, are what it sees; None for another pattern."""
    if size is None:
        return None
    pattern = Visibility(function, 0)
    try:
        # Three queries tell: the last that still sees all before it, the first that does not, and one far behind both.
        # A chunk or a pattern with gaps differs at one of them.
        seen = [int(pattern.mask(torch.tensor([q]), 1, q + 1).sum()) for q in (size - 1, size, 2 * size + 1)]
    except RuntimeError:  # it holds tensors of another device, as chunks do, and windows do not
        return None
    return size if seen == [size] * 3 else None


def visibility(mask: Any) -> Visibility | None:
    """The pattern that a marker carries; None for plain causal attention.

    Raises:
        ModelError: it is a mask that the model made for the whole row, which knows nothing of records.
    """
    if mask is None or tuple(mask.shape) == (1, 1, 1, 1):
        return getattr(mask, MARK, None)
    raise ModelError(
        "the model makes its attention mask itself, for a row as one sequence", remedy="set data.packing=false"
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """What a layer does to its scores on the way to attention weights, besides the softmax.

    Attributes:
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118).
        sinks: (H,) a score per head that takes part in the softmax and has no value (gpt-oss).
        dropout: share of attention weights that is dropped.
    """

    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Fused kernels compute it."""
        return self.softcap is None and self.sinks is None and not self.dropout


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, scores: Scores
) -> torch.Tensor:
    """Attention step by step, softmax in float32.

    Args:
        q: (G, H, Lq, D).
        k, v: (G, KV, Lk, D).
        mask: (G, 1, Lq, Lk) True = visible, or additive; None is causal, aligned at the end.
        scale: factor on the scores.
        scores: what else is done to them.

    Returns:
        (G, H, Lq, D of v)
    """
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        mask = mask[None, None]
    # Query heads of a group share their keys; a plain matrix product wants one set of keys for each query head.
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    # All weights of a long record at once would be Lq * Lk numbers per head, in the forward pass and again in what
    # autograd keeps. Blocks of queries bound the first, and recomputing them in the backward pass the second.
    rows = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    if rows >= q.shape[2]:
        return _query_block(q, k, v, mask, scale, scores)
    parts = []
    for start in range(0, q.shape[2], rows):
        part = mask[:, :, start : start + rows] if mask.shape[2] > 1 else mask
        block = q[:, :, start : start + rows]
        parts.append(checkpoint(_query_block, block, k, v, part, scale, scores, use_reentrant=False))
    return torch.cat(parts, dim=2)


def _query_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, scores: Scores
) -> torch.Tensor:
    """(G, H, L, D) some of the queries, (G, H, Lk, D) all keys and values -> (G, H, L, D)."""
    found = q @ k.transpose(2, 3) * scale
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    found = found.float()
    # Not minus infinity: a query of padding may see nothing, and its softmax must stay finite.
    hidden = torch.finfo(torch.float32).min
    found = found.masked_fill(~mask, hidden) if mask.dtype == torch.bool else found + mask.float()
    if scores.sinks is not None:
        # A column of its own that takes a share of the softmax; it is cut off again, since it has no value to add.
        column = scores.sinks.float().view(1, -1, 1, 1).expand(*found.shape[:3], 1)
        found = torch.cat([found, column], dim=-1)
    weights = found.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    return F.dropout(weights, scores.dropout) @ v if scores.dropout else weights @ v
