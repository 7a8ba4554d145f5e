"""Composites and pairs: every image once, and fields that say what is shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest

from mmit.build.composites import _grid, composites, pairs
from mmit.records import Image

SHAPES, COLOURS = ("circle", "square", "triangle"), {"red": (200, 0, 0), "blue": (0, 0, 200)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict[str, Any]]]:
    """Sixty images of one colour each, in files of their own."""
    folder, made = tmp_path_factory.mktemp("images"), []
    for n in range(60):
        colour = ("red", "blue")[n % 2]
        file = folder / f"{n}.png"
        PIL.Image.new("RGB", (2, 2), COLOURS[colour]).save(file)
        made.append((n, {"image": Image(str(file)), "shape": SHAPES[n % 3], "colour": colour}))
    return made


def given(images: list[Any]) -> Iterator[Any]:
    return iter(images)


def test_a_composite_shows_what_its_fields_say(images: list[Any]) -> None:
    found = [fields for _, fields in composites(given(images), "train")]
    assert {fields["number"] for fields in found} == {2, 3, 4} and sum(fields["number"] for fields in found) <= 60
    shown = [shape for fields in found for shape in fields["shapes"]]
    assert shown == [SHAPES[n % 3] for n in range(len(shown))]  # each image once, in order
    first = found[0]
    named = [f"a {c} {s}" for c, s in zip(first["colours"], first["shapes"], strict=True)]
    assert first["described"] == f"{', '.join(named[:-1])} and {named[-1]}"
    assert [f["number"] for f in found] != [f["number"] for _, f in composites(given(images), "test")]


def test_two_and_three_stand_side_by_side_and_four_in_two_rows() -> None:
    colours = [(10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0)]
    pictures = [PIL.Image.new("RGB", (2, 3), colour) for colour in colours]
    assert [_grid(pictures[:count]).size for count in (2, 3, 4)] == [(4, 3), (6, 3), (4, 6)]
    four = _grid(pictures)
    corners = [four.getpixel(at) for at in ((0, 0), (3, 0), (0, 5), (3, 5))]
    assert corners == colours


def test_pairs_say_whether_they_are_alike_and_half_of_them_are(images: list[Any]) -> None:
    many = [(n, {**fields, "image": Image(f"{n}.png")}) for n, (_, fields) in enumerate(images * 10)]
    found = [fields for _, fields in pairs(given(many), "train")]
    used = [image.source for fields in found for image in fields["images"]]
    assert len(used) == len(set(used)) == 2 * len(found) == 600  # no image in two pairs, and none left over
    for key in ("shape", "colour"):
        same = [fields[f"same_{key}"] for fields in found]
        alike = ["yes" if len(set(fields[f"{key}s"])) == 1 else "no" for fields in found]
        assert same == alike and 0.4 < same.count("yes") / len(same) < 0.6
