"""How one model takes its pictures: the pixels its vision tower sees, and the image tokens they become.

Owns the way from a picture to crops (C, 3, H, W) uint8 and to its `Spread`, which places the tokens of those crops in
the text. A spread follows from width and height alone, so rows are planned without decoding. Refuses tilings that the
projector's tokens cannot carry out, and options that no tiling has.

Letters: C crops of one picture, M tokens the projector gives for a crop, W image tokens of one picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import PIL.Image
import torch

from mmit.data.decode import load_fast
from mmit.data.images import FIT_MODES, INTERPOLATIONS, fit, image_size, to_tensor
from mmit.data.native import NativeLayout, check_native, layout
from mmit.data.tiles import TILINGS, Size, Tiling, crops
from mmit.errors import ConfigError, ImageError, nearest
from mmit.records import Image

LINE_END = -1  # in a spread's index: the learned vector that ends a line
NATIVE = "native"  # the mode of towers that take pictures at their own size
_GIVEN = {"size", "tile", "features", "tile_tokens"}  # a tiling's arguments that follow from the model


@dataclass(frozen=True, slots=True)
class Spread:
    """The image tokens of one picture.

    Attributes:
        crops: C, pictures that go through the tower; of a tower of native resolution its units.
        index: (W,) int64, which of the picture's C * M projected tokens stands at each place, or LINE_END.
        grid: (rows, columns) of its units; None for towers of one size.
    """

    crops: int
    index: torch.Tensor
    grid: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """W."""
        return self.index.numel()  # len() of a tensor goes through Python


@dataclass(frozen=True)
class ImagePreparation:
    """How pictures become pixels and tokens.

    Args:
        size: (H, W) of the tower's input. mode: of `data.images.fit`, a key of `data.tiles.TILINGS`, or "native".
        interpolation: a key of INTERPOLATIONS. fill: RGB of padding.
        tokens: M. grid: (h, w) of these tokens, or None where they are no grid (a resampler's queries).
        tiles: options of the tiling (pinpoints, max_tiles, thumbnail, ...).
        native: the rule and limits of a tower of native resolution (see `data.native`); `size` is then its unit's, and
            `tokens` and `grid` are what one unit becomes.

    Raises:
        ConfigError: an unknown mode or option, or a tiling that needs what this model does not give.
    """

    size: tuple[int, int]
    mode: str
    interpolation: str
    fill: tuple[int, int, int]
    tokens: int
    grid: tuple[int, int] | None = None
    tiles: Mapping[str, Any] = field(default_factory=dict)
    native: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("size", "fill"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        modes = (*FIT_MODES, *TILINGS, NATIVE)
        if self.mode not in modes:
            raise ConfigError(f"unknown image fit mode '{self.mode}'", remedy=nearest(str(self.mode), modes))
        if self.interpolation not in INTERPOLATIONS:
            remedy = nearest(str(self.interpolation), INTERPOLATIONS)
            raise ConfigError(f"unknown interpolation '{self.interpolation}'", remedy=remedy)
        if self.mode == NATIVE:
            check_native(self.native)
        if self.mode not in TILINGS:
            if self.tiles:
                problem = f"tiles has {', '.join(self.tiles)}, but pictures are not cut into tiles"
                raise ConfigError(problem, remedy=f"set model.vision.fit to {' or '.join(TILINGS)}, or remove them")
            return
        valid = set(inspect.signature(TILINGS[self.mode]).parameters) - _GIVEN
        for name in self.tiles:
            if name not in valid:
                raise ConfigError(f"unknown tile option '{name}'", remedy=nearest(name, valid))
        if self.size[0] != self.size[1]:
            problem = f"tiles are square, the tower's input is {self.size[0]} x {self.size[1]}"
            raise ConfigError(problem, remedy="set model.vision.image_size to one side, or another fit")
        if self.mode == "any_resolution" and (self.grid is None or self.grid[0] != self.grid[1]):
            raise ConfigError(
                f"any_resolution joins the tokens of tiles into one picture, but the projector's {self.tokens} tokens "
                f"are {'no grid' if self.grid is None else f'a grid of {self.grid[0]} x {self.grid[1]}'}",
                remedy="set model.vision.fit=dynamic, or a projector and model.vision.select that keep the grid",
            )
        # Tried once: an option that cannot work fails before the first picture, not in a worker hours later.
        self.tiling((self.size[1], self.size[0]))  # values of the options, before any picture is read

    @property
    def tiled(self) -> bool:
        """Whether a picture's size decides its crops and tokens."""
        return self.mode in TILINGS or self.mode == NATIVE

    def tiling(self, size: Size) -> Tiling:
        """How a picture of (W, H) pixels is cut."""
        given: dict[str, Any] = {"tile": self.size[0], **self.tiles}
        if self.mode == "any_resolution":
            assert self.grid is not None
            given["features"] = self.grid[0]
            if "pinpoints" in given:
                given["pinpoints"] = tuple(tuple(canvas) for canvas in given["pinpoints"])
        else:
            given["tile_tokens"] = self.tokens
        return TILINGS[self.mode](size, **given)

    def spread(self, image: Image, *, where: str = "") -> Spread:
        """Crops and image tokens of a picture, from its header at most. Raises ImageError."""
        if not self.tiled:
            return _plain(self.tokens)
        size = self.size_of(image, where=where)
        if self.mode == NATIVE:
            return _unit_spread(layout(size, self.native, where=where).grid, self.tokens, self.grid)
        return _spread(self.tiling(size), self.tokens, self.grid)

    def size_of(self, image: Image, *, where: str = "") -> Size:
        """The upright (W, H) of a picture, from its header at most. Raises ImageError."""
        return image.size or image_size(image, where=where)

    def pixels(self, image: Image, *, where: str = "") -> torch.Tensor:
        """Decode a picture: (C, 3, H, W) uint8. Raises ImageError."""
        picture = load_fast(image, where=where)
        if not self.tiled:
            options: dict[str, Any] = {"mode": self.mode, "interpolation": self.interpolation, "fill": self.fill}
            return fit(picture, self.size, **options)[None]
        # Rows were planned by the size in the index; other pixels would give another number of tokens.
        if image.size is not None and picture.size != image.size:
            raise ImageError(
                f"is {picture.width} x {picture.height} pixels, {image.size[0]} x {image.size[1]} were indexed",
                where=where,
                remedy="build the index again",
            )
        if self.mode == NATIVE:
            return self._units(picture, layout(picture.size, self.native, where=where))
        cut = crops(
            picture,
            self.tiling(picture.size),
            interpolation=INTERPOLATIONS[self.interpolation],
            fill=self.fill,
        )
        return torch.stack([to_tensor(crop) for crop in cut])

    def _units(self, picture: PIL.Image.Image, laid: NativeLayout) -> torch.Tensor:
        """(C, 3, S, S) uint8: the units of a picture, row by row; what its grid has beyond it is black."""
        pixels = fit(picture, laid.scaled, mode="resize", interpolation=self.interpolation, fill=self.fill)
        (rows, columns), (high, wide) = laid.grid, self.size
        below, beside = rows * high - laid.scaled[0], columns * wide - laid.scaled[1]
        pixels = torch.nn.functional.pad(pixels, (0, beside, 0, below))
        # Units in the order in which the tower reads them: row by row of the picture.
        units = pixels.unflatten(2, (columns, wide)).unflatten(1, (rows, high)).permute(1, 3, 0, 2, 4)
        crops: torch.Tensor = units.flatten(0, 1).contiguous()
        return crops

    def whole(self) -> ImagePreparation:
        """The same tower looking at whole pictures, one crop each. Raises ConfigError where it has no such size."""
        if not self.tiled:
            return self
        if self.mode == NATIVE:
            raise ConfigError(
                "word alignment needs a vision encoder of one size, and this one takes pictures at their own",
                where="align",
                remedy="set align: null",
            )
        return ImagePreparation(self.size, "resize", self.interpolation, self.fill, tokens=self.tokens, grid=self.grid)

    def blank(self, colour: Sequence[int]) -> Image:
        """Return a picture of one colour in the tower's size, for baselines that show nothing."""
        return Image(PIL.Image.new("RGB", (self.size[1], self.size[0]), tuple(colour)))


def prepare_images(image: Mapping[str, Any], *, tokens: int, grid: tuple[int, int] | None) -> ImagePreparation | None:
    """Join how pictures are brought to a tower, as a checkpoint states it, to what its model makes of them.

    Args:
        image: size, mode, interpolation, fill and perhaps tiles; empty for a model that sees nothing.
        tokens, grid: see `ImagePreparation`.
    """
    return ImagePreparation(**image, tokens=tokens, grid=grid) if image else None


def grids_of(spreads: Iterable[Spread]) -> torch.Tensor | None:
    """(K, 2) rows and columns of units of K pictures; None for none, and for towers of one size."""
    grids = [spread.grid for spread in spreads if spread.grid is not None]
    return torch.tensor(grids, dtype=torch.int64) if grids else None


def splice_index(slots: Iterable[Hashable], spreads: Mapping[Hashable, Spread], tokens: int) -> torch.Tensor:
    """Which row of the image table goes to each image position of a row of text.

    Args:
        slots: the picture of each image slot. spreads: of these pictures.
        tokens: M.

    Returns:
        (sum of W over the slots,) int64 into the table that holds the C * M projected tokens of each distinct
        picture, in the order of first appearance; LINE_END stays LINE_END.
    """
    slots = list(slots)
    first: dict[Hashable, int] = {}
    rows = 0
    # A picture that stands in a row several times has its crops in the table once.
    for key in dict.fromkeys(slots):
        first[key] = rows
        rows += spreads[key].crops * tokens
    if not slots:
        return torch.zeros(0, dtype=torch.int64)
    parts = ((spreads[key].index, first[key]) for key in slots)
    return torch.cat([torch.where(index < 0, index, index + offset) for index, offset in parts])


@lru_cache(maxsize=64)
def _plain(tokens: int) -> Spread:
    return Spread(1, torch.arange(tokens))


@lru_cache(maxsize=4096)
def _unit_spread(units: tuple[int, int], tokens: int, grid: tuple[int, int] | None) -> Spread:
    """Tokens of a picture of units; where those of a unit are a grid, they are read row by row of the picture."""
    rows, columns = units
    # The tower gives units one after the other; a reader of the picture wants its lines, across units.
    index = torch.arange(rows * columns * tokens)
    if grid is not None:
        index = index.view(rows, columns, *grid).transpose(1, 2).flatten()
    return Spread(rows * columns, index, units)


@lru_cache(maxsize=4096)
def _spread(tiling: Tiling, tokens: int, grid: tuple[int, int] | None) -> Spread:
    if tiling.kept is None:  # whole crops one after the other
        return Spread(tiling.crops, torch.arange(tiling.crops * tokens))
    assert grid is not None
    (rows, columns), (h, w), (top, left, height, width) = tiling.grid, grid, tiling.kept
    first = int(tiling.thumbnail == "first")
    # (rows, h, columns, w): the tokens of the tiles, read as one picture
    joined = torch.arange(rows * columns * tokens).view(rows, columns, h, w).permute(0, 2, 1, 3)
    lines = joined.reshape(rows * h, columns * w)[top : top + height, left : left + width] + first * tokens
    # Whether lines end with a token of their own shows in the count that the tiling states.
    if tiling.tokens == first * tokens + height * (width + 1):
        lines = torch.cat([lines, torch.full((height, 1), LINE_END)], dim=1)
    index = torch.cat([torch.arange(first * tokens), lines.flatten()])
    return Spread(tiling.crops, index)
