"""What harnesses hand over becomes what mmit asks; nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest

from mmit.errors import ConfigError, RecordError
from mmit.eval.harness.requests import Generation, conversation, generation, pack_chat, question, unpack_chat
from mmit.records import Image, Text

PICTURE = PIL.Image.new("RGB", (4, 4), "red")


def how(**settings: Any) -> Generation:
    return generation(settings, max_new_tokens=7)


def test_settings_as_the_tasks_of_lmms_eval_write_them() -> None:
    pope = how(max_new_tokens=128, temperature=0, top_p=0, num_beams=1, do_sample=False, until=["\n\n"])
    assert pope == Generation(("\n\n",), 128)  # top_p 0 says nothing where nothing is drawn
    assert how(until=None) == how(until=[]) == how(until=["", None]) == Generation((), 7)
    assert how(until="ASSISTANT:", image_aspect_ratio="pad") == Generation(
        ("ASSISTANT:",), 7, ignored=("image_aspect_ratio",)
    )


def test_settings_of_lm_eval_and_sampling() -> None:
    assert how(max_gen_toks=5, until=["a", "b"], do_sample=False, temperature=0.7) == Generation(("a", "b"), 5)
    assert how(do_sample=True) == Generation((), 7, 1.0)
    assert how(temperature="0.5", top_p=0.9, top_k=3) == Generation((), 7, 0.5, 0.9, 3)
    with pytest.raises(ConfigError, match="beam"):
        how(num_beams=5)
    with pytest.raises(ConfigError, match=r"temperature.*'hot'"):
        how(temperature="hot")


def test_contexts_show_their_pictures_first() -> None:
    record = question("What?", [PICTURE, PICTURE], name="task 3")
    assert [type(part) for part in record.turns[0].parts] == [Image, Image, Text]
    assert "task 3" in record.where and question("What?", None, name="t").turns[0].parts == (Text("What?"),)
    with pytest.raises(RecordError, match="task 3.*a str where a picture"):
        question("What?", ["film.mp4"], name="task 3")


def test_messages_keep_the_place_of_pictures() -> None:
    parts = [{"type": "text", "text": "Is "}, {"type": "image", "url": PICTURE}, {"type": "text", "text": " red?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    turns = conversation(messages, name="t").turns
    assert [turn.role for turn in turns] == ["system", "user"]
    assert turns[1].parts == (Text("Is "), Image(PICTURE), Text(" red?"))
    path = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]
    assert conversation(path, name="t").images == (Image("a.png"),)
    with pytest.raises(RecordError, match="a part of type 'video'"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], name="t")
    with pytest.raises(RecordError, match="by 'tool'"):
        conversation([{"role": "tool", "content": "x"}], name="t")


def test_turns_travel_as_text() -> None:
    messages = [
        {"role": "user", "content": "1 + 1 = ü?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": '"}]'},
    ]
    record = unpack_chat(pack_chat(messages), name="t")
    assert record is not None and [turn.text for turn in record.turns] == [m["content"] for m in messages]
    assert unpack_chat("Question: 1 + 1?", name="t") is None
