"""mmit.eval.baselines and mmit.eval.report: the score always stands beside what it must beat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmit.errors import MmitError
from mmit.eval.baselines import Majority, majority
from mmit.eval.metrics import METRICS, clustered
from mmit.eval.report import markdown
from mmit.eval.tasks import Task, load_task, task_items
from mmit.records import Image, Record, write_jsonl
from tests.eval.loose import reported

KEYS = sorted(
    "accuracy baselines by_type chance ci95 created details fingerprint first_question images interval_by invalid_rate "
    "metric model n n_asked notes number_format profile prompt seconds seed swapped_images task task_config valid_rate "
    "versions wordings".split()
)


class Model:
    """Sees the colour in the picture's file name, unless blind; an untuned one talks too much."""

    def __init__(self, *, tuned: bool) -> None:
        self.tuned = tuned

    def generate(self, records: Sequence[Record], *, blank_images: bool = False, **options: Any) -> list[str]:
        return [self.answer(record, blank=blank_images) for record in records]

    def answer(self, record: Record, *, blank: bool) -> str:
        if not self.tuned:
            return "I think that it is a nice picture"
        colour = "red" if blank else Path(str(record.images[0].source)).stem.split("-")[0]
        return colour if "colour" in record.turns[-1].text else "yes"


def colours(folder: Path, split: str, counts: dict[str, int]) -> None:
    """A question on colour, and one of which half are answered yes, for every picture."""
    records = []
    for colour, count in counts.items():
        for i in range(count):
            image = Image(str(folder / f"{colour}-{i}.png"))
            ask = {"what colour?": (colour, "colour"), "nice?": ("no" if i % 2 else "yes", "yes/no")}
            for number, (question, (answer, kind)) in enumerate(ask.items()):
                name = f"{colour}-{i}-{number}"
                meta = {"kind": kind}
                records.append(Record.triple(question, answer, images=[image], id=name, meta=meta))
    write_jsonl(records, folder / f"{split}.jsonl")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    colours(tmp_path, "train", {"blue": 6, "red": 3})
    colours(tmp_path, "test", {"blue": 10, "red": 20, "green": 10})
    path = tmp_path / "t.yaml"
    lines = ["name: t", 'records: "{split}.jsonl"', "split: test", "train_split: train", "metric: exact"]
    path.write_text("\n".join([*lines, "group_by: kind", "answers: [yes, no, red, green, blue]"]))
    return load_task(path)


def run(task: Task, folder: Path, **options: Any) -> tuple[dict[str, Any], str]:
    shown = StringIO()
    defaults: dict[str, Any] = {
        "model": Model(tuned=True),
        "untuned": lambda: Model(tuned=False),
        "name": "runs/[bold]x",
        "fingerprint": "m",
        "console": Console(file=shown, width=100),
    }
    options = defaults | options
    report = reported(options.pop("model"), task, folder, **options)
    return report, shown.getvalue()


def test_the_whole(task: Task, tmp_path: Path) -> None:
    report, shown = run(task, tmp_path / "out", n=30)
    assert sorted(report) == KEYS
    # All 40 colours right, and the half of the others that is yes.
    assert (report["accuracy"], report["n"], report["invalid_rate"]) == (0.75, 80, 0.0)
    assert report["by_type"]["colour"] == {
        "accuracy": 1.0,
        "n": 40,
        "ci95": pytest.approx([0.912378, 1.0], abs=1e-6),
    }
    assert report["by_type"]["yes/no"]["accuracy"] == 0.5
    # Two questions on each of 40 images, one right on all: the interval is that of 40 images.
    assert (report["interval_by"], report["images"]) == ("image", 40)
    images = [f"{i // 2}" for i in range(80)]
    right = [float(i % 2 == 0 or i % 4 == 1) for i in range(80)]
    assert report["ci95"] == pytest.approx(clustered(right, images))
    assert "Intervals count 40 images, not questions" in " ".join(shown.split())
    arms = report["baselines"]
    # Training says blue, which 10 of 40 are, and yes, which 20 of 40 are.
    assert (arms["majority"]["accuracy"], arms["majority"]["n"]) == (0.375, 80)
    assert (arms["untuned"]["accuracy"], arms["untuned"]["n"], arms["untuned"]["invalid_rate"]) == (
        0,
        30,
        1.0,
    )
    assert arms["blank_image"]["n"] == 30 and 0 < arms["blank_image"]["accuracy"] < 0.75
    assert report["versions"]["mmit"] and report["created"].endswith("+00:00")
    folder = tmp_path / "out"
    assert json.loads((folder / "report.json").read_text("utf-8")) == report
    names = {"report.json", "report.md", "report.html"}
    names |= {f"answers-{key}.jsonl" for key in ("tuned", "chance", *arms)}
    assert {path.name for path in folder.iterdir()} == names
    for text in (shown, (folder / "report.md").read_text("utf-8")):
        for cell in ("tuned model", "75.0 %", "majority answer", "37.5 %", "untuned model", "blank image"):
            assert cell in text
        assert "runs/[bold]x" in text
    assert "asked as: 'what colour?'" in shown


def test_baselines_ask_the_tuned_models_questions_or_more(task: Task, tmp_path: Path) -> None:
    def asked(label: str) -> set[str]:
        rows = (tmp_path / "out" / f"answers-{label}.jsonl").read_text("utf-8").splitlines()[1:]
        return {json.loads(row)["id"] for row in rows}

    report, _ = run(task, tmp_path / "out", sample=40, n=20)
    assert report["n"] == 40 and report["baselines"]["majority"]["n"] == 80
    assert asked("blank_image") == asked("untuned") < asked("tuned") and len(asked("untuned")) == 20
    # A sample that is too small for the baselines does not make them smaller.
    report, _ = run(task, tmp_path / "out", sample=10, n=20, overwrite=True)
    assert (report["n"], report["baselines"]["untuned"]["n"]) == (10, 20)


def test_running_again_repeats_nothing(task: Task, tmp_path: Path) -> None:
    first, _ = run(task, tmp_path / "out")

    def build() -> Model:
        raise AssertionError("built")

    second, _ = run(task, tmp_path / "out", untuned=build)
    volatile = {"created", "seconds"}
    assert {k: v for k, v in first.items() if k not in volatile} == {
        k: v for k, v in second.items() if k not in volatile
    }
    with pytest.raises(MmitError, match="overwrite"):
        run(task, tmp_path / "out", fingerprint="another")


def test_the_tasks_sample_and_seed(task: Task, tmp_path: Path) -> None:
    some = task.model_validate(task.model_dump() | {"sample": {"n": 12, "seed": 5}})
    report, _ = run(some, tmp_path / "a")
    assert (report["n"], report["seed"], report["baselines"]["majority"]["n"]) == (12, 5, 80)
    report, _ = run(some, tmp_path / "b", sample=9, seed=1)
    assert (report["n"], report["seed"]) == (9, 1)


def test_what_cannot_be_is_null_and_says_why(tmp_path: Path) -> None:
    records = [Record.triple(f"q{i}?", "a" if i else "b", id=str(i), meta={"|": "x|y"}) for i in range(4)]
    write_jsonl(records, tmp_path / "r.jsonl")
    task = Task(name="t", records=str(tmp_path / "r.jsonl"), metric="exact", group_by="|")

    class Reader:
        def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
            return ["a"] * len(records)

    report, shown = run(task, tmp_path / "out", model=Reader(), untuned=None)
    assert report["baselines"]["untuned"] is None and report["baselines"]["blank_image"] is None
    assert report["baselines"]["majority"]["accuracy"] == 0.75
    for note in ("no training split", "not asked for", "no pictures"):
        assert note in " ".join(shown.split())
    assert "| - x\\|y |" in markdown(report)


def test_sums_are_not_shown_as_shares() -> None:
    part = {"accuracy": 1531.25, "ci95": [1500.0, 1560.5], "n": 9}
    empty = dict.fromkeys(("majority", "untuned", "blank_image"))
    report = part | {"by_type": {}, "baselines": empty, "task": "t", "metric": "mme", "seed": 0, "model": "m"}
    report |= {"versions": {}, "created": "now", "seconds": 1.0, "invalid_rate": 0.0}
    assert "| tuned model | 1531.25 | 1500.00 to 1560.50 | 9 | 0.0 % |" in markdown(report)


def test_majority_by_wording_then_overall() -> None:
    pairs = [("a?", "x"), ("a?", "y"), ("a?", "y"), ("b?", "x"), ("b?", "z"), ("c?", "x"), ("c?", "x")]
    table = Majority(pairs)
    assert [table.answer(text) for text in ("a?", "b?", "c?", "A?", "")] == ["y", "x", "x", "x", "x"]
    with pytest.raises(MmitError, match="no answers"):
        Majority([])


def nothing(predictions: list[str], references: list[Any]) -> list[float]:
    """A metric of one's own, whose references are its own affair."""
    return [0.0] * len(predictions)


def test_majority_reads_lists_and_mappings_of_answers(tmp_path: Path) -> None:
    golds: list[Any] = [["no", "yes", "yes"], {"answer": "yes", "options": ["a"]}, {"answers": ["no", "yes"]}]
    turns = Record.triple("q?", "-").turns[:1]
    write_jsonl([Record(turns, meta={"gold": gold}) for gold in golds], tmp_path / "r.jsonl")
    task = Task(name="t", records=str(tmp_path / "r.jsonl"), metric=f"{__name__}:nothing", reference="gold")
    table, note = majority(task, task_items(task))
    assert table is not None and table.answer("q?") == "yes" and "no training split" in note
    write_jsonl([Record(turns, meta={"gold": {"rules": []}})], tmp_path / "r.jsonl")
    assert majority(task, task_items(task))[0] is None


def test_easy_vqas_majority_answer() -> None:
    pytest.importorskip("easy_vqa")
    task = load_task("easy_vqa")
    items = task_items(task)
    table, _ = majority(task, items)
    assert table is not None
    answers = table.generate([item.prompt for item in items])
    score = METRICS[task.metric](answers, [item.reference for item in items])
    assert score.n == 9673 and score.value == pytest.approx(0.6700, abs=5e-5)


class Thinks(Model):
    """Thinks before it answers."""

    def answer(self, record: Record, *, blank: bool) -> str:
        return f"<think>\nIs it no?\n</think>\n\n{super().answer(record, blank=blank)}"


def test_thoughts_are_not_scored_and_the_reader_is_told(task: Task, tmp_path: Path) -> None:
    plain, _ = run(task, tmp_path / "plain")
    report, shown = run(task, tmp_path / "thoughts", model=Thinks(tuned=True))
    assert report["accuracy"] == plain["accuracy"] and report["n"] == plain["n"]
    note = f"{report['n']} of {report['n']} answers began with a thought, which is not scored"
    assert report["notes"]["thoughts"] == note and note in " ".join(shown.split())
    assert f"Thoughts: {note}." in (tmp_path / "thoughts" / "report.md").read_text("utf-8")
    assert "thoughts" not in plain["notes"]
