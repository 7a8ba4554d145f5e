"""Conversation formats: LLaVA, ShareGPT, Alpaca with images, OpenAI messages, and every trap as a named error."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS, detect_format, import_file
from mmit.errors import RecordError
from mmit.records import Image, Record, Text
from tests.data.formats.format_tools import ask, imported, shape, talk, texts, url, write


def llava(*values: str, **keys: Any) -> Record:
    record = FORMATS["llava"](talk(*values, **keys), image_root="root")
    record.validate()
    return record


def test_llava_files(tmp_path: Path) -> None:
    rows = [
        {
            "id": "004539375",
            "image": "00453/004539375.jpg",
            "conversations": [
                {"from": "human", "value": "Render a summary of the photo.\n<image>"},
                {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress"},
            ],
        },
        talk("<image>\nWhere?", "Here.", "Why?", "So.", id="000000033471", image="coco/train2017/000000033471.jpg"),
        # mix665k: text-only rows have no image, some begin with the assistant, and name their model
        talk("a", "b", id="wgByO4Y_0", model=""),
    ]
    rows[2]["conversations"].insert(0, {"from": "gpt", "value": "1"})
    path = write(tmp_path / "llava_v1_5_mix665k.json", rows)
    name, reason = detect_format(path)
    assert name == "llava" and "'image'" in reason
    records = imported(path, "llava", image_root="images")
    assert [len(r.images) for r in records] == [1, 1, 0] and len(records[1].turns) == 4
    assert texts(records[0])[0] == ["[images/00453/004539375.jpg]", "Render a summary of the photo."]
    assert records[2].meta == {"model": "", "dropped_leading_turn": "1"}


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>", "  What? <image> ", "<image>What?"])
def test_llava_single_image_moves_to_the_front(text: str) -> None:
    assert shape(llava(text, "A cat.", image="a.png")) == [
        ("user", ["[root/a.png]", "What?"]),
        ("assistant", ["A cat."]),
    ]


def test_llava_image_in_a_later_turn_stays_in_that_turn() -> None:
    record = llava("Hello ", "Hi.", "What? <image>", "A cat.", image="a.png")
    assert shape(record)[0] == ("user", ["Hello "])
    assert shape(record)[2] == ("user", ["[root/a.png]", "What?"])


def test_llava_image_alone() -> None:
    assert shape(llava("<image>", "A cat.", image="a.png"))[0] == ("user", ["[root/a.png]"])


def test_llava_several_images_keep_their_places() -> None:
    record = llava("<image>\n<image>\nSame? Or <image>", "No.", image=["a.png", "b.png", "c.png"])
    parts = ["[root/a.png]", "\n", "[root/b.png]", "\nSame? Or ", "[root/c.png]"]
    assert shape(record)[0] == ("user", parts)


def test_llava_images_over_several_turns() -> None:
    record = llava("One: <image>.", "Yes.", "Two: <image>.", "No.", image=["a.png", "b.png"])
    assert shape(record)[0][1] == ["One: ", "[root/a.png]", "."]
    assert shape(record)[2][1] == ["Two: ", "[root/b.png]", "."]


@pytest.mark.parametrize("image", ["a.png", ["a.png"]])
def test_llava_no_marker_and_one_image(image: Any) -> None:
    record = llava("What?", "A cat.", "Sure?", "Yes.", image=image)
    assert [parts for _, parts in shape(record)] == [
        ["[root/a.png]", "What?"],
        ["A cat."],
        ["Sure?"],
        ["Yes."],
    ]


def test_llava_text_only() -> None:
    assert shape(llava("Hi", "Hello")) == [("user", ["Hi"]), ("assistant", ["Hello"])]
    for none in ([], None):
        assert shape(llava("What is <image>?", "A <image> tag", image=none))[0][1] == ["What is <image>?"]


def test_llava_system_ids_and_other_keys() -> None:
    row = talk("Hi", "Hello", model="m", extra={"a": 1})
    row["id"] = 7
    row["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    row["conversations"][1]["tag"] = "t"
    record = FORMATS["llava"](row, image_root="")
    assert shape(record)[0] == ("system", ["Be kind."]) and record.id == "7"
    assert record.meta == {"model": "m", "extra": {"a": 1}, "turn_keys": [{}, {"tag": "t"}, {}]}


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("name", ["llava", "sharegpt"])
def test_a_leading_assistant_turn_is_dropped_and_kept_in_meta(name: str, system: bool) -> None:
    row = talk("Hi", "Hello")
    row["conversations"].insert(0, {"from": "gpt", "value": "Continued"})
    if system:
        row["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    record = FORMATS[name](row, image_root="")
    record.validate()
    assert [role for role, _ in shape(record)] == ["system"] * system + ["user", "assistant"]
    assert record.meta["dropped_leading_turn"] == "Continued"


def test_llava_absolute_paths_stay() -> None:
    assert llava("Hi", "Ho", image="/pics/a.png").images == (Image("/pics/a.png"),)


LLAVA_TRAPS: list[tuple[dict[str, Any], str]] = [
    (talk("<image>\nWhat?", "x"), "has <image> but the row has no 'image'"),
    (talk("What?", "See <image>", image="a.png"), "turn 2 (assistant) has <image>"),
    (talk("<image><image>", "x", image="a.png"), "the text has 2 <image> but the row 1 images"),
    (talk("<image> a", "x", image=["a", "b"]), "the text has 1 <image> but the row 2 images"),
    (talk("a", "x", image=["a", "b"]), "the text has 0 <image> but the row 2 images"),
    (talk("a", "x", image=""), "an image without a file"),
    (talk("a", "x", image=3), "an image without a file: its source is '3'"),
    (talk("a", "x", image="http://x.org/a.png"), "a URL"),
    (talk("a", "x", image="a", images=["b"]), "both 'image' and 'images'"),
    (talk("a", ""), "turn 2 (assistant) is empty"),
    ({"conversations": []}, "'conversations' is not a list of objects, or is empty"),
    ({"conversation": []}, "'conversations' is not a list of objects"),
    ({"conversations": ["a"]}, "'conversations' is not a list of objects"),
    ({"conversations": [{"from": "humn", "value": "a"}]}, "turn 1 is said by 'humn'"),
    ({"conversations": [{"from": "human", "value": None}]}, "value of turn 1 is 'None', not text"),
    ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 2 is the user's where the assistant's"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "no user turn"),
    (talk("a", "x", video="race.mp4"), "'video' is a video"),
    ([1], "found a list, not an object"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("row", "cause"), LLAVA_TRAPS)
@pytest.mark.parametrize("lines", [True, False])
def test_llava_traps_name_file_row_cause_and_remedy(tmp_path: Path, row: Any, cause: str, lines: bool) -> None:
    good = talk("Hi", "Ho", image="a.png")
    path = tmp_path / "d.json"
    rows = [good, row, good]
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    with pytest.raises(RecordError) as caught:
        list(import_file(path, "llava"))
    name = " (x1)" if isinstance(row, dict) and "id" in row else ""
    assert caught.value.where == f"{path}:2{name}"
    assert cause in caught.value.problem and caught.value.remedy

    bad: list[RecordError] = []
    kept = list(import_file(path, "llava", on_bad=bad.append))
    assert [record.row for record in kept] == [1, 3] and len(bad) == 1
    assert str(bad[0]) == str(caught.value)


@pytest.mark.parametrize(
    ("row", "user", "answer"),
    [
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, "Add.\n\n1+1", "2"),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.", "La"),
        ({"instruction": "Say <image>", "output": "<image>"}, "Say <image>", "<image>"),
    ],
)
def test_alpaca(row: dict, user: str, answer: str) -> None:
    assert shape(FORMATS["alpaca"](row, image_root="")) == [("user", [user]), ("assistant", [answer])]


def test_alpaca_with_everything() -> None:
    row = {"instruction": "Go.", "output": "ok", "system": "S", "history": [["q", "a"]], "image": "a.png"}
    record = FORMATS["alpaca"]({**row, "topic": "t"}, image_root="r")
    record.validate()
    assert [parts for _, parts in shape(record)] == [["S"], ["[r/a.png]", "q"], ["a"], ["Go."], ["ok"]]
    assert record.meta == {"topic": "t"}
    for bad in ({"instruction": "a"}, {"output": "a"}, {**row, "history": [["q"]]}, {**row, "input": 3}):
        with pytest.raises(RecordError, match=r".+\n.+"):
            FORMATS["alpaca"](bad, image_root="")


def test_sharegpt() -> None:
    for human in ("human", "user"):
        for gpt in ("gpt", "assistant", "chatgpt"):
            turns = [{"from": human, "value": "q <image>"}, {"from": gpt, "value": "a"}]
            row = {"system": "S", "conversations": turns, "topic": "none"}
            record = FORMATS["sharegpt"](row, image_root="")
            assert shape(record) == [("system", ["S"]), ("user", ["q <image>"]), ("assistant", ["a"])]
            assert record.meta == {"topic": "none"}
            pictured = FORMATS["sharegpt"]({**row, "images": ["i.png"]}, image_root="r")
            assert shape(pictured)[1] == ("user", ["q ", "[r/i.png]"])
    with pytest.raises(RecordError, match="value of turn 1 is 'x', not a call"):
        FORMATS["sharegpt"]({"conversations": [{"from": "function_call", "value": "x"}]}, image_root="")


@pytest.mark.parametrize("images", [["a.png", "b.png"], [{"bytes": None, "path": f"{name}.png"} for name in "ab"]])
def test_messages_with_images_beside_them(images: list[Any]) -> None:
    """ms-swift and LLaMA-Factory mark the places in the text, TRL and parquet by parts without a picture."""
    answer = {"role": "assistant", "content": "yes"}
    marked = {"messages": [{"role": "user", "content": "<image>Same as <image>?"}, answer], "images": images}
    record = FORMATS["messages"](marked, image_root="r")
    assert record.turns[0].parts == (Image("r/a.png"), Text("Same as "), Image("r/b.png"), Text("?"))
    none = {"text": None, "image_url": None}
    parts = [{"type": "image", **none}, {"type": "text", "text": "<image>"}, {"type": "image", **none}]
    listed = {"messages": [{"role": "user", "content": parts}, answer], "images": images}
    record = FORMATS["messages"](listed, image_root="r")
    assert record.turns[0].parts == (Image("r/a.png"), Text("<image>"), Image("r/b.png"))
    own = {"messages": [{"role": "user", "content": [{"type": "image", "image": "c.png"}]}, answer]}
    assert FORMATS["messages"](own, image_root="r").images == (Image("r/c.png"),)
    alone = {"messages": [{"role": "user", "content": "What is <image>?"}, answer]}
    assert FORMATS["messages"](alone, image_root="r").turns[0].text == "What is <image>?"
    for wrong, cause in (
        ({**marked, "images": images[:1] * 3}, "2 <image> but the row 3 images"),
        ({**listed, "images": images * 2}, "2 of 4 images have no place"),
        ({**listed, "images": images[:1]}, "an image part without a picture"),
    ):
        with pytest.raises(RecordError, match=cause):
            FORMATS["messages"](wrong, image_root="r")


def test_messages() -> None:
    text = {"type": "text", "text": "What <image>?"}
    data = "data:image/png;base64," + base64.b64encode(b"png").decode()
    row = ask(text, url("a.png"), url("file:///p/b%20c.png"), url(data), {"type": "image_url", "image_url": "d.png"})
    row["messages"].insert(0, {"role": "developer", "content": "S"})
    row["messages"][1]["name"] = "Ann"
    record = FORMATS["messages"](row, image_root="r")
    record.validate()
    assert [image.source for image in record.images] == ["r/a.png", "/p/b c.png", b"png", "r/d.png"]
    assert shape(record)[0] == ("system", ["S"]) and shape(record)[1][1][0] == "What <image>?"
    assert record.meta == {"turn_keys": [{}, {"name": "Ann"}, {}]}
    assert shape(FORMATS["messages"]({"conversations": ask(text)["messages"]}, image_root=""))[1][0] == "assistant"


@pytest.mark.parametrize(
    ("row", "cause", "remedy"),
    [
        (ask(url("https://x.org/a.png")), "URL: 'https://x.org/a.png'", "Download"),
        (ask(url("data:image/png;base64,%%%")), "message 1 has a broken data: URL", "base64"),
        (ask(url("data:image/png,abc")), "message 1 has a broken data: URL", "base64"),
        (ask(url("file://host/a.png")), "of the host 'host'", "file:///"),
        (ask({"type": "input_audio"}), "part of type 'input_audio'", "image_url"),
        (ask("text"), "message 1 has a part of type 'None'", "image_url"),
        (ask({"type": "text"}), "text of message 1 is 'None'", "string"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "said by 'critic'", "valid: assistant, bard"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content of message 1 is 'None'", "string"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "tool_calls is '1'", "Write"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": -1}]}, "a negative weight", "unlearn"),
    ],
)
def test_messages_refusals(row: dict, cause: str, remedy: str) -> None:
    with pytest.raises(RecordError) as caught:
        FORMATS["messages"](row, image_root="")
    assert cause in caught.value.problem and remedy in caught.value.remedy
