"""Members of a sample by name: which picture the row names, which text is the caption, what is left out."""

from __future__ import annotations

import json
from base64 import b64encode
from io import BytesIO
from typing import Any

import PIL.Image
import pytest

from mmit.data.shards.records import is_ignored, to_record
from mmit.errors import RecordError


def png(red: int) -> bytes:
    out = BytesIO()
    PIL.Image.new("RGB", (4, 4), (red, 0, 0)).save(out, "PNG")
    return out.getvalue()


A, B = png(1), png(2)


def talk(text: str, **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}], **keys}


def read(row: dict[str, Any], key: str = "s1", **members: bytes):
    files = {name.replace("__", "."): data for name, data in members.items()}
    return to_record(key, {**files, "json": json.dumps(row).encode()}, where="t.tar: s1")


@pytest.mark.parametrize(
    "names",
    [["b.png", "a.png"], ["s1.b.png", "s1.a.png"], ["coco/s1.b.png", "coco/s1.a.png"], ["x/b.png", "y/a.png"]],
    ids=["suffix", "path", "base name of the member", "base name of the suffix"],
)
def test_pictures_are_those_that_the_row_names(names: list[str]) -> None:
    row = talk("first <image> second <image>", image=names)
    assert [i.source for i in read(row, a__png=A, b__png=B).images] == [B, A]
    parts = [{"type": "image", "url": name} for name in names]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    assert [i.source for i in read(chat, a__png=A, b__png=B).images] == [B, A]


def test_a_whole_name_goes_before_a_base_name() -> None:
    """Member png of the key a/k is a/k.png, and its member k.png is a/k.k.png."""
    members = {"png": A, "k__png": B}
    for names in (["a/k.png", "a/k.k.png"], ["a/k.png", "k.png"]):
        row = talk("<image> and <image>", image=names)
        assert [i.source for i in read(row, key="a/k", **members).images] == [A, B]
    with pytest.raises(RecordError, match="'k.png', which is no member"):  # of the key k it may be either
        read(talk("<image> and <image>", image=["k.png", "k.k.png"]), key="k", **members)


def test_paths_of_windows_and_pictures_that_are_shown_twice() -> None:
    row = talk("<image> and <image>", image=["x\\b.png", "y\\a.png"])
    assert [i.source for i in read(row, a__png=A, b__png=B).images] == [B, A]
    for names in (["s1.png"] * 2, ["coco/7.jpg"] * 2):
        assert [i.source for i in read(talk("<image> and <image>", image=names), png=A).images] == [A, A]


@pytest.mark.parametrize("part", ["image", "url", "path", "image_url"])
def test_parts_name_their_pictures_by_any_key(part: str) -> None:
    parts: list[dict[str, Any]] = []
    for name in ("b.png", "a.png"):
        parts.append(
            {"type": "image_url", "image_url": {"url": name}} if part == "image_url" else {"type": "image", part: name}
        )
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    assert [i.source for i in read(chat, a__png=A, b__png=B).images] == [B, A]


@pytest.mark.parametrize("row", [talk("<image> and <image>"), talk("<image> and <image>", image=None)])
def test_order_decides_only_where_the_row_names_nothing(row: dict) -> None:
    assert [i.source for i in read(row, **{"10__png": B, "2__png": A}).images] == [A, B]


def test_the_one_picture_of_a_key_may_have_another_name() -> None:
    """LLaVA's rows keep the path that the picture had before it went into the tar."""
    row = talk("<image>What?", image="coco/train2017/7.jpg")
    assert read(row, key="00017", png=A).images[0].source == A
    assert read(row, key="00017", **{"0__png": A}).images[0].source == A


@pytest.mark.parametrize(
    ("row", "members", "cause"),
    [
        (talk("<image><image>", image=["a.png", "c.png"]), {"a__png": A, "b__png": B}, "'c.png', which is no member"),
        (talk("<image>", image="b.png"), {"a__png": A}, "'b.png', which is no member"),
        (talk("<image>", image="a.png"), {"a__png": A, "b__png": B}, "b.png is named by no image"),
        (talk("<image><image>", image=["p/1.jpg", "p/2.jpg"]), {"a__png": A, "b__png": B}, "'p/1.jpg', which is no"),
        (talk("<image><image>", image=["p/1.jpg", "p/2.jpg"]), {"png": A}, "'p/1.jpg', which is no member"),
        (talk("<image>", image="p/1.jpg"), {"0__png": A, "1__png": B}, "'p/1.jpg', which is no member"),
    ],
)
def test_a_partial_match_is_refused(row: dict, members: dict, cause: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(row, **members)
    assert cause in caught.value.problem and caught.value.where == "t.tar: s1" and caught.value.remedy


def test_only_txt_is_the_caption() -> None:
    members = {"png": A, "ocr.txt": b"OCR TEXT", "json": json.dumps({"caption": "a cat"}).encode()}
    with pytest.raises(RecordError, match="'ocr.txt' is neither the row nor the caption") as caught:
        to_record("0", members, where="t.tar: 0")
    assert "--ignore ocr.txt" in caught.value.remedy
    with pytest.raises(RecordError, match="'extra.json' is neither"):
        to_record("0", {"png": A, "txt": b"a cat", "extra.json": b"{}"}, where="t.tar: 0")
    assert to_record("0", {"png": A, "txt": b"a cat"}, where="t.tar: 0").turns[1].text == "a cat"


def test_ignore_takes_extensions_and_suffixes() -> None:
    assert is_ignored("a/0.seg.png", ["seg.png"]) == "seg.png" and not is_ignored("a/0.png", ["seg.png"])
    assert is_ignored("0.seg.png", ["png"]) == is_ignored("0.PNG", ["png"]) == "png"
    assert not is_ignored("0.x.seg.png", ["seg.png"])


@pytest.mark.parametrize("speakers", [("user", "assistant"), ("human", "gpt"), ("human", "chatgpt")])
def test_rows_are_read_as_the_importers_read_them(speakers: tuple[str, str]) -> None:
    turns = [{"from": speakers[0], "value": "<image>q"}, {"from": speakers[1], "value": "a"}]
    row = {"conversations": turns, "image": "x.png", "system": "Be brief.", "weight": 0.5}
    record = read(row, key="x", png=A)
    assert [t.role for t in record.turns] == ["system", "user", "assistant"] and record.weight == 0.5
    with pytest.raises(RecordError, match="'video' is a video"):
        read({**row, "video": "a.mp4"}, key="x", png=A)


GROUNDED = {
    "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "At <bbox>."}],
    "objects": {"bbox": [[1, 1, 2, 4]], "bbox_type": "real"},
}


def test_boxes_in_pixels_take_the_size_of_the_member() -> None:
    members = {"json": json.dumps(GROUNDED).encode(), "png": A}
    with pytest.raises(RecordError, match="nothing says how to write them") as caught:
        to_record("s1", members, where="t.tar: s1")
    assert caught.value.where == "t.tar: s1" and "mmit data index" in caught.value.remedy
    record = to_record("s1", members, where="t.tar: s1", options={"boxes": "norm1000"})
    assert record.turns[1].text == "At [250, 250, 500, 1000]." and record.images[0].source == A
    # An outline has no bytes, but sizes.
    unread = to_record("s1", members | {"png": b"name"}, where="", options={"boxes": "norm1000"}, sizes={"png": (8, 4)})
    assert unread.turns[1].text == "At [125, 250, 250, 1000]."


def test_keys_of_an_interleaved_document_have_their_meaning() -> None:
    info = [{"image_base64": b64encode(A).decode(), "matched_text_index": 0}]
    row = {"text_list": ["a cat"], "image_info": info}
    assert to_record("s1", {"json": json.dumps(row | {"weight": 0.5}).encode()}, where="").weight == 0.5
    with pytest.raises(RecordError, match="'videos' is a video") as caught:
        to_record("s1", {"json": json.dumps(row | {"videos": ["v.mp4"]}).encode()}, where="t.tar: s1")
    assert caught.value.where == "t.tar: s1"
