"""mmit.eval.compare: answers are paired by question, tested by the test that fits, and refused if not the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmit.errors import MmitError
from mmit.eval.answers import TUNED, scored_answers
from mmit.eval.compare import compare, markdown, notes
from mmit.eval.metrics import mcnemar
from mmit.eval.tasks import Item, Task
from mmit.records import Record
from tests.eval import loose


class Says:
    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        return [self.answers[record.id] for record in records]


def answered(folder: Path, answers: Sequence[str], *, metric: str = "exact", reference: Any = "yes") -> Path:
    items = [
        Item(str(n), Record(Record.triple("q?", "-", id=str(n)).turns[:1], str(n)), reference)
        for n in range(len(answers))
    ]
    task = Task(name="t", records="r", metric=metric)
    model = Says({str(n): answer for n, answer in enumerate(answers)})
    loose.answered(model, task, out_dir=folder / "t", items=items)
    return folder


def test_right_or_wrong_is_mcnemars(tmp_path: Path) -> None:
    first, second = ["yes"] * 30 + ["no"] * 10, ["yes"] * 15 + ["no"] * 25
    a, b = answered(tmp_path / "a", first), answered(tmp_path / "b", second)
    (one,) = compare(a, b)
    wanted = mcnemar([x == "yes" for x in first], [x == "yes" for x in second])
    assert (one.task, one.n, one.test, one.difference) == ("t", 40, "McNemar", wanted)
    assert one.difference is not None and one.difference.difference == 0.375 and one.difference.p < 0.001
    assert "| t | 40 | 75.0 | 37.5 | +37.5 |" in markdown([one])
    (same,) = compare(a, a)
    assert same.difference is not None and same.difference.difference == 0 and same.difference.p == 1
    assert json.loads(json.dumps(one.to_json()))["difference"]["n"] == 40


def test_partial_credit_is_bootstrapped(tmp_path: Path) -> None:
    people = ["red"] * 2 + ["pink"] * 8
    a = answered(tmp_path / "a", ["pink", "red", "red"] * 5, metric="vqa:official", reference=people)
    b = answered(tmp_path / "b", ["blue", "red", "pink"] * 5, metric="vqa:official", reference=people)
    (one,) = compare(a, b)
    assert one.test == "paired bootstrap" and one.difference is not None
    assert one.difference == compare(a, b)[0].difference


def test_only_common_questions_are_compared(tmp_path: Path) -> None:
    a, b = answered(tmp_path / "a", ["yes"] * 5), answered(tmp_path / "b", ["yes"] * 3)
    (one,) = compare(a, b / "t" / "answers-tuned.jsonl")
    assert (one.n, one.only_in_a, one.only_in_b) == (3, 2, 0)
    assert "2 that only A answered" in notes([one])[0]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = answered(tmp_path / "a", ["yes"])
    with pytest.raises(MmitError, match="reference differ"):
        compare(a, answered(tmp_path / "b", ["yes"], reference="no"))
    with pytest.raises(MmitError, match="no task in common: t and none"):
        compare(a, tmp_path / "nowhere")
    with pytest.raises(MmitError, match="there twice"):
        compare(tmp_path, a)
    rows = (a / "t" / "answers-tuned.jsonl").read_text().replace(', "parsed": "yes", "correct": true', "")
    (a / "t" / "answers-tuned.jsonl").write_text(rows)
    with pytest.raises(MmitError, match="cut off before it was scored"):
        compare(a, a)
    damaged = answered(tmp_path / "damaged", ["yes"])
    file = next(damaged.rglob("answers-tuned.jsonl"))
    head, row = file.read_text().splitlines()
    kept = {key: value for key, value in json.loads(row).items() if key != "reference"}
    file.write_text(f"{head}\n{json.dumps(kept)}\n")
    with pytest.raises(MmitError, match=r"jsonl:2: not an answer"):
        compare(damaged, damaged)


def test_without_verdicts_only_the_count_is_told(tmp_path: Path) -> None:
    a = answered(tmp_path / "a", ["yes"])
    path = a / "t" / "answers-tuned.jsonl"
    path.write_text(path.read_text().replace('"correct": true', '"correct": null'))
    (one,) = compare(a, a)
    assert one.difference is None and "no verdict on single answers" in one.note and "| t | 1 | - |" in markdown([one])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace('"correct": true', '"wrong": true', 1), "cut off before it was scored"),
        (lambda text: text.replace('"prompt"', '"promt"', 2), "not an answer"),
        (None, "there are no answers"),
    ],
)
def test_an_unfinished_file_is_refused_with_what_to_do(tmp_path: Path, damage: Any, said: str) -> None:
    file = answered(tmp_path, ["yes"] * 3) / "t" / TUNED
    text = file.read_text()
    file.unlink()
    if damage is not None:
        assert damage(text) != text
        file.write_text(damage(text))
    with pytest.raises(MmitError, match=said) as error:
        scored_answers(file, again="Run the study again")
    assert error.value.remedy.startswith(("Run the study again", "Run `mmit eval` again"))
