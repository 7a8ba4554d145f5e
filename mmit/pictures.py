"""The pictures of prompts while they are answered: each runs through the vision tower once.

Takes the plan of batches, gives the features of each batch's pictures, and keeps those that a later batch shows again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from mmit.data.preparation import ImagePreparation, Spread, grids_of

if TYPE_CHECKING:
    from mmit.data.prompts import Prompt, PromptImage
    from mmit.models.vlm import VLM

CROPS_AT_ONCE = 32  # through the vision tower, but for a picture that has more
UNITS_AT_ONCE = 8192  # of a tower of native resolution
Features = dict[Hashable, tuple[torch.Tensor, Spread]]  # key of a picture -> (C, N, D) of its crops, and its tokens


class Pictures:
    """The features of pictures: each computed once, and kept until the last batch that needs it.

    Args:
        preparation: None for a model that sees nothing; its prompts have no pictures.
        plan: the batches in their order.

    Attributes:
        seen: pictures run through the tower so far.
    """

    def __init__(self, vlm: VLM, preparation: ImagePreparation | None, plan: Sequence[Sequence[Prompt]]) -> None:
        self._vlm, self._preparation = vlm, preparation
        self._uses = Counter(key for batch in plan for key in _shown(batch))
        self._kept: Features = {}
        self.seen = 0

    def take(self, batch: Sequence[Prompt]) -> Features:
        """Return the features of every picture of a batch. Raises ImageError."""
        pictures = _shown(batch)
        missing = [key for key in pictures if key not in self._kept]
        while missing:
            assert self._vlm.vision is not None and self._preparation is not None
            crops = accumulate(pictures[key].spread.crops for key in missing)
            most = CROPS_AT_ONCE if self._vlm.vision.native is None else UNITS_AT_ONCE
            count = max(1, sum(total <= most for total in crops))
            keys, missing = missing[:count], missing[count:]
            pixels = [self._preparation.pixels(pictures[key].image, where=pictures[key].where) for key in keys]
            grids = grids_of(pictures[key].spread for key in keys)
            seen = self._vlm.see(torch.cat(pixels).to(next(self._vlm.vision.parameters()).device), grids)
            for key, features in zip(keys, seen.split([len(cut) for cut in pixels]), strict=True):
                self._kept[key] = features, pictures[key].spread
            self.seen += len(keys)
        self._uses.subtract(pictures.keys())
        return {key: self._kept[key] if self._uses[key] else self._kept.pop(key) for key in pictures}


def _shown(batch: Sequence[Prompt]) -> dict[Hashable, PromptImage]:
    return {key: shown for prompt in batch for key, shown in prompt.pictures.items()}
