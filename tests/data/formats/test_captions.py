"""Caption files: MiniGPT-4's cc_sbu_align, COCO captions, samples of img2dataset shards."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS, detect_format, import_file
from mmit.data.formats.captions import ALIGN_INSTRUCTIONS
from mmit.errors import ConfigError, RecordError
from mmit.records import Image
from tests.data.formats.format_tools import bad_rows, imported, shape, texts, write

ALIGN = {"annotations": [{"image_id": str(n), "caption": f"Picture {n}."} for n in (2, 3, 5)]}


def test_minigpt4(tmp_path: Path) -> None:
    path = write(tmp_path / "cc_sbu_align" / "filter_cap.json", ALIGN)
    assert detect_format(path)[0] == "minigpt4"
    records = imported(path, "minigpt4")
    assert [r.images[0].source for r in records] == [str(path.parent / f"image/{n}.jpg") for n in (2, 3, 5)]
    assert [r.turns[1].text for r in records] == ["Picture 2.", "Picture 3.", "Picture 5."]
    assert all(r.turns[0].text in ALIGN_INSTRUCTIONS for r in records)
    assert [(r.id, r.row) for r in records] == [("2", 1), ("3", 2), ("5", 3)]


def test_instructions_are_drawn_by_seed_and_id(tmp_path: Path) -> None:
    rows = [{"image_id": str(n), "caption": "c"} for n in range(400)]
    path = write(tmp_path / "filter_cap.json", {"annotations": rows})
    drawn = [r.turns[0].text for r in import_file(path, "minigpt4")]
    assert drawn == [r.turns[0].text for r in import_file(path, "minigpt4")]
    assert drawn != [r.turns[0].text for r in import_file(path, "minigpt4", seed=1)]
    assert all(60 <= drawn.count(text) <= 140 for text in ALIGN_INSTRUCTIONS)
    # A row keeps its instruction when others come or go.
    write(path, {"annotations": rows[100:]})
    assert [r.turns[0].text for r in import_file(path, "minigpt4")] == drawn[100:]
    assert {r.turns[0].text for r in import_file(path, "minigpt4", instruction="Tell.")} == {"Tell."}
    with pytest.raises(ConfigError, match="option instruction"):
        list(import_file(path, "minigpt4", instruction=[1]))


def test_minigpt4_errors(tmp_path: Path) -> None:
    rows = [{"caption": "a"}, {"image_id": "1"}, {"image_id": "2", "caption": "ok"}, "x", {"image_id": [1]}]
    path = write(tmp_path / "filter_cap.json", {"annotations": rows})
    assert [e.where.rpartition(":")[2] for e in bad_rows(path, "minigpt4")] == ["1", "2", "4", "5"]
    with pytest.raises(ConfigError, match=r"(?s)image_pattern 'x/\{name\}'.*valid: image_id"):
        list(import_file(path, "minigpt4", image_pattern="x/{name}", on_bad=lambda error: None))
    with pytest.raises(RecordError, match="no 'annotations'"):
        list(import_file(write(tmp_path / "x.json", {"images": []}), "minigpt4"))


COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "license": 3},
        {"id": 25, "file_name": "COCO_train2014_000000000025.jpg", "license": 1},
    ],
    "annotations": [
        {"image_id": 9, "id": 661611, "caption": "Plates of food. "},
        {"image_id": 25, "id": 2, "caption": "A giraffe.\n"},
        {"image_id": 9, "id": 661977, "caption": "A meal"},
    ],
}


def test_coco_captions(tmp_path: Path) -> None:
    path = write(tmp_path / "captions_train2014.json", COCO)
    name, reason = detect_format(path)
    assert name == "coco_captions" and "'images.file_name'" in reason
    records = imported(path, "coco_captions", image_root="train2014")
    assert [texts(r)[1] for r in records] == [["Plates of food."], ["A giraffe."], ["A meal"]]
    assert texts(records[0])[0] == ["[train2014/COCO_train2014_000000000009.jpg]"]
    assert [(r.id, r.meta["image_id"]) for r in records] == [("661611", 9), ("2", 25), ("661977", 9)]
    asked = imported(path, "coco_captions", instruction=["Describe."], image_pattern="sub/{file_name}")
    assert texts(asked[1])[0] == [f"[{tmp_path}/sub/COCO_train2014_000000000025.jpg]", "Describe."]


def test_coco_captions_errors(tmp_path: Path) -> None:
    extra = {**COCO, "annotations": [{"image_id": 7, "id": 1, "caption": "a"}, {"image_id": 9, "id": 2}, None]}
    bad = bad_rows(write(tmp_path / "c.json", extra), "coco_captions")
    assert [e.problem for e in bad][0] == "'images' has no entry for image_id 7"
    assert len(bad) == 3 and bad[1].where == f"{tmp_path / 'c.json'}:2 (2)"
    with pytest.raises(RecordError, match="list of objects with 'id'"):
        list(import_file(write(tmp_path / "d.json", {**COCO, "images": 3}), "coco_captions"))


def sample(**more: Any) -> dict[str, Any]:
    facts = {"url": "http://x.org/a.jpg", "key": "000000001", "status": "success", "width": 4, "caption": "A cat"}
    row = {"__key__": "000000001", "jpg": b"jpeg", "txt": b"A cat\n", "json": json.dumps(facts).encode()}
    return {**row, **more}


def test_img2dataset_samples() -> None:
    record = FORMATS["img2dataset"](sample())
    record.validate()
    assert shape(record) == [("user", ["[b'jpeg']"]), ("assistant", ["A cat"])]
    assert record.id == "000000001" and record.meta == {"url": "http://x.org/a.jpg", "width": 4}
    from_json = FORMATS["img2dataset"](sample(txt=None) | {"txt": "Ein Hund"}, instruction="What?")
    assert shape(from_json) == [("user", ["[b'jpeg']", "What?"]), ("assistant", ["Ein Hund"])]
    bare = {"__key__": "1", "png": base64.b64encode(b"png").decode(), "json": {"caption": "C"}}
    assert FORMATS["img2dataset"](bare).images == (Image(b"png"),)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (sample(json=b'{"status": "failed_to_download"}'), "ended as 'failed_to_download'"),
        (sample(jpg=None), "0 pictures"),
        (sample(png=b"x"), "2 pictures: jpg, png"),
        (sample(txt=b"\xff"), "txt is not UTF-8"),
        (sample(json=b"{"), "json is not JSON"),
        (sample(json=b"[]"), "json is '\\[\\]', not an object"),
        ({"__key__": "1", "jpg": b"x"}, "the caption is 'None'"),
        ({"__key__": 1, "jpg": b"x", "txt": "a"}, "__key__ is '1'"),
    ],
)
def test_img2dataset_refusals(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        FORMATS["img2dataset"](row)


def test_a_tar_is_told_and_sent_to_the_index() -> None:
    assert detect_format("00000.tar")[0] == "img2dataset"
    with pytest.raises(ConfigError, match="mmit data index"):
        list(import_file("00000.tar", "img2dataset"))
