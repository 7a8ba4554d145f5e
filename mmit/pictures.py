"""The pictures of prompts while they are answered: each runs through the vision tower once.

Takes the plan of batches, gives the features of each batch's pictures, and keeps those that a later batch shows again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
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
        missing = {key: shown.spread for key, shown in pictures.items() if key not in self._kept}

        def pixels(key: Hashable) -> torch.Tensor:
            assert self._preparation is not None
            return self._preparation.pixels(pictures[key].image, where=pictures[key].where)

        self._kept |= look(self._vlm, missing, pixels)
        self.seen += len(missing)
        self._uses.subtract(pictures.keys())
        return {key: self._kept[key] if self._uses[key] else self._kept.pop(key) for key in pictures}


class FeatureMemory:
    """The features of pictures that were looked at last, up to a number of bytes.

    Attributes:
        seen: pictures run through the tower so far.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[Hashable, tuple[torch.Tensor, Spread]] = OrderedDict()
        self.seen = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        return self._bytes

    def take(
        self, vlm: VLM, spreads: Mapping[Hashable, Spread], pixels: Callable[[Hashable], torch.Tensor]
    ) -> Features:
        """Return the features of pictures, equal keys being equal pictures; see `look`."""
        found = {key: self._kept[key] for key in spreads if key in self._kept}
        new = look(vlm, {key: spread for key, spread in spreads.items() if key not in found}, pixels)
        # A copy: what several pictures are parts of would be kept as long as one of them is.
        new = {key: (features.clone(), spread) for key, (features, spread) in new.items()}
        self.seen += len(new)
        for key, kept in (found | new).items():
            self._kept[key] = kept
            self._kept.move_to_end(key)
        self._bytes += sum(features.nbytes for features, _ in new.values())
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1][0].nbytes
        return found | new


def look(vlm: VLM, spreads: Mapping[Hashable, Spread], pixels: Callable[[Hashable], torch.Tensor]) -> Features:
    """Run pictures through the vision tower, several at once.

    Args:
        spreads: of each picture, by its key. pixels: (C, 3, H, W) uint8 of a picture; may raise ImageError.
    """
    found: Features = {}
    missing = list(spreads)
    while missing:
        assert vlm.vision is not None
        crops = accumulate(spreads[key].crops for key in missing)
        most = CROPS_AT_ONCE if vlm.vision.native is None else UNITS_AT_ONCE
        count = max(1, sum(total <= most for total in crops))
        keys, missing = missing[:count], missing[count:]
        cuts = [pixels(key) for key in keys]
        seen = vlm.encode_images(
            torch.cat(cuts).to(next(vlm.vision.parameters()).device), grids_of(spreads[key] for key in keys)
        )
        for key, features in zip(keys, seen.split([len(cut) for cut in cuts]), strict=True):
            found[key] = features, spreads[key]
    return found


def _shown(batch: Sequence[Prompt]) -> dict[Hashable, PromptImage]:
    return {key: shown for prompt in batch for key, shown in prompt.pictures.items()}
