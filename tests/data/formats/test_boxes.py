"""Boxes and points: written into the text where it says so, in stated units, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.data.formats import FORMATS, format_options, import_file
from mmit.data.lint.linter import lint
from mmit.data.sources import open_source
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text, write_jsonl
from tests.data.formats.format_tools import talk, write


@pytest.fixture(scope="module", autouse=True)
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    PIL.Image.new("RGB", (200, 100)).save(folder / "wide.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright: 40 wide, 80 high
    PIL.Image.new("RGB", (80, 40)).save(folder / "turned.jpg", exif=exif)
    return folder


def swift(objects: Any, ask: str = "<image>Where is <ref-object>?", answer: str = "<bbox>", **keys: Any) -> dict:
    """A row of ms-swift's grounding layout."""
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": ["wide.png"], "objects": objects, **keys}


def table(**keys: Any) -> dict[str, Any]:
    """A row of columns, as tables of referring expressions have them."""
    return {"instruction": "What is at <bbox>?", "output": "a cat", "image": "wide.png", **keys}


def said(row: dict, format: str, folder: Path, **options: Any) -> list[str]:
    record = FORMATS[format](row, image_root=str(folder), **options)
    record.validate()
    return [turn.text for turn in record.turns]


def test_objects_beside_messages(pictures: Path) -> None:
    row = swift({"ref": ["the cat"], "bbox": [[20, 10, 100, 50]]})
    assert said(row, "messages", pictures, boxes="norm1000") == ["Where is the cat?", "[100, 100, 500, 500]"]
    assert said(row, "messages", pictures, boxes="norm1") == ["Where is the cat?", "[0.100, 0.100, 0.500, 0.500]"]
    shares = swift({"ref": ["the cat"], "bbox": [[0.1, 0.25, 0.5, 1]], "bbox_type": "norm1"})
    assert said(shares, "messages", pictures, boxes="norm1000")[1] == "[100, 250, 500, 1000]"
    several = swift(
        {"ref": ["a", "b"], "bbox": [[0, 0, 40, 40], [20, 80]], "image_id": [1, 0]},
        "<image><image><ref-object> and <ref-object>?",
        "At <bbox>, and <bbox>.",
        images=["wide.png", "turned.jpg"],
    )
    texts = said(several, "messages", pictures, boxes="norm1000")
    assert texts == ["a and b?", "At [0, 0, 1000, 500], and [100, 800]."]
    record = FORMATS["messages"](row, image_root=str(pictures), boxes="norm1")
    assert "objects" not in record.meta and record.turns[0].parts[0] == Image(f"{pictures}/wide.png")


@pytest.mark.parametrize("key", ["bbox", "bboxes", "boxes", "box", "points", "point"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_column(key: str, as_text: bool, pictures: Path, tmp_path: Path) -> None:
    box: Any = [50, 50] if "point" in key else [50, 50, 100, 100]
    wanted = "[250, 500]" if "point" in key else "[250, 500, 500, 1000]"
    for value in (box, [box]):
        row = table(**{key: str(value) if as_text else value})
        asked = said(row, "json", pictures, boxes="norm1000", boxes_in="pixels")[0]
        assert asked == f"What is at {wanted}?"
    path = write(tmp_path / "a.json", [row])
    options = {"boxes": "norm1000", "boxes_in": "pixels"}
    assert next(iter(import_file(path, "json", image_root=pictures, **options))).turns[0].text == asked


def test_thoughts_and_weighted_spans_keep_their_places(pictures: Path) -> None:
    detail = [
        {"begin_offset": 0, "end_offset": 7, "train": False},
        {"begin_offset": 8, "end_offset": 14, "train": True},
    ]
    turns = talk("<image>q", "so long <bbox>!")["conversations"]
    turns[1] |= {"train_detail": detail, "reasoning_content": "Near <bbox>."}
    row = {"conversations": turns, "image": "wide.png", "bbox": [[0, 0], [200, 100]]}
    record = FORMATS["sharegpt"](row, image_root=str(pictures), boxes="norm1000", boxes_in="pixels")
    assert record.turns[1].thinking == "Near [0, 0]."
    assert record.turns[1].parts == (Text("so long ", 0.0), Text("[1000, 1000]!", 1.0))


def test_objects_as_a_list_of_objects_say_the_same(pictures: Path) -> None:
    ask, answer = "<image><image>Where is <ref-object>? And <ref-object>?", "<bbox> and <bbox>"
    boxes = [[20, 10, 100, 50], [4, 8, 40, 80]]
    lists = {"ref": ["the cat", "the dog"], "bbox": boxes, "bbox_type": "real", "image_id": [0, 1]}
    each = [
        {"caption": name, "bbox": box, "bbox_type": "real", "image": n}
        for n, (name, box) in enumerate(zip(lists["ref"], boxes, strict=True))
    ]
    two = {"images": ["wide.png", "turned.jpg"]}
    expected = said(swift(lists, ask, answer, **two), "messages", pictures, boxes="norm1000")
    assert expected[1] == "[100, 100, 500, 500] and [100, 100, 1000, 1000]"
    for objects in (each, json.dumps(each)):  # ms-swift keeps it as text too
        assert said(swift(objects, ask, answer, **two), "messages", pictures, boxes="norm1000") == expected
    thousand = [{"caption": "it", "bbox": [100, 200, 300, 400], "bbox_type": "norm_1000"}]
    assert said(swift(thousand), "messages", pictures, boxes="norm1")[1] == "[0.100, 0.200, 0.300, 0.400]"


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (swift({"bbox": [[1, 2, 3, 4]]}, "<image>q"), {}, "'objects' holds 1 box, and nothing says how to write them"),
    (swift({"bbox": [[1, 2, 3, 4]] * 2}, "<image>q", "a"), {"boxes": "norm1"}, "'objects' holds 2 boxes, and the text"),
    (swift({"bbox": [[1, 2, 3, 4]] * 2}, "<image>q"), {"boxes": "norm1"}, "the text has 1 <bbox>, and 'objects' 2"),
    (swift({"bbox": [[1, 2, 3, 4]]}), {"boxes": "norm1"}, "the text has 1 <ref-object>, and 'objects' 0"),
    (swift({"ref": [3], "bbox": [[1, 2, 3, 4]]}), {"boxes": "norm1"}, "ref of 'objects' holds '3', not text"),
    (swift({"ref": ["a"], "bbox": [[1, 2, 3, 4]], "bbox_type": "abs"}), {"boxes": "norm1"}, "bbox_type of 'objects'"),
    (
        swift({"ref": ["a"], "bbox": [[1, 2, 3, 4]], "bbox_type": "real"}),
        {"boxes": "norm1", "boxes_in": "norm1"},
        "is 'real', and the option boxes_in norm1",
    ),
    (swift([{"bbox": [1, 2, 3, 4]}]), {"boxes": "norm1"}, "the text has 1 <ref-object>, and 'objects' 0"),
    (swift([{"bbox": [1, 2, 3, 4]}, {"caption": "a"}]), {"boxes": "norm1"}, "{'caption': 'a'}', which has no bbox"),
    (
        swift([{"bbox": [1, 2, 3, 4], "bbox_type": kind} for kind in ("real", "norm_1")]),
        {"boxes": "norm1"},
        "'objects' holds boxes of several types: ['real', 'norm_1']",
    ),
    (swift({"ref": ["a"], "bbox": [[1, 2, 3]]}), {"boxes": "norm1"}, "'[1, 2, 3]', which is no box"),
    (swift({"ref": ["a"], "bbox": [[30, 2, 3, 4]]}), {"boxes": "norm1"}, "second corner lies left"),
    (
        swift({"ref": ["a"], "bbox": [[3, 20, 30, 4]]}),
        {"boxes": "norm1"},
        "second corner lies left of the first or above",
    ),
    (swift({"ref": ["a"], "bbox": [[-1, 2, 3, 4]]}), {"boxes": "norm1"}, "[-1.0, 2.0, 3.0, 4.0], which lies outside"),
    (swift({"ref": ["a"], "bbox": [[1, 2, 300, 4]]}), {"boxes": "norm1"}, "outside a picture of 200 x 100 pixels"),
    (swift({"ref": ["a"], "bbox": [[0.1, 0.2, 0.3, 0.4]]}), {"boxes": "norm1"}, "which are shares and no pixels"),
    (
        swift({"ref": ["a"], "bbox": [[1, 2, 3, 4]]}, "<image><image><ref-object>", images=["wide.png"] * 2),
        {"boxes": "norm1"},
        "does not say in which of the row's 2 pictures",
    ),
    (table(bbox=[1, 2, 3, 4]), {"boxes": "norm1"}, "nothing says what the numbers of 'bbox' are"),
    (table(bbox="left"), {"boxes": "norm1"}, "'bbox' holds 'left', which is no box"),
    (table(bbox=[1, 2, 3, 4], points=[[1, 2]]), {"boxes": "norm1"}, "boxes stand in bbox and points"),
    (table(bbox=[1, 2, 3, 1200]), {"boxes": "norm1", "boxes_in": "norm1000"}, "outside 0 to 1000"),
    (table(bbox=[1, 2, 3, 4]), {}, "'bbox' holds 1 box, and nothing says how to write them"),
]


@pytest.mark.parametrize(("row", "options", "cause"), REFUSED, ids=[cause for *_, cause in REFUSED])
def test_boxes_that_cannot_be_expressed(row: dict, options: dict, cause: str, pictures: Path) -> None:
    with pytest.raises(RecordError) as caught:
        said(row, "messages" if "messages" in row else "json", pictures, **options)
    assert cause in caught.value.problem and caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [("objects", [{"label": "a cat", "bbox_2d": [0, 0, 100, 50]}]), ("points", [{"x": 100, "y": 50}])],
)
def test_boxes_and_points_under_other_names(key: str, value: Any, pictures: Path) -> None:
    """None is parked in the meta: either it has a place, or the row is refused."""
    row = swift({}, "<image>What is at <bbox>?", "it") | {key: value}
    if key == "objects":
        row["messages"][1]["content"] = "<ref-object>"
    options = {"boxes": "norm1000"} | ({"boxes_in": "pixels"} if key == "points" else {})
    wanted = ["What is at [0, 0, 500, 500]?", "a cat"] if key == "objects" else ["What is at [500, 500]?", "it"]
    assert said(row, "messages", pictures, **options) == wanted
    row["messages"][0]["content"] = "<image>What?"
    with pytest.raises(RecordError, match=f"'{key}' holds 1 box, and the text no <bbox>"):
        said(row, "messages", pictures, **options)


def test_what_is_no_box_stays_in_the_meta(pictures: Path) -> None:
    for key, value in (("points", 5), ("objects", ["a", "b"]), ("boxes", [1, 2, 3]), ("bbox", []), ("box", "red")):
        record = FORMATS["json"](table(**{key: value}), image_root=str(pictures))
        assert record.meta[key] == value and record.turns[0].text == "What is at <bbox>?"


def test_a_mark_without_a_box_is_an_error_of_the_linter() -> None:
    for asked, answer in (("What is at <bbox>?", "a cat"), ("Where is <ref-object>?", "here")):
        report = lint([Record.triple(asked, answer)])
        assert list(report.findings) == ["box-marker"] and report.count("error") == 1


def test_options(pictures: Path) -> None:
    assert {"boxes", "boxes_in"} <= format_options("llava").keys() and "boxes" not in format_options("mmit")
    row = swift({"ref": ["a"], "bbox": [[1, 2, 3, 4]]})
    for options, cause in (({"boxes": "pixels"}, "'pixels'"), ({"boxes": "norm"}, "norm"), ({"boxes_in": "cm"}, "cm")):
        with pytest.raises(ConfigError, match=cause) as caught:
            said(row, "messages", pictures, **options)
        assert "norm1" in caught.value.remedy


def test_the_meta_of_mmits_own_rows_is_left_alone(tmp_path: Path) -> None:
    """A check and a run must see the same records."""
    record = Record.triple("q", "a", meta={"bbox": [1, 2, 3, 4], "system": "S", "video": "a.mp4", "weight": 0.5})
    write_jsonl([record], tmp_path / "a.jsonl")
    for read in (next(iter(import_file(tmp_path / "a.jsonl", "mmit"))), open_source(tmp_path / "a.jsonl")[0]):
        assert read.turns == record.turns and read.meta == record.meta and read.weight == 1


def qwen(asked: str, answer: str = "yes") -> dict[str, Any]:
    """A row of Qwen-VL's layout."""
    turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]
    return {"conversations": turns}


@pytest.mark.parametrize(
    ("boxes", "wanted"),
    [
        ("norm1000", "Is the cat[100, 200, 300, 400] big?"),
        ("norm1", "Is the cat[0.100, 0.200, 0.300, 0.400] big?"),
        ("qwen_vl", "Is <ref>the cat</ref><box>(100,200),(300,400)</box> big?"),
        ("internvl", "Is <ref>the cat</ref><box>[[100, 200, 300, 400]]</box> big?"),
        (
            "qwen2_vl",
            "Is <|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|> big?",
        ),
    ],
)
def test_boxes_in_the_text_of_every_family(boxes: str, wanted: str, pictures: Path) -> None:
    for name in ("qwen_vl", "internvl", "qwen2_vl"):
        row = swift({"ref": ["the cat"], "bbox": [[20, 20, 60, 40]]}, "<image>Is <ref-object><bbox> big?", "yes")
        asked = said(row, "messages", pictures, boxes=name)[0]
        assert said(qwen(asked), "qwen_vl", pictures, boxes=boxes)[0] == wanted
    record = FORMATS["sharegpt"](qwen("q", "At <box>(5, 6)</box>."), boxes=boxes)
    assert sum(part.token for part in record.turns[1].parts if isinstance(part, Text)) == (0 if "norm" in boxes else 2)


def test_several_boxes_of_one_name_and_thoughts(pictures: Path) -> None:
    row = qwen("<ref>cats</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>")
    assert said(row, "qwen_vl", pictures, boxes="norm1000")[0] == "cats[1, 2, 3, 4][5, 6, 7, 8]"
    row["conversations"][1]["reasoning_content"] = "<box>(9,9)</box>"
    assert FORMATS["qwen_vl"](row, boxes="norm1000").turns[1].thinking == "[9, 9]"
    with pytest.raises(RecordError, match="a thought has a box"):
        FORMATS["qwen_vl"](row, boxes="qwen_vl")


def test_boxes_in_the_text_are_refused_where_the_format_has_them(pictures: Path) -> None:
    row = qwen("Is <box>(1,2),(3,4)</box> big?")
    with pytest.raises(RecordError, match="the text has the box .*, and nothing says how to write it") as caught:
        said(row, "qwen_vl", pictures)
    assert "qwen2_vl" in caught.value.remedy
    assert said(row, "sharegpt", pictures)[0] == "Is <box>(1,2),(3,4)</box> big?"  # letters, as the linter says
    with pytest.raises(RecordError, match="boxes stand in the text and in 'bbox'"):
        said({**row, "bbox": [1, 2, 3, 4]}, "qwen_vl", pictures, boxes="norm1")
