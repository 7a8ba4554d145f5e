"""What every vision encoder of native resolution has: units in, features out, and no attention between pictures.

C units of all pictures, K pictures, f = merge, p = patch in pixels, S = f * p, D = hidden size times layers read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface

from mmit.models.vision_encoder import Reader

SEGMENTS = "mmit_pictures"  # the attention function that keeps pictures apart
LIKE = 0.8  # share of the longest picture of a batch that every other one has at least


class NativeReader(Reader):
    """Normalised units (C, 3, S, S) and grids (K, 2) of units -> features (C, f * f, D), unit by unit.

    Args:
        model: the transformers model, cut.
        patch, merge: p and f. blocks: numbers of the blocks whose outputs are read.
    """

    native = True
    exact_buffers = True

    def __init__(self, model: Any, *, patch: int, merge: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.patch, self.merge, self.blocks = patch, merge, blocks

    def forward(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(C, 3, S, S), (K, 2) -> (C, f * f, D)."""
        f, p = self.merge, self.patch
        # (C, f, f, 3, p, p): the patches of each unit, row by row.
        patches = pixels.unflatten(3, (f, p)).unflatten(2, (f, p)).permute(0, 2, 4, 1, 3, 5)
        hidden = self.outline(patches) if without_data(pixels) else self.run(patches, grids)
        return hidden.reshape(len(pixels), f * f, -1)

    def run(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(C, f, f, 3, p, p), (K, 2) -> (C * f * f, D) in the order of the patches; each kind brings its own."""
        raise NotImplementedError

    def outline(self, patches: torch.Tensor) -> torch.Tensor:
        """As `run` on tensors without data, where a forecast counts operations and bytes.

        All units count as one picture, without windows, and positions, which cost little, are left out.
        """
        hidden = self.embedded(patches.flatten(0, 2))
        heads = getattr(self.model.config, "num_heads", None) or self.model.config.num_attention_heads
        angles = hidden.new_zeros(len(hidden), hidden.shape[1] // heads)
        ends = np.array([0, len(hidden)])  # no tensor: its numbers are read
        for block in self.stack():
            hidden = block(hidden, cu_seqlens=ends, position_embeddings=(angles, angles))
        return torch.cat([hidden] * len(self.blocks), dim=-1)

    def stack(self) -> Any:
        """The blocks."""
        raise NotImplementedError

    def embedded(self, flat: torch.Tensor) -> torch.Tensor:
        """(T, 3, p, p) -> (T, hidden size), positions left out."""
        raise NotImplementedError

    def to_raster(self, x: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(C * f * f, ...) unit by unit -> row by row of each picture."""
        f, out = self.merge, []
        for part, (rows, columns) in zip(split_pictures(x, grids, f), grids.tolist(), strict=True):
            out.append(part.unflatten(0, (rows, columns, f, f)).transpose(1, 2).flatten(0, 3))
        return torch.cat(out)

    def to_units(self, x: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        f, out = self.merge, []
        for part, (rows, columns) in zip(split_pictures(x, grids, f), grids.tolist(), strict=True):
            out.append(part.unflatten(0, (rows, f, columns, f)).transpose(1, 2).flatten(0, 3))
        return torch.cat(out)

    @contextmanager
    def watched(self, stack: Any) -> Iterator[Callable[[], list[torch.Tensor]]]:
        """Watch the blocks that are read; the callable gives their outputs, in the order in which they were named."""
        seen: dict[int, torch.Tensor] = {}

        def keep(block: int) -> Callable[..., None]:
            return lambda module, given, out: seen.__setitem__(block, out)

        handles = [stack[block - 1].register_forward_hook(keep(block)) for block in self.blocks]
        try:
            yield lambda: [seen[block] for block in self.blocks]
        finally:
            for handle in handles:
                handle.remove()


def without_data(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape alone."""
    return x.is_meta or isinstance(x, FakeTensor)


def frames(grids: torch.Tensor, merge: int) -> torch.Tensor:
    """(K, 2) grids of units -> (K, 3) frames, rows and columns of patches."""
    return F.pad(grids * merge, (1, 0), value=1)


def split_pictures(x: torch.Tensor, grids: torch.Tensor, merge: int) -> list[torch.Tensor]:
    """Cut (C * f * f, ...) into its pictures."""
    return list(x.split((grids.prod(1) * merge**2).tolist()))


def _apart(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (1, heads, T, head dim) within each picture; `attention_mask` (K,) holds their lengths."""
    if without_data(query):  # a forecast: all tokens count as one picture, as in `outline`
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout)
        return out.transpose(1, 2), None
    lengths = tuple(attention_mask.tolist())
    tables = [x[0].transpose(0, 1) for x in (query, key, value)]  # (T, heads, head dim)
    order, made = [], []
    for places, real in batches(lengths):
        tokens, seen = places.to(query.device), None if real is None else real.to(query.device)
        q, k, v = (table[tokens].transpose(1, 2) for table in tables)  # (G, heads, L, head dim)
        mask = None if seen is None else seen[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout, attn_mask=mask).transpose(1, 2)
        order.append(tokens.flatten() if seen is None else tokens[seen])
        made.append(out.flatten(0, 1) if seen is None else out[seen])
    return torch.cat(made)[torch.cat(order).argsort()][None], None


@functools.lru_cache(maxsize=8)
def batches(lengths: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Pictures of like length together.

    Returns:
        for each batch (G, L) places of its tokens in the row, padded with the row's first, and which of them are none
        of the padding; None where there is none
    """
    starts = np.cumsum([0, *lengths]).tolist()
    groups: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and lengths[n] >= LIKE * lengths[groups[-1][0]]:
            groups[-1].append(n)
        else:
            groups.append([n])
    out = []
    for group in groups:
        longest = lengths[group[0]]
        places = torch.arange(longest)
        real = torch.tensor([lengths[n] for n in group])[:, None] > places
        tokens = torch.where(real, torch.tensor([starts[n] for n in group])[:, None] + places, 0)
        out.append((tokens, None if bool(real.all()) else real))
    return out


AttentionInterface.register(SEGMENTS, _apart)
