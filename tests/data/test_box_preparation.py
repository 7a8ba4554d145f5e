"""A box in a text says where a thing is in the pixels that the vision tower gets, by every preparation that keeps the
whole picture; one that cuts refuses it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from mmit.data.formats.boxes import WAYS, with_boxes
from mmit.data.native import layout
from mmit.data.preparation import ImagePreparation
from mmit.eval.metrics.boxes import box_of, overlap
from mmit.records import Image, Record

S = 224
NATIVE = {"rule": "qwen", "patch": 14, "merge": 2, "min_pixels": 100 * 100, "max_pixels": 400 * 400}
Frame = tuple[float, float, float, float]  # where the picture lies in the pixels: left, top, width, height


def eye(mode: str, **more: object) -> ImagePreparation:
    tiles = {"pinpoints": [[2 * S, S], [S, 2 * S], [2 * S, 2 * S]]} if mode == "any_resolution" else {}
    given = {"size": (S, S), "tokens": 16, "grid": (4, 4), "tiles": tiles} | more
    return ImagePreparation(mode=mode, interpolation="bilinear", fill=(0, 0, 0), **given)


def seen(prepared: ImagePreparation, picture: PIL.Image.Image) -> list[tuple[np.ndarray, Frame]]:
    """What the tower gets as whole images (H, W, 3), the tiles put together, and where the picture lies in each."""
    pixels = prepared.pixels(Image(picture)).permute(0, 2, 3, 1).numpy()
    width, height = picture.size
    if prepared.mode == "native":
        laid = layout(picture.size, prepared.native, where="")
        return [(_joined(pixels, laid.grid), (0, 0, laid.scaled[1], laid.scaled[0]))]
    if not prepared.tiled:
        frame = (0.0, 0.0, float(S), float(S)) if prepared.mode == "resize" else _centred(width, height, S, S)
        return [(pixels[0], frame)]
    tiling = prepared.tiling(picture.size)
    whole = [] if tiling.thumbnail is None else [(pixels[0 if tiling.thumbnail == "first" else -1], (0.0, 0.0, S, S))]
    tiles = pixels[1:] if tiling.thumbnail == "first" else pixels[: tiling.crops - len(whole)]
    canvas = _joined(tiles, tiling.grid)
    across, down = tiling.canvas
    frame = (0.0, 0.0, across, down) if tiling.resize == "stretch" else _centred(width, height, across, down)
    return [*whole, (canvas, frame)]


def _joined(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows = [np.concatenate(list(pixels[row * grid[1] : (row + 1) * grid[1]]), 1) for row in range(grid[0])]
    return np.concatenate(rows, 0)


def _centred(width: int, height: int, across: int, down: int) -> Frame:
    scale = min(across / width, down / height)
    inner = (width * scale, height * scale)
    return ((across - inner[0]) / 2, (down - inner[1]) / 2, *inner)


def measured(image: np.ndarray, frame: Frame) -> tuple[float, float, float, float]:
    """The box of what is white, in shares of the picture; edges between pixels by how bright they are."""
    bright = image.astype(float).mean(2) / 255
    found = []
    for axis, (start, length) in ((0, (frame[0], frame[2])), (1, (frame[1], frame[3]))):
        line = bright.max(axis)
        line = np.where(line > 0.98, 1, np.where(line < 0.02, 0, line))
        centre, extent = (line * (np.arange(len(line)) + 0.5)).sum() / line.sum(), line.sum()
        found.append(((centre - extent / 2 - start) / length, (centre + extent / 2 - start) / length))
    return found[0][0], found[1][0], found[0][1], found[1][1]


EYES: dict[str, Callable[[], ImagePreparation]] = {
    "resize": lambda: eye("resize"),
    "pad": lambda: eye("pad"),
    "any_resolution": lambda: eye("any_resolution"),
    "dynamic": lambda: eye("dynamic"),
    "native": lambda: eye("native", size=(28, 28), tokens=1, grid=None, native=NATIVE),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EYES)
@pytest.mark.parametrize("size", [(640, 480), (300, 620), (1000, 250)])
def test_the_box_is_where_the_tower_sees_it(name: str, way: str, size: tuple[int, int]) -> None:
    width, height = size
    box = (width * 11 // 50, height * 13 // 50, width * 41 // 50, height * 39 // 50)
    picture = PIL.Image.new("RGB", size)
    picture.paste((255, 255, 255), box)
    record = Record.triple("Where is it?", "At <bbox>.", images=[Image(picture)])
    record.meta["objects"] = {"bbox": [list(box)], "bbox_type": "real"}
    written = box_of(with_boxes(record, boxes=way).turns[1].text)
    assert written is not None
    for image, frame in seen(EYES[name](), picture):
        assert overlap(written, measured(image, frame)) >= 0.99
