"""easy-VQA's images put together: composites to count in, and pairs to compare.

Takes the measured images of one split. Every image is in one composite and in one pair at most, so that no two rows
share an image. Which images meet is decided by the split and their order alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import PIL.Image

from mmit.build.package_data import png

if TYPE_CHECKING:
    from mmit.records import Image

WAITING = 60  # images that a pair's second one is looked for among; one of 24 has a given colour and shape


def composites(images: Iterator[tuple[int, dict[str, Any]]], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, fields) of grids of two to four images.

    Fields: image, shapes and colours (lists in reading order), number, described ("a red circle and a teal triangle").
    """
    rng = random.Random(f"composites|{split}")
    row = 0
    while True:
        count = rng.choice((2, 3, 4))
        group = [fields for _, fields in (next(images, (0, {})) for _ in range(count)) if fields]
        if len(group) < count:
            return
        row += 1
        pictures = [PIL.Image.open(str(fields["image"].source)).convert("RGB") for fields in group]
        yield (
            row,
            {
                "image": png(_grid(pictures)),
                "id": f"easy-vqa-composites/{split}/{row}",
                "shapes": [fields["shape"] for fields in group],
                "colours": [fields["colour"] for fields in group],
                "number": count,
                "described": _listed([f"a {fields['colour']} {fields['shape']}" for fields in group]),
            },
        )


def _grid(pictures: list[PIL.Image.Image]) -> PIL.Image.Image:
    """Two and three side by side, four in two rows."""
    columns = 2 if len(pictures) == 4 else len(pictures)
    width, height = pictures[0].size
    canvas = PIL.Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for at, picture in enumerate(pictures):
        canvas.paste(picture, (at % columns * width, at // columns * height))
    return canvas


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def pairs(images: Iterator[tuple[int, dict[str, Any]]], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, fields) of two images each; half of the pairs share the shape, half the colour, independently.

    Fields: images, shapes, colours (lists of two), same_shape and same_colour (yes, no).
    """
    rng = random.Random(f"pairs|{split}")
    waiting: list[dict[str, Any]] = []
    row = 0
    while True:
        waiting += [fields for _, fields in (next(images, (0, {})) for _ in range(WAITING - len(waiting))) if fields]
        if len(waiting) < 2:
            return
        first = waiting.pop(0)
        wanted = (rng.random() < 0.5, rng.random() < 0.5)
        # Towards the end no image may suit; any other one is a pair as well.
        at = next((i for i, second in enumerate(waiting) if _same(first, second) == wanted), 0)
        second = waiting.pop(at)
        same_shape, same_colour = _same(first, second)
        row += 1
        both: list[Image] = [first["image"], second["image"]]
        yield (
            row,
            {
                "images": both,
                "id": f"easy-vqa-pairs/{split}/{row}",
                "shapes": [first["shape"], second["shape"]],
                "colours": [first["colour"], second["colour"]],
                "same_shape": "yes" if same_shape else "no",
                "same_colour": "yes" if same_colour else "no",
            },
        )


def _same(first: dict[str, Any], second: dict[str, Any]) -> tuple[bool, bool]:
    return first["shape"] == second["shape"], first["colour"] == second["colour"]
