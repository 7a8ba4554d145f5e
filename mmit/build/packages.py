"""Annotated sets that come with a Python package, as rows of fields.

`easy-vqa-attributes`: each image of the package easy-vqa with what its pixels say: colour, shape, box, place and size.
The images hold one shape in one of eight colours on a plain ground, so all of it can be measured; where the package's
own questions name a colour or a shape, the measurement must agree, or the row is refused.
`easy-vqa-composites` and `easy-vqa-pairs` put these together (`mmit.build.composites`), `mnist-5k` and `mnist-5k-pairs`
are handwritten digits (`mmit.build.digits`), `vega-charts` and `vega-tables` small tables drawn and written
(`mmit.build.tables`), `text-lines` lines of text to read (`mmit.build.lines`), `text-forms` forms to look values up in
(`mmit.build.forms`), `solar-cells` photographs of solar cells with and without defects (`mmit.build.solar_cells`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image

from mmit.build.composites import composites, pairs
from mmit.build.digits import digit_pairs, digits
from mmit.build.forms import forms
from mmit.build.lines import lines
from mmit.build.solar_cells import cells
from mmit.build.tables import charts, tables
from mmit.data.formats.boxes import spelt
from mmit.data.formats.easyvqa import COLOURS, SHAPES, SPLITS, read_pictures
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image

# The package draws with these values of the names' CSS colours.
_RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
_STANDS_OUT = 40  # levels of 255 by which the shape differs from the ground in some channel
# Share of its box that a shape fills: a triangle about 1/2, a circle pi/4, a rectangle all of it.
_FILL = (("triangle", 0.70), ("circle", 0.93), ("rectangle", 1.01))
_LARGE = 23  # pixels; half of the package's shapes are larger

Rows = Iterator[tuple[int, dict[str, Any]]]


def easy_vqa_attributes(split: str) -> Rows:
    """Yield (row, fields) for every image of "train" or "test".

    Fields: image, colour, shape, box ([left, top, right, bottom] in pixels), place (the box as the build's key `boxes`
    reads it), column (left, right), row (top, bottom), size (small, large).

    Raises:
        ConfigError: no such split. RecordError: the package is missing, or an image contradicts its questions.
    """
    for picture in read_pictures(split, None):
        fields = measured(np.asarray(PIL.Image.open(picture.path).convert("RGB")), where=picture.path)
        told = {answer for _, answer in picture.pairs} & (COLOURS | SHAPES)
        if not told <= {fields["colour"], fields["shape"]}:
            shown = f"a {fields['colour']} {fields['shape']}"
            problem = f"the image shows {shown}, its answers say {', '.join(sorted(told))}"
            raise RecordError(problem, where=picture.path, remedy="Install the package again: pip install easy-vqa")
        yield picture.row, {"image": Image(picture.path), "id": f"easy-vqa/{split}/{picture.number}", **fields}


def measured(pixels: np.ndarray, *, where: str) -> dict[str, Any]:
    """Return what an image (H, W, 3) of one plain shape on a plain ground shows. Raises RecordError if it is none."""
    values = pixels.astype(int)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    inside = (np.abs(values - np.median(border, 0)) > _STANDS_OUT).any(2)
    rows, columns = np.nonzero(inside)
    if not len(rows):
        raise RecordError("the image shows no shape", where=where, remedy="Leave it out.")
    left, top, right, bottom = (int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    colour = np.median(values[inside], 0)
    fill = inside.sum() / ((right - left) * (bottom - top))
    height, width = inside.shape
    return {
        "colour": min(_RGB, key=lambda name: float(np.abs(colour - _RGB[name]).sum())),
        "shape": next(name for name, most in _FILL if fill < most),
        "box": [left, top, right, bottom],
        "place": spelt((left / width, top / height, right / width, bottom / height)),
        "column": "left" if left + right < width else "right",
        "row": "top" if top + bottom < height else "bottom",
        "size": "large" if max(right - left, bottom - top) >= _LARGE else "small",
    }


# name -> (split -> rows, licence of the data). MNIST's terms are those its authors gave; the tables are public domain,
# in a package under MIT; the fonts under the drawn lines allow what is drawn with them.
PACKAGES: dict[str, tuple[Callable[[str], Rows], str]] = {
    "easy-vqa-attributes": (easy_vqa_attributes, "MIT"),
    "easy-vqa-composites": (lambda split: composites(easy_vqa_attributes(split), split), "MIT"),
    "easy-vqa-pairs": (lambda split: pairs(easy_vqa_attributes(split), split), "MIT"),
    "mnist-5k": (digits, "BSD-3-Clause AND CC-BY-SA-3.0"),
    "mnist-5k-pairs": (digit_pairs, "BSD-3-Clause AND CC-BY-SA-3.0"),
    "vega-tables": (tables, "MIT"),
    "vega-charts": (charts, "MIT"),
    "text-lines": (lines, "CC0-1.0"),
    "text-forms": (forms, "CC0-1.0"),
    "solar-cells": (cells, "CC-BY-NC-SA-4.0"),
}


def package_rows(name: str, split: str) -> tuple[Rows, str]:
    """Return the rows of a set that comes with a package, and its licence. Raises ConfigError."""
    if name not in PACKAGES:
        raise ConfigError(f"no such set '{name}'", where="rows.package", remedy=nearest(name, list(PACKAGES)))
    if split not in SPLITS:
        raise ConfigError(f"no such split '{split}'", where="rows.split", remedy=nearest(split, SPLITS))
    make, licence = PACKAGES[name]
    return make(split), licence
