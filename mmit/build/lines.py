"""Lines of text drawn by Pillow, to read: dates, prices, codes and names of colours in several fonts.

Needs no package but what mmit needs: the fonts are matplotlib's DejaVu, the names of colours its XKCD survey's (CC0).
A text is of the split "test" if its checksum divides by ten, so that no test text is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from zlib import crc32

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from mmit.build.package_data import package_file, png

if TYPE_CHECKING:
    from mmit.records import Image

ROWS = {"train": 5_000, "test": 500}
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono")
KINDS = ("date", "price", "code", "color")
MONTHS = "January February March April May June July August September October November December".split()
SIGNS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # without I, O, 0 and 1, which fonts draw alike
_MARGIN = 8  # pixels


def lines(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, fields). Fields: image, text, kind (date, price, code, color), characters (without spaces)."""
    from matplotlib.colors import XKCD_COLORS

    colours = sorted(name.removeprefix("xkcd:") for name in XKCD_COLORS if name.count(" ") <= 2)
    folder = package_file("matplotlib", "mpl-data/fonts/ttf", pip="matplotlib")
    fonts = {
        (name, size): PIL.ImageFont.truetype(str(folder / f"{name}.ttf"), size) for name in FONTS for size in _sizes()
    }
    for row in range(1, ROWS[split] + 1):
        rng = random.Random(f"lines|{split}|{row}")
        kind = rng.choice(KINDS)
        text = _written(kind, colours, rng)
        while (crc32(text.encode()) % 10 == 0) != (split == "test"):
            text = _written(kind, colours, rng)
        yield (
            row,
            {
                "image": _drawn(text, fonts[rng.choice(FONTS), rng.choice(_sizes())], rng),
                "id": f"text-lines/{split}/{row}",
                "text": text,
                "kind": kind,
                "characters": len(text.replace(" ", "")),
            },
        )


def _sizes() -> tuple[int, ...]:
    return (18, 22, 26)  # pixels


def _written(kind: str, colours: list[str], rng: random.Random) -> str:
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1900, 2099)}"
    if kind == "price":
        return f"{rng.choice('$€£')}{rng.randint(1, 9999)}.{rng.randint(0, 99):02}"
    if kind == "code":
        return "-".join("".join(rng.choices(SIGNS, k=4)) for _ in range(rng.choice((1, 2, 3))))
    return rng.choice(colours)


def _drawn(text: str, font: PIL.ImageFont.FreeTypeFont, rng: random.Random) -> Image:
    """Draw dark text on a light ground, or light on dark, in a box that it fits into."""
    left, top, right, bottom = (int(value) for value in font.getbbox(text))
    dark, light = (tuple(rng.randint(low, low + 70) for _ in range(3)) for low in (0, 185))
    ground, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    size = (right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN)
    picture = PIL.Image.new("RGB", size, ground)
    PIL.ImageDraw.Draw(picture).text((_MARGIN - left, _MARGIN - top), text, font=font, fill=ink)
    return png(picture)
