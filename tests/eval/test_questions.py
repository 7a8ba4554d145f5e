"""Questions of records: one a user turn, each with the pictures shown so far and without the answers before it."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.errors import ConfigError, RecordError
from mmit.eval.questions import check_ids, record_items, sample_items
from mmit.eval.tasks import Task
from mmit.records import Image, Record, Text, Turn


def task(**given: Any) -> Task:
    return Task(**{"name": "t", "metric": "exact", "records": "a.jsonl", **given})


def talk(*, meta: dict[str, Any] | None = None, last: bool = True) -> Record:
    """Two questions, the second with a picture of its own."""
    turns = [
        Turn("system", (Text("Be brief."),)),
        Turn("user", (Image("a.jpg"), Text("What?"))),
        Turn("assistant", (Text("A cat."),)),
        Turn("user", (Text("And "), Image("b.jpg"), Text("here?"))),
        Turn("assistant", (Text("A dog."),)),
    ]
    return Record(tuple(turns[: 5 if last else 4]), id="r", meta=meta or {})


def test_every_question_is_asked_alone_with_the_pictures_shown_up_to_it() -> None:
    first, second = record_items(talk(), task(prompt="Q: {question} A:"))
    assert (first.id, second.id) == ("r#1", "r#2")
    assert [image.source for image in second.prompt.images] == ["a.jpg", "b.jpg"]
    assert second.text == "Be brief.\nQ: And here? A:"  # the words stand around all of the turn's text
    assert (first.reference, second.reference) == ("A cat.", "A dog.")
    assert all(turn.role != "assistant" for turn in second.prompt.turns)


def test_a_lone_question_keeps_its_name_and_a_list_of_answers() -> None:
    record = Record((Turn("user", (Image("a.jpg"),)),), row=7, meta={"answers": ["x", "y"], "kind": 3})
    (item,) = record_items(record, task(reference="answers", group_by="kind", prompt="{question} Name it."))
    assert (item.id, item.reference, item.group, item.text) == ("7", ["x", "y"], "3", " Name it.")


@pytest.mark.parametrize(
    ("given", "meta", "told"),
    [
        ({"reference": "answer"}, {"answers": []}, "no meta key 'answer', which the task names as reference"),
        ({"reference": "answer"}, {"answer": ["x"]}, "meta key 'answer' is .x., but the record has 2 questions"),
        ({"group_by": "kind"}, {"kind": ["a", "b", "c"]}, "but the record has 2 questions"),
        ({"answer_by": "likelihood"}, {}, "no choices whose likelihood could be compared"),
        ({}, {"choices": "abc"}, "choices are abc"),
        ({}, {"choices": ["a", 1]}, "choices are"),
    ],
)
def test_a_record_that_does_not_suit_its_task_is_refused(given: Any, meta: Any, told: str) -> None:
    with pytest.raises(RecordError, match=told):
        list(record_items(talk(meta=meta), task(**given)))


def test_a_record_without_its_last_answer_needs_a_reference() -> None:
    with pytest.raises(RecordError, match="the last question has no answer"):
        list(record_items(talk(last=False), task()))
    found = list(record_items(talk(last=False, meta={"answer": ["x", "y"]}), task(reference="answer")))
    assert [item.reference for item in found] == ["x", "y"]


def test_a_sample_is_drawn_by_its_seed_and_stays_in_order() -> None:
    items: list[Any] = list(range(50))
    drawn = sample_items(items, 20, 3)
    assert drawn == sorted(set(drawn)) and len(drawn) == 20 and drawn == sample_items(items, 20, 3)
    assert drawn != sample_items(items, 20, 4) and sample_items(items, None, 3) == sample_items(items, 99, 3) == items
    with pytest.raises(ConfigError, match="0 questions"):
        sample_items(items, 0, 3)


def test_answers_are_kept_by_id_so_none_comes_twice() -> None:
    items = [*record_items(talk(), task()), *record_items(talk(), task())]
    check_ids(items[:2])
    with pytest.raises(RecordError, match="the id 'r#1' is taken already"):
        check_ids(items)
