"""Keys with a meaning: read, or refused by name; over every importer; the rest is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS, import_file
from mmit.data.formats.keys import REFUSED, kept_keys, told
from mmit.errors import RecordError
from mmit.records import Image, Record, Text
from tests.data.formats.format_tools import talk, write


def chat(answer: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    last = {"role": "assistant", "content": "a b"} | (answer or {})
    return {"messages": [{"role": "user", "content": "q"}, last], **keys}


def read(row: dict[str, Any], format: str = "messages") -> Record:
    record = FORMATS[format](row)
    record.validate()
    return record


# The same row in the layout of several importers.
LAYOUTS: dict[str, dict[str, Any]] = {
    "messages": chat(),
    "sharegpt": talk("q", "a b"),
    "llava": talk("q", "a b"),
    "alpaca": {"instruction": "q", "output": "a b"},
    "inputs_targets": {"inputs": "q", "targets": "a b"},
    "query_response": {"query": "q", "response": "a b"},
    "json": {"instruction": "q", "output": "a b"},
}


@pytest.mark.parametrize("format", LAYOUTS)
def test_every_importer_reads_the_same_keys(format: str) -> None:
    row = LAYOUTS[format] | {"tools": '[{"name": "f"}]', "weight": 0.5, "enable_thinking": False}
    if format != "alpaca" and format != "json":
        row["system_prompt"] = "Be brief."
    else:
        row["system"] = "Be brief."
    record = read({**row, "reasoning": "Because."}, format)
    assert record.turns[0].role == "system" and record.turns[0].text == "Be brief."
    assert record.turns[-1].thinking == "Because." and record.turns[-1].text == "a b"
    assert record.tools == ({"name": "f"},) and record.weight == 0.5
    assert record.template_args == {"enable_thinking": False}
    assert not set(record.meta) & {"system_prompt", "system", "tools", "weight", "reasoning"}


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("key", sorted(REFUSED))
def test_every_importer_refuses_the_same_keys(format: str, key: str) -> None:
    row = LAYOUTS[format]
    for empty in (None, [], "", False):
        read({**row, key: empty}, format)
    with pytest.raises(RecordError) as caught:
        read({**row, key: ["x.y"]}, format)
    assert f"'{key}' is" in caught.value.problem and caught.value.remedy


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("mark", [{"label": False}, {"kto_tag": 0}, {"label": "undesirable"}, {"label": "False"}])
def test_a_mark_of_an_answer_is_its_label(format: str, mark: dict[str, Any]) -> None:
    (key,) = mark
    for value, label in ((mark[key], False), (True, True), ("Desirable", True)):
        record = read(LAYOUTS[format] | {key: value}, format)
        assert record.label is label and key not in record.meta
    record = read(LAYOUTS[format] | {"label": 3}, format)
    assert record.label is None and record.meta["label"] == 3


def test_weights_of_turns_are_judged_with_their_role() -> None:
    """A flag on a turn that is not learnt anyway says nothing new; on another it changes what is learnt."""
    for key, no, yes in (("train", False, True), ("weight", 0, 1), ("loss", False, True), ("loss_weight", 0.0, 1.0)):
        row = chat({key: yes})
        row["messages"][0][key] = no
        assert [turn.weight for turn in read(row).turns] == [0, 1]
        row = {"conversations": [{"from": "human", "value": "q", key: no}, {"from": "gpt", "value": "a", key: no}]}
        assert [turn.weight for turn in read(row, "sharegpt").turns] == [0, 0]
        row = chat()
        row["messages"][0][key] = yes
        assert [turn.weight for turn in read(row).turns] == [1, None]
    assert read(chat({"loss_weight": 0.25})).turns[1].weight == 0.25
    assert read(chat({"weight": None})).turns[1].weight is None


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ({"weight": -0.5}, "a negative weight: -0.5"),
        ({"weight": "0.5"}, "a weight of '0.5'"),
        ({"weight": 0, "train": True}, "has weight and train, which contradict each other"),
        ({"mask": 1}, "has 'mask': a loss mask that can be read in two ways"),
        ({"is_masked": True}, "has 'is_masked': a loss mask that can be read in two ways"),
        ({"no_loss": True}, "has 'no_loss': a loss mask that can be read in two ways"),
        ({"bbox": [1, 2, 3, 4]}, "has 'bbox', a box of its own"),
        ({"video": "a.mp4"}, "has 'video': a video"),
        ({"reasoning_content": 3}, "reasoning_content is '3', not text"),
        ({"tool_call_id": "c1"}, "has tool_call_id"),
        ({"label": False}, "has 'label' is False: a mark that the answer is bad"),
    ],
)
def test_keys_of_turns_that_cannot_be_expressed(answer: dict[str, Any], cause: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(chat(answer))
    assert cause in caught.value.problem and "turn 2 (assistant)" in caught.value.problem and caught.value.remedy


def test_spans_of_a_turn() -> None:
    """axolotl's train_detail: offsets of characters, the end inclusive."""
    detail = [
        {"begin_offset": 0, "end_offset": 5, "train": False},
        {"begin_offset": 6, "end_offset": 10, "train": True},
    ]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "WRONG right", "train_detail": detail}]
    record = read({"conversations": turns}, "sharegpt")
    assert record.turns[1].parts == (Text("WRONG ", 0.0), Text("right", 1.0))
    for wrong, cause in (
        (detail[:1], "says nothing about characters 6 to 10"),
        (detail[1:], "characters 0 on"),
        ([detail[0], detail[1] | {"end_offset": 11}], "but the text 11 characters"),
        ([detail[0], detail[1] | {"begin_offset": 5}], "characters 5 on"),
        ([{"begin_offset": 0}], "Each entry needs"),
    ):
        turns[1]["train_detail"] = wrong
        with pytest.raises(RecordError) as caught:
            read({"conversations": turns}, "sharegpt")
        assert cause in str(caught.value)


def test_thoughts_tools_and_results() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Oslo"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "reasoning_content": "I call it.", "tool_calls": [call]},
            {"role": "tool", "content": "4 degrees", "name": "w", "tool_call_id": "c1"},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Cold."}, {"type": "text", "text": "4."}],
            },
        ],
        "tools": [{"type": "function", "function": {"name": "w"}}],
    }
    record = read(row)
    assert [turn.role for turn in record.turns] == ["user", "assistant", "tool", "assistant"]
    assert record.turns[1].thinking == "I call it." and record.turns[1].tool_calls == (call,)
    assert (record.turns[2].name, record.turns[2].tool_call_id) == ("w", "c1")
    assert record.turns[3].thinking == "Cold." and record.turns[3].text == "4."
    assert record.tools == tuple(row["tools"]) and not record.meta


def test_calls_as_turns_of_their_own() -> None:
    """LLaMA-Factory and ms-swift: the call is what the speaker function_call, or tool_call, says."""
    one, two = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}'
    said = [("human", "q"), ("function_call", one), ("function_call", two), ("observation", "r"), ("gpt", "a")]
    turns = [{"from": speaker, "value": text} for speaker, text in said]
    record = read({"conversations": turns, "tools": "[]"}, "sharegpt")
    assert [turn.role for turn in record.turns] == ["user", "assistant", "tool", "assistant"]
    assert [call["function"]["name"] for call in record.turns[1].tool_calls] == ["f", "g"]
    swift = [
        ("user", "q"),
        ("assistant", "Let me see."),
        ("tool_call", one),
        ("tool_response", "r"),
        ("assistant", "a"),
    ]
    record = read({"messages": [{"role": role, "content": text} for role, text in swift]})
    assert record.turns[1].text == "Let me see." and record.turns[1].tool_calls[0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (chat(system="a") | {"messages": [{"role": "system", "content": "b"}, *chat()["messages"]]}, "another text"),
        (chat(tools="none"), "'tools' is 'none', not a list of tools"),
        (chat(weight=-1), "'weight' has a negative weight"),
        (chat({"reasoning": "x"}, reasoning="y"), "'reasoning' stands beside a row with 1 answers"),
        (chat(score=float("nan")), "'score' is nan, which JSON cannot keep"),
        (chat(deep={"x": [float("inf")]}), "'deep' is {'x': [inf]}, which JSON cannot keep"),
    ],
)
def test_rows_that_cannot_be_expressed(row: dict[str, Any], cause: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(row)
    assert cause in caught.value.problem and caught.value.remedy


def test_an_empty_system_turn_is_kept() -> None:
    """It suppresses the text that a template has as its default, so it is not the same as none."""
    row = {"messages": [{"role": "system", "content": ""}, *chat()["messages"]]}
    assert read(row).turns[0].parts == (Text(""),)
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read({"conversations": turns}, "sharegpt").turns[0].role == "system"


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    rows = [chat({"tag": "t"}, id="x", context="c", score=1), chat(context="c"), chat(context=""), chat(label=True)]
    kept: Counter[str] = Counter()
    list(import_file(write(tmp_path / "a.jsonl", rows, lines=True), "messages", kept=kept))
    assert kept == {"context": 2, "score": 1, "turns: tag": 1}
    assert told(kept) == "context (2 rows), score (1 row), turns: tag (1 row)"


def test_a_value_that_json_cannot_keep_is_a_bad_row_of_the_import(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat(score=float("nan"))) + "\n" + json.dumps(chat(score=1.0)))
    bad: list[RecordError] = []
    assert [record.row for record in import_file(path, "messages", on_bad=bad.append)] == [2]
    assert bad[0].where == f"{path}:1" and "--skip-bad" not in bad[0].problem


# What the table must hold, written out: a key that is lost here is a key that is silently parked.
ROW_NAMES = {
    "system": ["system", "system_prompt", "system_message", "system_instruction"],
    "tools": ["tools", "functions"],
    "thinking": ["reasoning_content", "reasoning", "thinking", "thought", "Complex_CoT"],
    "weight": ["weight", "loss_weight", "sample_weight", "train", "trainable"],
    "template_args": ["template_args", "chat_template_kwargs"],
}
VALUES: dict[str, Any] = {
    "system": "S",
    "tools": {"name": "f"},
    "thinking": "T",
    "weight": 0,
    "template_args": '{"x": 1}',
}


@pytest.mark.parametrize(("meaning", "key"), [(m, key) for m, keys in ROW_NAMES.items() for key in keys])
def test_every_name_of_a_meaning_in_a_row(meaning: str, key: str) -> None:
    record = read(chat(**{key: VALUES[meaning]}))
    found = {
        "system": record.turns[0].text,
        "tools": record.tools,
        "thinking": record.turns[-1].thinking,
        "weight": record.weight,
        "template_args": record.template_args,
    }
    wanted = {"tools": ({"name": "f"},), "template_args": {"x": 1}}
    assert found[meaning] == wanted.get(meaning, VALUES[meaning]) and key not in record.meta


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale", "loss", "train", "trainable", "do_train"])
def test_every_name_of_a_turns_weight(key: str) -> None:
    assert read(chat({key: 0})).turns[1].weight == 0


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_every_name_of_a_turns_thought(key: str) -> None:
    """An empty thought is one: it is what a model writes that was asked not to think."""
    assert read(chat({key: "T"})).turns[1].thinking == "T" and read(chat({key: ""})).turns[1].thinking == ""
    row = chat()
    row["messages"][0][key] = "T"
    with pytest.raises(RecordError, match=f"turn 1 \\(user\\) has {key}") as caught:
        read(row)
    assert caught.value.remedy == f"Only the assistant's turns have {key}."


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_a_call_alone_or_in_a_list(key: str) -> None:
    for given in ({"name": "f", "arguments": None}, [{"name": "f"}], '{"name": "f"}'):
        calls = read(chat({key: given})).turns[1].tool_calls
        assert calls == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    "key",
    [
        *("video", "videos", "video_path", "video_url", "audio", "audios", "audio_path", "speech"),
        *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_answer", "rejected_images"),
        *("image_path", "image_paths", "image_file", "image_files", "img", "img_path", "image_url", "image_urls"),
        *("input_ids", "labels", "token_ids", "mask", "loss_mask", "masked"),
    ],
)
def test_every_name_that_is_refused(key: str) -> None:
    with pytest.raises(RecordError, match=f"'{key}' is "):
        read(chat(**{key: ["x"]}))
    with pytest.raises(RecordError, match=f"turn 2 \\(assistant\\) has '{key}'"):
        read(chat({key: ["x"]}))


@pytest.mark.parametrize(
    "key", ["label", "kto_tag", "desirable", "is_desirable", "is_correct", "is_preferred", "preferred"]
)
@pytest.mark.parametrize("value", [False, "undesirable", "negative", "bad", "rejected", "wrong", " Rejected\n"])
def test_every_mark_of_a_bad_answer(key: str, value: Any) -> None:
    """Of a row it is a label, from which plain tuning does not learn; of a turn it is refused."""
    assert read(chat(**{key: value})).label is False
    with pytest.raises(RecordError, match=f"has '{key}' is .*a mark that the answer is bad") as caught:
        read(chat({key: value}))
    assert "label of the row" in caught.value.remedy


def test_where_a_picture_came_from_may_stand_beside_it() -> None:
    row = {**talk("<image>q", "a"), "image": "a.png"}
    record = FORMATS["llava"]({**row, "image_path": "/old/a.png"})
    assert len(record.images) == 1 and record.meta["image_path"] == "/old/a.png"


def test_keys_of_one_meaning_work_together() -> None:
    assert read(chat(weight=0.5, sample_weight=0.5)).weight == 0.25
    assert read(chat(weight=0.5, train=True)).weight == 0.5 and read(chat(weight=0.5, train=False)).weight == 0
    both = read(chat(template_args={"x": 1}, enable_thinking=False)).template_args
    assert both == {"x": 1, "enable_thinking": False}
    two = chat()
    two["messages"] *= 2
    with pytest.raises(RecordError, match="'reasoning' stands beside a row with 2 answers"):
        read({**two, "reasoning": "T"})


def test_spans_in_any_order_and_one_alone() -> None:
    first, second = ({"begin_offset": n, "end_offset": n, "train": n == 1} for n in (0, 1))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ab", "train_detail": [second, first]}]
    assert read({"conversations": turns}, "sharegpt").turns[1].parts == (Text("a", 0.0), Text("b", 1.0))
    turns[1] |= {"value": "a", "train_detail": first}
    assert read({"conversations": turns}, "sharegpt").turns[1].parts == (Text("a", 0.0),)
    turns[1]["train_detail"] = [first | {"end_offset": False}]
    with pytest.raises(RecordError, match="train_detail has") as caught:
        read({"conversations": turns}, "sharegpt")
    assert "whole numbers" in caught.value.remedy


def test_what_was_kept_is_told_most_frequent_first() -> None:
    assert told({"a": 1, "b": 3, "c": 2}, most=2) == "b (3 rows), c (2 rows) and 1 more keys"
    record = read(chat({"tag": "", "note": "n"}))
    assert kept_keys(record) == {"turns: note": 1}


def parts(*said: dict[str, Any], answer: Any = "a", **keys: Any) -> dict[str, Any]:
    """Messages whose contents are lists of parts."""
    return {"messages": [{"role": "user", "content": list(said)}, {"role": "assistant", "content": answer}], **keys}


def test_keys_of_parts_are_read_or_counted() -> None:
    answer = [{"type": "text", "text": "a", "train": False}, {"type": "text", "text": "b", "image": None}]
    record = read(parts({"type": "text", "text": "q", "cache_control": {"type": "x"}}, answer=answer))
    assert [(part.text, part.weight) for part in record.turns[1].parts] == [("a", 0.0), ("b", None)]
    shown = read(parts({"type": "image", "image": "a.png", "min_pixels": 9, "index": 0}, {"type": "text", "text": "q"}))
    assert kept_keys(record) == {"turns: text part: cache_control": 1}
    assert kept_keys(shown) == {"turns: image part: min_pixels": 1}


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        ({"type": "text", "text": "q", "video": "v.mp4"}, "a part of turn 1 (user) has 'video': a video"),
        ({"type": "text", "text": "q", "bbox": [1, 2, 3, 4]}, "a part of turn 1 (user) has 'bbox': a box of its own"),
        ({"type": "image", "image": "a.png", "weight": 1}, "an image part of turn 1 has a weight"),
        ({"type": "text", "text": "q", "weight": -1}, "a negative weight: -1"),
    ],
)
def test_keys_of_parts_that_cannot_be_expressed(part: dict[str, Any], cause: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(parts(part))
    assert cause in caught.value.problem and caught.value.remedy


def test_boxes_that_are_parts() -> None:
    box, point = {"type": "bbox", "bbox": [0, 100, 500, 1000]}, {"type": "point", "point": [5, 6]}
    row = parts({"type": "text", "text": "At "}, box, {"type": "text", "text": " or "}, point)
    record = FORMATS["messages"](row, boxes="norm1000", boxes_in="norm1000")
    assert record.turns[0].text == "At [0, 100, 500, 1000] or [5, 6]" and not kept_keys(record)
    with pytest.raises(RecordError, match="nothing says how to write them"):
        read(row)
    with pytest.raises(RecordError, match="boxes stand in parts and in 'objects'"):
        read({**row, "objects": {"bbox": [[1, 2, 3, 4]]}})
    with pytest.raises(RecordError, match="no box and no point"):
        FORMATS["messages"](parts({"type": "bbox", "box": [1, 2, 3, 4]}), boxes="norm1", boxes_in="norm1000")


PICTURED = {"role": "user", "content": "a <image> b", "images": ["x.png"]}


def test_speakers_in_capitals_are_read_and_a_mapping_of_ones_own_comes_first() -> None:
    turns = [{"from": "Human", "value": "q"}, {"from": "GPT ", "value": "a"}]
    assert read({"conversations": turns}, "llava") == read(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "llava"
    )
    row = {"messages": [{"role": "USER", "content": "q"}, {"role": "Assistant", "content": "a"}]}
    assert [turn.role for turn in read(row).turns] == ["user", "assistant"]
    with pytest.raises(RecordError, match="turn 1 is said by 'Users'"):
        read({"messages": [{"role": "Users", "content": "q"}, {"role": "assistant", "content": "a"}]})


def test_images_of_a_turn_stand_in_that_turn() -> None:
    """By marker, in front of a text without one, and for the image parts of a list, in any turn but the system's."""
    answer = {"role": "assistant", "content": "see", "image": "z.png"}
    listed = {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "image"}], "images": ["y.png"]}
    turns = read({"messages": [PICTURED, answer, listed, {"role": "assistant", "content": "d"}]}).turns
    assert turns[0].parts == (Text("a "), Image("x.png"), Text(" b"))
    assert turns[1].parts == (Image("z.png"), Text("see"))
    assert turns[2].parts == (Text("t"), Image("y.png"))
    said = [{"from": "human", "value": "a <image> b", "image": "x.png"}, {"from": "gpt", "value": "c"}]
    for name in ("llava", "sharegpt"):
        assert read({"conversations": said}, name).turns[0].parts == turns[0].parts


@pytest.mark.parametrize(
    ("first", "beside", "cause"),
    [
        (PICTURED, {"images": ["y.png"]}, "the row has images, and so has turn 1 ('images')"),
        (PICTURED | {"images": ["x.png", "y.png"]}, {}, "turn 1 (user): the text has 1 <image> but the row 2 images"),
        (PICTURED | {"content": [{"type": "text", "text": "t"}]}, {}, "1 of 1 images of turn 1 (user) have no place"),
        (PICTURED | {"role": "system"}, {}, "turn 1 (system) lists images"),
        (PICTURED | {"image": "y.png"}, {}, "the row has both 'image' and 'images'"),
    ],
)
def test_images_of_a_turn_that_have_no_one_place(first: dict[str, Any], beside: dict[str, Any], cause: str) -> None:
    rest = [{"role": "user", "content": "q"}] if first["role"] == "system" else []
    with pytest.raises(RecordError) as caught:
        read({"messages": [first, *rest, {"role": "assistant", "content": "c"}], **beside})
    assert cause in caught.value.problem and caught.value.remedy
    if beside:
        said = [{"from": "human", "value": "a <image> b", "image": "x.png"}, {"from": "gpt", "value": "c"}]
        with pytest.raises(RecordError, match="so has turn 1"):
            read({"conversations": said, **beside}, "sharegpt")


@pytest.mark.parametrize("choices", [["cat", "dog"], {"A": "cat", "B": "dog"}, '["cat", "dog"]', "['cat', 'dog']"])
def test_an_answer_that_points_at_choices_nobody_sees_is_refused(choices: Any) -> None:
    row = {"question": "Which?", "answer": "B", "choices": choices}
    with pytest.raises(
        RecordError, match="the answer 'B' points at one of 'choices', which the question does not show"
    ):
        FORMATS["question_answer"](row)
    with pytest.raises(RecordError, match="'answer' is 1, the place of one of 'choices'"):
        FORMATS["question_answer"]({**row, "answer": 1})
    # The text of a choice, and a letter beside choices that the question shows or that are letters themselves.
    assert FORMATS["question_answer"]({**row, "answer": "dog"}).meta["choices"] == choices
    assert FORMATS["question_answer"]({**row, "choices": ["A", "B"]}).turns[-1].text == "B"
    assert FORMATS["question_answer"]({**row, "question": "Which?\nA. cat\nB. dog"}).turns[-1].text == "B"
