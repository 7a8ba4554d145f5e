"""Places of pictures: every marker keeps its place; foreign markers, parts and URLs are read as pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS, detect_format
from mmit.errors import RecordError
from tests.data.formats.format_tools import shape, talk, write


def row(text: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}], **keys}


def user(row: dict[str, Any], format: str = "messages") -> list[str]:
    record = FORMATS[format](row)
    record.validate()
    return next(parts for role, parts in shape(record) if role == "user")


@pytest.mark.parametrize("images", [["a.png"], ["a.png", "b.png"]])
def test_one_image_keeps_its_place_as_several_do(images: list[str]) -> None:
    text = "What is this?<image>\n Tell me. " + "<image>" * (len(images) - 1)
    wanted = ["What is this?", "[a.png]", "\n Tell me. ", "[b.png]"][: 2 + len(images)]
    assert user(row(text, images=images)) == wanted
    assert user(talk(text, "x", images=images), "sharegpt") == wanted
    assert user({"instruction": text, "output": "x", "images": images}, "alpaca") == wanted
    assert user({"query": text, "response": "x", "images": images}, "query_response") == wanted


def test_llavas_rule_is_that_of_its_formats() -> None:
    said = talk("What is this?<image>\n Tell me. ", "x", image="a.png")
    assert user(said, "llava") == user(said, "allava") == ["[a.png]", "What is this?\n Tell me."]


def test_one_image_without_a_marker_opens_the_first_user_turn() -> None:
    assert user(row(" What? ", images=["a.png"])) == ["[a.png]", " What? "]


@pytest.mark.parametrize(
    ("marker", "second"),
    [
        ("<ImageHere>", "<Img><ImageHere></Img>"),
        ("<image_placeholder>", "<image_placeholder>"),
        ("<|vision_start|><|image_pad|><|image_pad|><|vision_end|>", "<|image_pad|>"),
        ("<|image|>", "<|image|>"),
        ("<start_of_image>", "<start_of_image>"),
        ("<|image_1|>", "<|image_2|>"),
        ("<image_1>", "<image 2>"),
    ],
)
def test_markers_of_other_families(marker: str, second: str) -> None:
    text = f"One {marker} two {second}?"
    assert user(row(text, images=["a.png", "b.png"])) == ["One ", "[a.png]", " two ", "[b.png]", "?"]
    assert user(row(text)) == [text]  # for the linter to report
    with pytest.raises(RecordError, match=r"\d <.* but the row 1 images|the numbers"):
        user(row(text, images=["a.png"]))


def test_numbered_markers_name_their_picture() -> None:
    text = "Second <|image_2|> first <|image_1|>"
    assert user(row(text, images=["a.png", "b.png"])) == ["Second ", "[b.png]", " first ", "[a.png]"]
    with pytest.raises(RecordError, match="the markers have the numbers"):
        user(row("<|image_1|><|image_3|>", images=["a.png", "b.png"]))


def test_qwen_vl_writes_paths_into_the_text(tmp_path: Path) -> None:
    turns = [
        {"from": "user", "value": "Picture 1: <img>a.png</img>\nPicture 2: <img>p/b.png</img>\nSame?"},
        {"from": "assistant", "value": "No."},
    ]
    path = write(tmp_path / "qwen.json", [{"id": "1", "conversations": turns}])
    assert detect_format(path)[0] == "qwen_vl"
    wanted = ["Picture 1: ", "[a.png]", "\nPicture 2: ", "[p/b.png]", "\nSame?"]
    assert user({"conversations": turns}, "qwen_vl") == wanted
    with pytest.raises(RecordError, match="URL"):
        user({"conversations": [{"from": "user", "value": "<img>https://x.org/a.png</img>"}, turns[1]]}, "qwen_vl")


def test_image_parts_of_transformers() -> None:
    data = base64.b64encode(b"png").decode()
    for key in ("image", "url", "path"):
        assert user(row([{"type": "image", key: "a.png"}, {"type": "text", "text": "q"}])) == ["[a.png]", "q"]
        assert user(row([{"type": "image", key: "file:///p/a%20b.png"}])) == ["[/p/a b.png]"]
        assert user(row([{"type": "image", key: f"data:image/png;base64,{data}"}])) == ["[b'png']"]
    assert user(row([{"type": "image", "base64": data}])) == ["[b'png']"]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    assert user(row([{"type": "image", "source": source}])) == ["[b'png']"]
    assert user(row("<image>q", images=[f"data:image/png;base64,{data}"])) == ["[b'png']", "q"]


@pytest.mark.parametrize(
    ("row", "cause", "remedy"),
    [
        # A part that names a picture never takes another one.
        (row([{"type": "image", "url": "b.png"}], images=["a.png"]), "1 of 1 images have no place", "Give each"),
        (row([{"type": "image", "url": "a.png", "path": "b.png"}]), "holds 2 pictures: url, path", "Keep one"),
        (row([{"type": "image", "url": "https://x.org/a.png"}]), "is a URL", "Download"),
        (row([{"type": "image"}]), "an image part without a picture", "Put the picture"),
        (row([{"type": "image", "base64": "%%"}]), "is not base64", "base64"),
        (row([{"type": "video", "video": "a.mp4"}]), "part of type 'video'", "text and pictures"),
    ],
)
def test_parts_that_are_refused(row: dict[str, Any], cause: str, remedy: str) -> None:
    with pytest.raises(RecordError) as caught:
        user(row)
    assert cause in caught.value.problem and remedy in caught.value.remedy


def test_a_picture_may_be_named_by_its_part_and_beside() -> None:
    assert user(row([{"type": "image", "url": "a.png"}], images=["a.png"])) == ["[a.png]"]


def test_images_in_answers_and_results() -> None:
    turns = [
        {"role": "user", "content": "Draw."},
        {"role": "assistant", "content": "Here: <image>"},
        {"role": "tool", "content": "<image> done"},
        {"role": "assistant", "content": "ok"},
    ]
    record = FORMATS["messages"]({"messages": turns, "images": ["a.png", "b.png"]})
    record.validate()
    assert shape(record)[1:3] == [("assistant", ["Here: ", "[a.png]"]), ("tool", ["[b.png]", " done"])]
