"""Questions of records: one a user turn, each with the pictures shown so far and without the answers before it."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.errors import ConfigError, MmitError, RecordError
from mmit.eval.metrics import METRICS
from mmit.eval.questions import Item, check_ids, check_units, record_items, sample_items
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
        ({"answer_by": "likelihood"}, {"choices": ["a", " "]}, "a choice is empty"),
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
    items = [Item(f"{n:02}", talk(), "x") for n in range(50)]
    drawn = sample_items(items, 20, 3)
    names = [item.id for item in drawn]
    assert names == sorted(set(names)) and len(drawn) == 20 and drawn == sample_items(items, 20, 3)
    assert drawn != sample_items(items, 20, 4) and sample_items(items, None, 3) == sample_items(items, 99, 3) == items
    with pytest.raises(ConfigError, match="0 questions"):
        sample_items(items, 0, 3)


MME = {"answer": "yes", "category": "count"}
TWO = {"answer": "A", "options": ["x", "y"]}


@pytest.mark.parametrize(
    ("metric", "references", "sizes"),
    [
        ("mme:lmms", [{**MME, "image": n // 2} for n in range(40)], {2}),
        (
            "mmbench:static",
            [{**TWO, "index": row + 1_000_000 * n} for row in range(20) for n in range(2 + row % 2)],
            {2, 3},
        ),
    ],
)
def test_questions_that_are_scored_together_are_sampled_together(metric: str, references: Any, sizes: Any) -> None:
    """A score of a sample of single questions ended in an error, after all of them had been asked."""
    asked = task(metric=metric, reference="right")
    rows = [Record((Turn("user", (Text("q"),)),), row=n, meta={"right": one}) for n, one in enumerate(references)]
    items = [item for row in rows for item in record_items(row, asked)]
    for seed in range(5):
        drawn = sample_items(items, 17, seed)
        assert 15 <= len(drawn) <= 17 and drawn == [item for item in items if item in drawn]
        assert {sum(item.unit == one.unit for item in drawn) for one in drawn} <= sizes
        assert METRICS[metric]([""] * len(drawn), [item.reference for item in drawn]).n
        assert sample_items(items, len(drawn), seed) == drawn  # a report says how many were asked
    assert len(sample_items(items, 1, 0)) in sizes
    check_units(items, metric)
    with pytest.raises(MmitError, match="questions, not 2|but not the question itself"):
        check_units(items[1:], metric)


@pytest.mark.parametrize(
    ("metric", "reference", "told"),
    [
        ("exact", 5, "the reference is 5, neither a text nor a list of texts"),
        ("exact", {"x": 1}, "neither a text"),
        ("gqa:lmms", None, "the reference is null"),
        ("anls:lmms", ["red", 3], "neither a text"),
        ("relaxed:lmms", 4.5, "the reference is 4.5"),
        ("rouge_l", [], "no reference answer"),
        ("captions:simple", [1], "neither a text"),
        ("vqa:official", "red", "at least two human answers"),
        ("vqa:official", [1, 2], "neither a text"),
        ("iou", [1, 2, 3, 4], "the reference has no box"),
        ("gsm8k:strict", ["42"], "no text"),
        ("realworldqa:lmms", 3, "no text"),
        ("ocrbench:lmms", {"answers": [7], "dataset": "x"}, "neither a text"),
        ("pope:lmms", True, "is not yes or no"),
        ("mme:lmms", {**MME, "image": [1]}, "image is"),
        ("nlvr:official", {"label": "maybe", "identifier": "1-2-3"}, "neither true nor false"),
        ("choice", "red", "not an option letter"),
        ("choice", {"answer": "D", "options": ["x", "y"]}, "the right answer is D, and the options are A, B"),
        ("mmbench:static", {**TWO, "index": "one"}, "the index is one"),
        ("mmmu", {"answer": "A", "question_type": "shut"}, "unknown question type 'shut'"),
        ("mmmu", {"answer": 3, "question_type": "open"}, "neither a text"),
        (
            "mathvista:offline",
            {"question_type": "free_form", "answer_type": "word", "answer": "x"},
            "unknown answer type",
        ),
        ("ifeval:strict", "x", "a reference lacks instruction_id_list"),
        ("ifeval:strict", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": {}}, "kwargs is {}, no list"),
        ("ifeval:strict", {"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "unknown instruction"),
        ("judge:mmvet", {"question": "q", "answer": "a", "capability": 3}, "capability"),
        ("judge:llava_bench", {"question": "q"}, "a reference lacks context, answer, category"),
    ],
)
def test_a_reference_that_the_metric_cannot_read_is_named_with_its_row(metric: str, reference: Any, told: str) -> None:
    """They were met after the model had answered everything, half of them by a stack trace, none with its row."""
    record = Record((Turn("user", (Text("q"),)),), source="a.jsonl", row=7, meta={"right": reference})
    with pytest.raises(MmitError, match=told) as caught:
        list(record_items(record, task(metric=metric, reference="right")))
    assert caught.value.where.startswith("a.jsonl:7 (7): meta key 'right'")
    if metric in METRICS and not metric.startswith("captions"):  # called without a task, it says the same
        with pytest.raises(MmitError, match=told):
            METRICS[metric](["x"], [reference])


def test_answers_are_kept_by_id_so_none_comes_twice() -> None:
    items = [*record_items(talk(), task()), *record_items(talk(), task())]
    check_ids(items[:2])
    with pytest.raises(RecordError, match="the id 'r#1' is taken already"):
        check_ids(items)
