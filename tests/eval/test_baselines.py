"""What a score must beat: majority answers learned where they may be, and each baseline with its reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmit.errors import MmitError
from mmit.eval import baselines
from mmit.eval.baselines import Beside, Majority, Subject, majority, no_baselines, run_baselines
from mmit.eval.questions import Item
from mmit.eval.runner import How
from mmit.eval.tasks import Task
from mmit.records import Image, Record, Text, Turn


def task(**given: Any) -> Task:
    return Task(**{"name": "t", "metric": "exact", "records": "a.jsonl", **given})


def item(name: str, text: str, reference: Any, *images: str) -> Item:
    turn = Turn("user", (*map(Image, images), Text(text)))
    return Item(name, Record((turn,), id=name), reference)


def test_each_wording_gets_its_commonest_answer_and_a_new_one_that_of_all() -> None:
    table = Majority([("q", "a"), ("q", "b"), ("q", "b"), ("r", "a"), ("s", "a"), ("s", "c")])
    assert [table.answer(text) for text in ("q", "r", "s", "new")] == ["b", "a", "a", "a"]
    assert table.generate([item("1", "q", "").prompt], max_new_tokens=4) == ["b"]
    with pytest.raises(MmitError, match="no answers to learn from"):
        Majority([])


@pytest.mark.parametrize(
    ("reference", "answers"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ({"answer": "a", "label": "b"}, ["a"]), ({"answers": ["a"]}, ["a"])],
)
def test_answers_are_found_in_every_kind_of_reference(reference: Any, answers: list[str]) -> None:
    assert baselines._texts(reference) == answers and baselines._texts({"n": 1}) == baselines._texts(3) == []


def test_without_a_training_split_one_answer_serves_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item("1", "q", "a"), item("2", "q", "b"), item("3", "r", "b")]
    monkeypatch.setattr(baselines, "training_items", lambda task: [])
    table, note = majority(task(), items)
    assert table is not None and [table.answer(text) for text in "qr"] == ["b", "b"]  # nothing read off the test
    assert "no training split" in note
    monkeypatch.setattr(baselines, "training_items", lambda task: [item("4", "q", ["c"])])
    table, note = majority(task(), items)
    assert table is not None and (table.answer("q"), note) == ("c", "")
    monkeypatch.setattr(baselines, "training_items", lambda task: [item("4", "q", {"n": 3})])
    assert majority(task(), items) == (None, "the references are not answers in words")


class Runs:
    """What is evaluated: key, questions, and the options of the arm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, tuple[list[str], Any]] = {}
        monkeypatch.setattr(baselines, "evaluate", self.evaluate)
        monkeypatch.setattr(baselines, "training_items", lambda task: [])

    def evaluate(self, model: Any, task: Any, arm: Any, *, items: Any, **given: Any) -> str:
        self.found[arm.label] = [one.id for one in items], arm
        return f"result of {arm.label}"


def run(items: list[Item], asked: list[Item], beside: Beside, **subject: Any) -> baselines.Baselines:
    model: Any = SimpleNamespace()
    given = Subject(model, "m", "f", **subject)
    return run_baselines(given, task(), items=items, asked=asked, out_dir=Path("x"), beside=beside, how=How())


def test_baselines_are_asked_what_the_tuned_model_was(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch)
    items = [item(str(n), "q", "a", f"{n}.jpg") for n in range(20)]
    found = run(items, items[:8], Beside(n=5, probes=("blank", "swap")), untuned=lambda: None)
    some = runs.found["untuned"][0]
    assert len(some) == 5 and {int(name) for name in some} <= set(range(8))
    assert runs.found["blank_image"][0] == runs.found["swapped_images"][0] == some
    assert runs.found["blank_image"][1].blank_images and not runs.found["swapped_images"][1].blank_images
    assert len(runs.found["majority"][0]) == 20
    assert found.results["chance"] is None and found.results["untuned"] == "result of untuned"
    run(items, items[:8], Beside(n=12), untuned=lambda: None)  # more than the tuned model was asked
    assert len(runs.found["untuned"][0]) == 12


def test_what_there_is_not_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch)
    plain = [item("1", "q", "a")]
    assert run(plain, plain, Beside(), no_untuned="merged").notes["untuned"] == "merged"
    notes = run(plain, plain, Beside(probes=("blank", "swap"))).notes
    assert notes["blank_image"] == "the questions have no pictures"
    assert notes["swapped_images"] == "there are no two different pictures" and notes["untuned"] == "not asked for"
    assert run(plain, plain, Beside(probes=())).notes["blank_image"] == "not asked for"
    assert set(no_baselines().notes.values()) == {"not asked for"} and not any(no_baselines().results.values())
