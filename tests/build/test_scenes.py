"""Scenes of rows and records: boxes as shares of the image, and the reason where a row is none."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.build.annotated import Dropped
from mmit.build.scenes import MISSING, Box, Scene, scenes_of_records, scenes_of_rows
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, write_jsonl


def picture(width: int = 20, height: int = 10) -> Image:
    buffer = BytesIO()
    PIL.Image.new("RGB", (width, height)).save(buffer, "PNG")
    return Image(buffer.getvalue())


def scene(row: Any, *, facts: tuple[str, ...] = (), **fields: Any) -> Scene | Dropped:
    (found,) = scenes_of_rows([(7, row)], fields, source="rows", licence="MIT", facts=facts)
    return found


def test_boxes_in_pixels_and_in_shares_become_shares() -> None:
    boxes = [{"category": "cat", "bbox": [2, 1, 12, 6]}, {"label": "dog", "box": [0.1, 0.2, 0.3, 1]}]
    found = scene({"image": picture(), "captions": " two \n animals ", "instances": boxes, "id": 3})
    assert isinstance(found, Scene)
    assert found.boxes == (Box("cat", (0.1, 0.1, 0.6, 0.6)), Box("dog", (0.1, 0.2, 0.3, 1.0)))
    assert (found.captions, found.id, found.row, found.licence) == (("two animals",), "3", 7, "MIT")


def test_one_box_of_a_row_gets_its_name_from_the_fields_that_are_named() -> None:
    row = {"picture": picture(), "where": [0, 0, 1, 1], "colour": "red", "shape": "circle", "licence": "CC0-1.0"}
    found = scene(row, facts=("colour",), image="picture", box="where", category=["colour", "shape"])
    assert isinstance(found, Scene)
    assert found.boxes == (Box("red circle", (0, 0, 1, 1)),) and found.facts == {"colour": "red"}
    assert found.licence == "CC0-1.0"  # the row's own goes first


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg", "captions": ["a"]}, "the row has no image"),
        ({"image": Image("none.jpg"), "captions": ["a"]}, MISSING),
        ({"image": picture(), "captions": ["a", 3]}, "a caption is no text"),
        ({"image": picture()}, "neither captions nor boxes"),
        ({"image": picture(), "instances": [{"bbox": [0, 0, 1, 1]}]}, "a box is not {category, bbox"),
        ({"image": picture(), "instances": [{"category": "a", "bbox": [0, 0, True, 1]}]}, "a box is not {category"),
        ({"image": picture(), "instances": [{"category": "a", "bbox": [5, 5, 25, 9]}]}, "a box lies outside the image"),
        ({"image": picture(), "instances": [{"category": "a", "bbox": [5, 5, 5, 9]}]}, "a box lies outside the image"),
    ],
)
def test_a_row_that_is_no_scene_has_one_reason(row: Any, reason: str) -> None:
    found = scene(row)
    assert isinstance(found, Dropped) and found.reason.startswith(reason) and found.row == "rows:7"


def test_rows_that_cannot_be_read_are_passed_over_and_a_missing_field_is_not() -> None:
    bad = [(1, RecordError("not JSON")), (2, {"image": picture(), "captions": "a"})]
    first, second = scenes_of_rows(bad, {}, source="rows", licence=None)
    assert isinstance(first, Dropped) and first.reason == "the row cannot be read" and isinstance(second, Scene)
    with pytest.raises(ConfigError, match="the rows have no field 'caption'") as error:
        scene({"image": picture(), "captions": "a"}, captions="caption")
    assert "did you mean 'captions'" in error.value.remedy


def test_records_give_the_same_from_any_of_the_known_keys(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture().source)  # type: ignore[arg-type]
    box = [0.0, 0.0, 0.5, 0.5]
    metas: list[dict[str, Any]] = [
        {"boxes": [{"category": "cat", "bbox": box}]},
        {"instances": [{"name": "cat", "bbox": box}]},
        {"objects": {"ref": ["cat"], "bbox": [box]}},
        {"objects": [{"ref": "cat", "bbox": box}]},
    ]
    write_jsonl(
        [Record.triple("q", "a", images=[str(tmp_path / "a.png")], meta=meta) for meta in metas], tmp_path / "r.jsonl"
    )
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write("{}\n")
    *found, broken = scenes_of_records(str(tmp_path / "r.jsonl"))
    assert [isinstance(one, Scene) and one.boxes for one in found] == [(Box("cat", (0, 0, 0.5, 0.5)),)] * 4
    assert isinstance(broken, Dropped) and broken.reason == "the row cannot be read"
