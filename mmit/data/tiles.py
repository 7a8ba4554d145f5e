"""Large pictures as tiles: which grid a picture gets, how many tokens that is, and the crops.

Owns two published rules, LLaVA-1.6's any-resolution and InternVL's dynamic tiling. A grid and its token count follow
from width and height alone, so a header is enough to plan a row; `crops` cuts the pixels to match. Knows no model:
tile size and tokens per tile are arguments. Never crops content away: any-resolution pads, InternVL stretches.

Letters: W width, H height of the picture in pixels; S side of a tile in pixels; h, w features of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
from PIL.Image import Resampling

from mmit.errors import ConfigError, ImageError

Size = tuple[int, int]  # (W, H)
# LLaVA-1.6's canvases for tiles of 336 pixels.
PINPOINTS: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one picture is cut.

    Attributes:
        tile: S, side of every crop in pixels.
        grid: (rows, columns) of tiles, read row by row.
        thumbnail: where the whole picture, stretched to one tile, stands among the crops; None if it is left out.
        resize: "pad" keeps the picture's proportions on a padded canvas, "stretch" fills the canvas.
        tokens: image tokens of the picture in all, thumbnail and line ends included.
        kept: (top, left, rows, columns) of the joined features that show the picture and not the padding; None
            keeps all of them.
    """

    tile: int
    grid: tuple[int, int]
    thumbnail: Literal["first", "last"] | None
    resize: Literal["pad", "stretch"]
    tokens: int
    kept: tuple[int, int, int, int] | None = None

    @property
    def canvas(self) -> Size:
        """(W, H) in pixels of what the tiles are cut from."""
        return self.grid[1] * self.tile, self.grid[0] * self.tile

    @property
    def crops(self) -> int:
        """Pictures that go through the vision tower."""
        return self.grid[0] * self.grid[1] + (self.thumbnail is not None)


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """Return the canvas that keeps most of the picture's pixels and, among equals, wastes the fewest of its own.

    The rule of LLaVA-1.6 (`select_best_resolution`): enlarging a picture gains nothing, so a small one gets the
    smallest canvas that holds it; among equals the first. Raises ConfigError if there are no canvases.
    """
    _check_size(size)
    if not canvases:
        raise ConfigError("no canvases to choose from", remedy="Give pinpoints such as (336, 672).")
    W, H = size

    def fit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / W, canvas[1] / H)
        # Pixels of the picture that survive: never more than it has, since enlarging shows nothing new.
        kept = min(int(W * scale) * int(H * scale), W * H)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=fit)


def any_resolution(
    size: Size,
    *,
    tile: int = 336,
    features: int = 24,
    pinpoints: Sequence[Size] = PINPOINTS,
    thumbnail: bool = True,
    unpad: bool = True,
    line_ends: bool = True,
) -> Tiling:
    """LLaVA-1.6: the best canvas of `pinpoints`, padded; the thumbnail first, then the joined features.

    Args:
        size: (W, H) of the picture.
        tile: S. features: h = w, features along a side of one tile.
        pinpoints: canvases (W, H), multiples of `tile`.
        thumbnail: show the whole picture, too.
        unpad: leave out the features that show only padding.
        line_ends: one token ends each row of the joined features ("image_newline").

    Raises ConfigError for sizes below 1 and canvases that are no multiple of the tile.
    """
    _check_counts(tile=tile, features=features)
    for canvas in pinpoints:
        if min(canvas) < tile or canvas[0] % tile or canvas[1] % tile:
            problem = f"the canvas {canvas[0]} x {canvas[1]} is no multiple of the tile, {tile} pixels"
            raise ConfigError(problem, remedy="Give pinpoints that are whole tiles wide and high.")
    W, H = best_canvas(size, pinpoints)
    rows, columns = H // tile, W // tile
    kept = (0, 0, rows * features, columns * features)
    if unpad:
        kept = _unpadded(size, kept[2], kept[3])
    tokens = kept[2] * (kept[3] + line_ends) + thumbnail * features**2
    return Tiling(tile, (rows, columns), "first" if thumbnail else None, "pad", tokens, kept)


def _unpadded(size: Size, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, rows, columns) of the features that show the picture, centred on the canvas.

    Rounded as LLaVA rounds. Of a picture so narrow that nothing would be left, at least a line stays.
    """
    W, H = size
    if W / H > width / height:
        # The 7 digits are those of transformers' LLaVA-NEXT: a quotient that a float puts just below a whole number
        # must not lose a line.
        cut = min((height - int(round(H * (width / W), 7))) // 2, (height - 1) // 2)
        return cut, 0, height - 2 * cut, width
    cut = min((width - int(round(W * (height / H), 7))) // 2, (width - 1) // 2)
    return 0, cut, height, width - 2 * cut


def dynamic_tiles(
    size: Size,
    *,
    tile: int = 448,
    tile_tokens: int = 256,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
) -> Tiling:
    """InternVL 1.5: the grid of tiles nearest in aspect ratio, stretched; the thumbnail last.

    Among grids equally near, the larger one only if the picture has more than half of its pixels. One tile is the
    whole picture already, so it gets no thumbnail.

    Args:
        size: (W, H) of the picture in pixels. tile: pixels of a tile's side.
        tile_tokens: what one tile becomes in the model.
        min_tiles, max_tiles: tiles of a grid, without the thumbnail.
        thumbnail: the whole picture is one tile more.

    Raises:
        ConfigError: sizes and counts below 1, or a least above the most.
    """
    _check_size(size)
    _check_counts(tile=tile, tile_tokens=tile_tokens, min_tiles=min_tiles, max_tiles=max_tiles)
    if min_tiles > max_tiles:
        raise ConfigError(f"min_tiles={min_tiles} is more than max_tiles={max_tiles}", remedy="Swap them.")
    W, H = size
    aspect, best, nearest = W / H, (1, 1), math.inf
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        # InternVL's rule for ties, from its published code: 2 x 2 and 1 x 1 are equally square, and a small picture
        # stays one tile.
        filled = W * H > 0.5 * tile * tile * columns * rows
        if distance < nearest or (distance == nearest and filled):
            best, nearest = (rows, columns), distance
    count = best[0] * best[1]
    extra = thumbnail and count > 1
    return Tiling(tile, best, "last" if extra else None, "stretch", (count + extra) * tile_tokens)


def _grids(low: int, high: int) -> list[tuple[int, int]]:
    """Every (columns, rows) of `low` to `high` tiles, the smallest first."""
    sides = range(1, high + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if low <= columns * rows <= high]
    # The order decides ties.
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid))


TILINGS: dict[str, Callable[..., Tiling]] = {"any_resolution": any_resolution, "dynamic": dynamic_tiles}


def crops(
    picture: PIL.Image.Image,
    tiling: Tiling,
    *,
    interpolation: Resampling = Resampling.BICUBIC,
    fill: tuple[int, int, int] = (0, 0, 0),
) -> list[PIL.Image.Image]:
    """Cut an RGB picture into tiles of S x S pixels.

    Args:
        picture: RGB. tiling: its grid, and S.
        interpolation: of the scaling before. fill: RGB of the padding.

    Returns:
        `tiling.crops` pictures, in the order the model reads them.

    Raises:
        ImageError: the picture is not RGB.
    """
    if picture.mode != "RGB":
        raise ImageError(f"crops takes RGB, not {picture.mode}", remedy="Load the picture with load_rgb.")
    S, (rows, columns) = tiling.tile, tiling.grid
    canvas = _canvas(picture, tiling, interpolation, fill=fill)
    corners = [(x * S, y * S) for y in range(rows) for x in range(columns)]
    out = [canvas.crop((left, top, left + S, top + S)) for left, top in corners]
    if tiling.thumbnail is None:
        return out
    whole = picture.resize((S, S), interpolation)
    return [whole, *out] if tiling.thumbnail == "first" else [*out, whole]


def _canvas(picture: PIL.Image.Image, tiling: Tiling, interpolation: Resampling, *, fill: Any) -> PIL.Image.Image:
    W, H = tiling.canvas
    if tiling.resize == "stretch":
        return picture.resize((W, H), interpolation)
    scale = min(W / picture.width, H / picture.height)
    # Rounded up, as LLaVA does, so that no side is lost altogether.
    inner = min(W, math.ceil(picture.width * scale)), min(H, math.ceil(picture.height * scale))
    canvas = PIL.Image.new("RGB", (W, H), fill)
    canvas.paste(picture.resize(inner, interpolation), ((W - inner[0]) // 2, (H - inner[1]) // 2))
    return canvas


def _check_size(size: Size) -> None:
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ConfigError(f"size {size} is not two positive whole numbers", remedy="Write it as (W, H).")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"{name} is {count}, not a positive whole number", remedy=f"Give {name}=1 or more.")
