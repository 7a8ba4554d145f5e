"""Several vision encoders that look at the same picture, their features side by side (as prismatic-vlms,
arXiv:2402.07865).

Goes in: encoders with one grid. Comes out: one Encoder, whose features are theirs joined along D. Each normalises with
its own constants; the picture is prepared once, for the largest input, and scaled down for the others. Refuses class
tokens and grids that differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmit.errors import ModelError
from mmit.models.vision_encoder import Encoder, Reader


class FusedReader(Reader):
    """uint8 pixels (B, 3, H, W) -> features (B, N, sum of D)."""

    own_constants = True
    _constants: torch.Tensor

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        self.readers = nn.ModuleList(encoder.reader for encoder in encoders)
        self.encoders = list(encoders)
        self.register_buffer("_constants", self._made_constants(), persistent=False)

    def _made_constants(self) -> torch.Tensor:
        """(E, 2, 3, 1, 1) float32: mean and standard deviation of each encoder."""
        return torch.tensor([[encoder.mean, encoder.std] for encoder in self.encoders])[..., None, None]

    def _apply(self, fn: Any, recurse: bool = True) -> FusedReader:
        super()._apply(fn, recurse)
        # As `VisionTower` does: a cast to the tower's dtype must not reach them.
        self._constants = self._made_constants().to(self._constants.device)
        return self

    def set_frozen(self, frozen: bool) -> None:
        """See `Reader.set_frozen`; of each encoder."""
        for reader in self.readers:
            reader.set_frozen(frozen)  # type: ignore[operator]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N, sum of D)."""
        found = []
        for reader, encoder, (middle, spread) in zip(self.readers, self.encoders, self._constants, strict=True):
            shown = pixels.float()
            if tuple(pixels.shape[2:]) != encoder.image_size:
                scaled = F.interpolate(shown, encoder.image_size, mode="bicubic", antialias=True, align_corners=False)
                shown = scaled.round().clamp(0, 255)  # as a picture of that size would be
            # In float32 up to here: the encoders' number format may not tell 256 values apart.
            dtype = next(reader.parameters()).dtype
            found.append(reader(((shown / 255 - middle) / spread).to(dtype)))
        return torch.cat(found, dim=-1)


def parts_of(encoder: Encoder) -> list[Encoder]:
    """Return the encoders of a fused one, and of any other itself."""
    return encoder.reader.encoders if isinstance(encoder.reader, FusedReader) else [encoder]


def fuse(encoders: Sequence[Encoder]) -> Encoder:
    """Join encoders. Raises ModelError for fewer than two, for class tokens, native resolution and unequal grids."""
    if len(encoders) < 2:
        raise ModelError(f"kind fused has {len(encoders)} towers", where="towers", remedy="list two or more")
    for encoder in encoders:
        if encoder.native is not None or encoder.prefix:
            what = "pictures of any size" if encoder.native is not None else "a class token"
            raise ModelError(
                f"takes {what}, which is not fused",
                where=f"towers, {encoder.name}",
                remedy="fuse towers of one size, read with select: patch",
            )
    grids = {encoder.grid for encoder in encoders}
    if len(grids) > 1:
        told = ", ".join(f"{e.name}: {e.grid} of {e.image_size}" for e in encoders)
        raise ModelError(
            f"towers of different grids have no features side by side ({told})",
            where="towers",
            remedy="give image_size to one of them: its side divided by the patch must be the other's",
        )
    largest = max(encoders, key=lambda encoder: encoder.image_size)
    facts = [[e.identity, e.layer, e.normalize, e.image_size, e.mean, e.std] for e in encoders]
    first: Any = encoders[0]
    return Encoder(
        reader=FusedReader(encoders),
        name=" + ".join(encoder.name for encoder in encoders),
        weights_id=" + ".join(encoder.weights_id for encoder in encoders),
        identity=json.dumps(["fused", facts]),
        layer=first.layer,
        normalize=False,
        image_size=largest.image_size,
        grid=first.grid,
        prefix=0,
        dim=sum(encoder.dim for encoder in encoders),
        # Of the first: the colour that pads a picture.
        mean=first.mean,
        std=first.std,
        interpolation=largest.interpolation,
    )
