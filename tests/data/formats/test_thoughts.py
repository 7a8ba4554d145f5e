"""Thoughts between marks that the user names become the turn's thought."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.data.formats import FORMATS, format_options
from mmit.data.lint.linter import lint
from mmit.errors import ConfigError, RecordError
from mmit.records import Record, Text

GPT_OSS = "<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>"


def row(*answers: str, **keys: Any) -> dict[str, Any]:
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, **keys}]
    return {"messages": turns}


@pytest.mark.parametrize(
    "marks",
    ["<thinking>...</thinking>", "[THINK]...[/THINK]", "<seed:think>...</seed:think>", GPT_OSS],
)
def test_any_two_marks_hold_a_thought(marks: str) -> None:
    opening, closing = marks.split("...")
    answers = (f"{opening}\nhm\n{closing}\n\nYes. {opening}", "No.", f" {opening}{closing}Perhaps.")
    record = FORMATS["messages"](row(*answers), thoughts=marks)
    said = [(turn.thinking, turn.text) for turn in record.turns if turn.role == "assistant"]
    assert said == [("hm", f"Yes. {opening}"), (None, "No."), ("", "Perhaps.")]
    assert FORMATS["messages"](row(*answers)).turns[1].text == answers[0]  # nobody named the marks


def test_a_question_that_begins_with_the_mark_is_a_question() -> None:
    rows = {"conversations": [{"from": "human", "value": "<t>a</t>b"}, {"from": "gpt", "value": "<t>c</t>d"}]}
    record = FORMATS["sharegpt"](rows, thoughts="<t>...</t>")
    assert record.turns[0].parts == (Text("<t>a</t>b"),)
    assert (record.turns[1].thinking, record.turns[1].text) == ("c", "d")


@pytest.mark.parametrize(
    ("answer", "keys", "problem"),
    [
        ("<t>never ends", {}, "no </t> ends it"),
        ("<t>a</t>b", {"reasoning_content": "c"}, "beside its text and one in it"),
        ("<t>a</t>b", {"train_detail": [{"begin_offset": 0, "end_offset": 8, "train": True}]}, "spans of their own"),
    ],
)
def test_what_cannot_be_read_is_a_bad_row(answer: str, keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError, match=problem) as caught:
        FORMATS["messages"](row(answer, **keys), thoughts="<t>...</t>")
    assert "turn 2" in caught.value.problem


def test_the_option_needs_two_marks() -> None:
    assert "thoughts" in format_options("llava") and "thoughts" not in format_options("mmit")
    for marks in ("<thinking>", "...</thinking>", "<a>...", "<a>...<b>...<c>", 3):
        with pytest.raises(ConfigError, match="thoughts"):
            FORMATS["messages"](row("a"), thoughts=marks)


@pytest.mark.parametrize("mark", ["<thinking>", "[THINK]", "<seed:think>", "<|channel|>analysis<|message|>"])
def test_marks_that_nobody_named_are_a_warning(mark: str) -> None:
    assert list(lint([Record.triple("q", f"{mark}a")]).findings.keys() - {"control-text"}) == ["thought-mark"]
    assert "thought-mark" not in lint([Record.triple("q", f"see {mark}")]).findings
