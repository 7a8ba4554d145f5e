"""Forms drawn by Pillow, to look values up in: a heading and three to five lines "name: value".

Needs no package but what mmit needs. A form is of the split "test" if the checksum of its values divides by ten, so
that no test form is trained on; single values may stand in both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from zlib import crc32

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from mmit.build.lines import MONTHS, SIGNS
from mmit.build.package_data import package_file, png

if TYPE_CHECKING:
    from mmit.records import Image

ROWS = {"train": 3_000, "test": 300}
TITLES = ("Invoice", "Order", "Receipt", "Delivery note", "Booking")
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
_SIZE = 20  # pixels, of the text
_LINE, _MARGIN = 30, 12
_GIVEN = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Klara Leo Maria Noah Olga Paul Rosa Simon Victor".split()
)
_FAMILY = (
    "Adams Baker Brown Clark Cohen Evans Fischer Garcia Hill Jones Kim Lopez Meyer Moore Novak Patel Smith".split()
)
_TOWNS = (
    "Berlin Boston Cairo Delhi Dublin Geneva Kyoto Lagos Lima London Lyon Madrid Milan Oslo Paris Prague Rome".split()
)

# What a line of a form is called, and how its value is drawn.
FIELDS: dict[str, Callable[[random.Random], str]] = {
    "Name": lambda rng: f"{rng.choice(_GIVEN)} {rng.choice(_FAMILY)}",
    "Town": lambda rng: rng.choice(_TOWNS),
    "Date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1990, 2029)}",
    "Total": lambda rng: f"${rng.randint(1, 999)}.{rng.randint(0, 99):02}",
    "Number": lambda rng: "".join(rng.choices(SIGNS, k=5)),
    "Items": lambda rng: str(rng.randint(1, 60)),
}


def forms(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, fields). Fields: image, title, names and values (lists, in the order of the lines), number."""
    folder = package_file("matplotlib", "mpl-data/fonts/ttf", pip="matplotlib")
    fonts = [PIL.ImageFont.truetype(str(folder / f"{name}.ttf"), _SIZE) for name in FONTS]
    for row in range(1, ROWS[split] + 1):
        rng = random.Random(f"forms|{split}|{row}")
        while True:
            names = rng.sample(list(FIELDS), rng.randint(3, 5))
            values = [FIELDS[name](rng) for name in names]
            if (crc32("|".join(values).encode()) % 10 == 0) == (split == "test"):
                break
        title = rng.choice(TITLES)
        yield (
            row,
            {
                "image": _drawn(
                    title, [f"{name}: {value}" for name, value in zip(names, values, strict=True)], rng.choice(fonts)
                ),
                "id": f"text-forms/{split}/{row}",
                "title": title,
                "names": names,
                "values": values,
                "number": len(names),
            },
        )


def _drawn(title: str, lines: list[str], font: PIL.ImageFont.FreeTypeFont) -> Image:
    """Draw black text on white, the heading underlined."""
    width = round(max(font.getlength(text) for text in (title, *lines))) + 2 * _MARGIN
    canvas = PIL.Image.new("RGB", (width, (len(lines) + 1) * _LINE + 2 * _MARGIN), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for at, text in enumerate((title, *lines)):
        draw.text((_MARGIN, _MARGIN + at * _LINE), text, font=font, fill="black")
    draw.line((_MARGIN, _MARGIN + _LINE - 4, width - _MARGIN, _MARGIN + _LINE - 4), fill="black")
    return png(canvas)
