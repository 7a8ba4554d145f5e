"""Conversations as callers write them become records, or are refused with what they are."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.data.messages import check_records, history_turns, turns_of
from mmit.data.prompts import ask, ask_messages
from mmit.errors import ConfigError, MmitError, RecordError
from mmit.records import Image, Record, Text

PICTURE = PIL.Image.new("RGB", (4, 3), (10, 200, 30))


def encoded() -> bytes:
    out = io.BytesIO()
    PICTURE.save(out, "PNG")
    return out.getvalue()


DATA_URL = "data:image/png;base64," + base64.b64encode(encoded()).decode()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": PICTURE}, PICTURE),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "image": Path("a.png")}, "a.png"),
        ({"type": "image", "image": DATA_URL}, encoded()),
        ({"type": "image", "image": encoded()}, encoded()),
        ({"type": "image", "url": "file:///pictures/b%20c.png"}, "/pictures/b c.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "base64": base64.b64encode(encoded()).decode()}, encoded()),
        ({"type": "image_url", "image_url": {"url": DATA_URL}}, encoded()),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
    ],
)
def test_every_form_of_a_picture_is_taken(part: dict[str, Any], source: Any) -> None:
    record = ask_messages([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    assert [image.source for image in record.images] == [source]
    assert record.turns[0].parts[1] == Text("What?")


def test_messages_and_pairs_say_the_same() -> None:
    hello = [{"type": "text", "text": "Hello"}]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": hello}]
    assert history_turns(messages) == history_turns([("Hi", "Hello")]) == history_turns([["Hi", "Hello"]])
    assert ask(None, "x", history=messages) == ask(None, "x", history=[("Hi", "Hello")])
    assert ask_messages([*messages, {"role": "user", "content": "x"}]) == ask(None, "x", history=messages)
    # Pictures go with the first question of pairs, as ever, and with the new one after messages, which have their own.
    assert ask("a.png", "x", history=[("Hi", "Hello")]).turns[0].parts[0] == Image("a.png")
    assert ask("a.png", "x", history=messages).turns[2].parts[0] == Image("a.png")
    system = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "x"}]
    assert ask_messages(system) == ask(None, "x", system="Be short.")


@pytest.mark.parametrize(
    ("history", "told"),
    [
        (["ab"], "entry 1 of history is ab"),
        ("ab", "history is a str"),
        ({"role": "user", "content": "Hi"}, "history is a dict"),
        ([("a", "b", "c")], "not two texts"),
        ([("a", 3)], "not two texts"),
        ([("a", "b"), 7], "entry 2 of history"),
        ([{"role": "user", "content": "Hi"}, ("a", "b")], "message 2 is a tuple"),
        ([{"role": "user", "content": "Hi"}], "there is no answer"),
        ([{"content": "Hi"}], "role"),
        ([{"role": "user"}], "content of message 1 is a NoneType"),
        (3, "history is a int"),
    ],
)
def test_a_history_of_another_shape_is_refused(history: Any, told: str) -> None:
    with pytest.raises(MmitError, match=told):
        ask(None, "x", history=history)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("Hi", "messages is a str"),
        ({"role": "user", "content": "Hi"}, "messages is a dict"),
        (["Hi"], "message 1 is a str"),
        ([{"role": "tool", "content": "3"}], "Tools are not supported"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "has a part"),
        ([{"role": "user", "content": [{"type": "image"}]}], "holds 0 pictures"),
        ([{"role": "user", "content": [{"type": "image", "image": "https://x.org/a.png"}]}], "is a URL"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url of message 1"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "has a part"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the last turn is the assistant's"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "alternate"),
        ([], "no user turn"),
    ],
)
def test_messages_that_cannot_be_asked_are_refused(messages: Any, told: str) -> None:
    with pytest.raises(MmitError, match=told):
        ask_messages(messages)


@pytest.mark.parametrize("images", [3, [3], [None], {"a": 1}, [["a.png"]], [{"role": "user", "content": "Hi"}]])
def test_what_is_no_picture_is_refused(images: Any) -> None:
    with pytest.raises(ConfigError, match="image"):
        ask(images, "x")


@pytest.mark.parametrize("text", [None, 3, ["x"], b"x"])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="text is a"):
        ask(None, text)


@pytest.mark.parametrize("records", ["hi", ["hi"], Record.triple("a", "b"), [{"role": "user", "content": "Hi"}], None])
def test_what_is_no_list_of_records_is_refused(records: Any) -> None:
    with pytest.raises(ConfigError, match="record"):
        check_records(records)


def test_a_message_is_named_by_its_number() -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RecordError, match="message 3"):
        turns_of([*good, {"role": "user", "content": 5}])
