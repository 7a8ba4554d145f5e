"""mmit.eval.runner: every question answered once, resumed to the byte, never mixed with another model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.errors import MmitError, ModelError
from mmit.eval import runner
from mmit.eval.runner import Lazy, Result, invalid_rate
from mmit.eval.tasks import Item, Task
from mmit.records import Image, Record
from tests.eval.loose import answered


class Echo:
    """Answers with the last word of the prompt, and remembers what it was asked."""

    def __init__(self, *, die_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.options: list[dict[str, Any]] = []
        self.left = die_after

    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        texts = [record.turns[-1].text for record in records]
        self.batches.append(texts)
        self.options.append(options)
        return [text.split()[-1] for text in texts]


TASK = Task(name="t", records="r.jsonl", metric="exact", group_by="kind", max_new_tokens=7)


def questions(count: int = 10) -> list[Item]:
    """Every third reference is something else than the echo; prompts differ in length."""
    items = []
    for i in range(count):
        record = Record.triple("very " * (i % 4 * 20) + f"word{i}", "-", id=f"q{i}")
        prompt = Record(record.turns[:1], id=record.id)
        reference = "other" if i % 3 == 0 else f"Word{i}."
        items.append(Item(f"q{i}", prompt, reference, "even" if i % 2 == 0 else "odd"))
    return items


def run(model: Any, folder: Path, items: list[Item] | None = None, **options: Any) -> Result:
    options = {"fingerprint": "m1", "batch_size": 3} | options
    return answered(model, TASK, out_dir=folder, items=items or questions(), **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_scores_groups_and_rows(tmp_path: Path) -> None:
    model = Echo()
    result = run(model, tmp_path)
    assert (result.score.value, result.score.n, result.generated) == (0.6, 10, 10)
    # Wilson for 6 of 10, by hand: centre (0.6 + z2/20) / (1 + z2/10), z2 = 3.841459.
    assert result.score.ci95 == pytest.approx((0.312674, 0.831820), abs=1e-6)
    assert {name: score.n for name, score in result.score.by_group.items()} == {"even": 5, "odd": 5}
    settings, *rows = lines(result.path)
    assert settings["fingerprint"] == "m1" and [row["id"] for row in rows] == [f"q{i}" for i in range(10)]
    assert rows[1] == {
        "id": "q1",
        "prompt": "very " * 20 + "word1",
        "images": [],
        "reference": "Word1.",
        "group": "odd",
        "answer": "word1",
        "parsed": "word1",
        "correct": True,
    }
    assert [row["correct"] for row in rows] == [i % 3 != 0 for i in range(10)]
    assert all(o["max_new_tokens"] == 7 and o["temperature"] == 0.0 for o in model.options)
    assert {o["blank_images"] for o in model.options} == {False}


def test_chunks_keep_the_order_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK", 2)
    model = Echo()
    items = questions(20)
    run(model, tmp_path, items, batch_size=4)
    assert [len(chunk) for chunk in model.batches] == [8, 8, 4]
    assert [text for chunk in model.batches for text in chunk] == [item.text for item in items]


@pytest.mark.parametrize("die_after", [0, 1, 2, 3])
@pytest.mark.parametrize("cut", [0, 1, 40])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, die_after: int, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CHUNK", 1)
    whole = run(Echo(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Echo(die_after=die_after), tmp_path / "cut")
    path = tmp_path / "cut" / "answers-tuned.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    kept = max(path.read_bytes().count(b"\n") - 1, 0)
    model = Echo()
    resumed = run(model, tmp_path / "cut")
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.path.read_bytes().splitlines())
    assert resumed.generated == 10 - kept and resumed.score == whole.score
    # A batch is asked again whole or not at all, so that low precision cannot change its answers.
    uninterrupted = Echo()
    run(uninterrupted, tmp_path / "again")
    assert all(batch in uninterrupted.batches for batch in model.batches)


def test_a_finished_run_asks_nothing_and_builds_no_model(tmp_path: Path) -> None:
    first = run(Echo(), tmp_path)
    content = first.path.read_bytes()

    def build() -> Echo:
        raise AssertionError("built")

    again = run(Lazy(build), tmp_path)
    assert again.generated == 0 and again.score == first.score and first.path.read_bytes() == content
    built = Echo()
    assert run(Lazy(lambda: built), tmp_path / "new").generated == 10 and built.batches


def test_a_sample_can_grow_and_shrink(tmp_path: Path) -> None:
    items = questions()
    run(Echo(), tmp_path, items[3:6])
    grown = run(Echo(), tmp_path, items)
    assert grown.generated == 7
    fewer = run(Echo(), tmp_path, items[:2])
    assert (fewer.generated, fewer.score.n, fewer.score.value) == (0, 2, 0.5)
    rows = lines(fewer.path)[1:]
    assert len(rows) == 10 and [row["correct"] for row in rows[:3]] == [False, True, None]
    assert run(Echo(), tmp_path, items).score == grown.score


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fingerprint": "m2"}, "fingerprint was 'm1', is now 'm2'"),
        ({"blank_images": True}, "blank_images was False, is now True"),
    ],
)
def test_answers_of_another_model_or_setting_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = run(Echo(), tmp_path).path
    content = path.read_bytes()
    with pytest.raises(MmitError, match="overwrite=True") as caught:
        run(Echo(), tmp_path, **changed)
    assert said in str(caught.value) and path.read_bytes() == content
    assert run(Echo(), tmp_path, overwrite=True, **changed).generated == 10
    assert run(Echo(), tmp_path, **changed).generated == 0


def test_answers_in_another_number_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK", 1)
    with pytest.raises(KeyboardInterrupt):
        run(Echo(die_after=2), tmp_path, number_format="bf16")
    path = tmp_path / "answers-tuned.jsonl"
    content = path.read_bytes()
    with pytest.raises(MmitError, match="number_format was 'bf16', is now 'fp32'") as caught:
        run(Echo(), tmp_path, number_format="fp32")
    assert "(--dtype bf16)" in caught.value.remedy and path.read_bytes() == content
    assert run(Echo(), tmp_path, number_format="bf16").generated == 4 and lines(path)[0]["number_format"] == "bf16"


def test_answers_of_a_version_that_wrote_no_number_format_go_on_and_still_say_none(tmp_path: Path) -> None:
    path = run(Echo(), tmp_path, questions()[:4]).path
    assert run(Echo(), tmp_path, number_format="fp32").generated == 6
    assert "number_format" not in lines(path)[0]
    assert run(Echo(), tmp_path, number_format="fp32", overwrite=True).generated == 10
    assert lines(path)[0]["number_format"] == "fp32"


def test_changed_questions_and_damaged_files_are_refused(tmp_path: Path) -> None:
    items = questions()
    path = run(Echo(), tmp_path, items).path
    other = [Item(items[0].id, items[0].prompt, "new reference", items[0].group), *items[1:]]
    with pytest.raises(MmitError, match="'q0' was another when it was answered: reference changed"):
        run(Echo(), tmp_path, other)
    content = path.read_bytes()
    for damaged, said in (
        (content.replace(b'"id": "q4"', b'"id": '), "damaged"),
        (content + content.splitlines(keepends=True)[-1], "answered twice"),
        (b"hello\n", "not a file of answers"),
        (content.split(b"\n", 1)[1], "not a file of answers"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(MmitError, match=said):
            run(Echo(), tmp_path, items)


class Wrong:
    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        return ["a"] * (len(records) - 1)


def test_too_few_answers_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK", 1)
    with pytest.raises(ModelError, match="2 answers to 3 questions"):
        run(Wrong(), tmp_path)


class Odd:
    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        return ["\ud800", 'two\nlines\u2028"', "", "é"][: len(records)]


def test_any_text_survives(tmp_path: Path) -> None:
    run(Odd(), tmp_path, questions(4), batch_size=4)
    again = run(Odd(), tmp_path, questions(4), batch_size=4)
    answers = {json.loads(line)["answer"] for line in again.path.read_bytes().split(b"\n")[1:-1]}
    assert again.generated == 0 and answers == {"\ud800", 'two\nlines\u2028"', "", "é"}
    assert again.score.unparsed_rate == 0.25


def test_pictures_are_told_apart(tmp_path: Path) -> None:
    def item(source: Any) -> Item:
        record = Record.triple("q?", "-", images=[Image(source)], id="q")
        return Item("q", Record(record.turns[:1], id="q"), "a", "k")

    sources = [b"bytes", PIL.Image.new("RGB", (2, 2)), PIL.Image.new("RGB", (2, 2), "red"), "a.png", "b.png"]
    for number, source in enumerate(sources):
        run(Echo(), tmp_path / str(number), [item(source)])
        for other in sources[:number]:
            with pytest.raises(MmitError, match="images changed"):
                run(Echo(), tmp_path / str(number), [item(other)])


def test_invalid_answers() -> None:
    task = Task(name="t", records="r", metric="exact", answers=["yes", "no"])
    from mmit.eval.metrics import METRICS

    answers = ["Yes.", "no", "maybe", ""]
    score = METRICS["exact"](answers, ["yes"] * 4)
    assert invalid_rate(task, score, answers) == 0.5
    assert invalid_rate(task.model_copy(update={"answers": None}), score, answers) == 0.25
