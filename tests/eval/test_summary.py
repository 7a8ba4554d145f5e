"""mmit.eval.summary, page, probes: tasks in one table, the worst answers with pictures, what a score must beat."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import PIL.Image
import pytest
from rich.console import Console

from mmit.errors import ConfigError, ImageError, ModelError
from mmit.eval.baselines import Beside, Subject
from mmit.eval.page import mistakes, words_of, worst_answers
from mmit.eval.probes import GENERAL, bank_wordings, chance, possible_answers, sensitivity, swapped, wordings
from mmit.eval.questions import Item
from mmit.eval.runner import How, Lazy
from mmit.eval.summary import check_tasks, latex, run_tasks
from mmit.eval.tasks import SampleConfig, Task, asked_of, load_task, task_items
from mmit.records import Image, Record, Text, Turn, write_jsonl
from mmit.yamlio import dump_yaml
from tests.eval.benchmarks import CASES
from tests.eval.loose import answered, reported


class Sees:
    """Says the colour of the picture, yes to other questions; a wording with "Please" makes it say nothing."""

    def generate(self, records: Sequence[Record], *, blank_images: bool = False, **options: Any) -> list[str]:
        return [self.answer(record, blank_images) for record in records]

    def answer(self, record: Record, blank: bool) -> str:
        if "Please" in record.turns[-1].text:
            return ""
        if blank or not record.images or "colour" not in record.turns[-1].text:
            return "yes"
        return Path(str(record.images[0].source)).stem.split("-")[0]

    def score(self, records: Sequence[Record], choices: Sequence[Sequence[str]], **options: Any) -> list[list[float]]:
        return [[-float(len(choice)) + (choice == "C") for choice in row] for row in choices]


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    records = []
    for colour in ("red", "blue", "green"):
        path = tmp_path / f"{colour}-0.png"
        PIL.Image.new("RGB", (600, 300), colour).save(path)
        for n, (question, answer) in enumerate([("what colour?", colour), ("<b>round</b>?", "no")]):
            meta = {"kind": ["colour", "y&n"][n]}
            record = Record.triple(question, answer, images=[Image(str(path))], id=f"{colour}-{n}", meta=meta)
            records.append(record)
    write_jsonl(records, tmp_path / "r.jsonl")
    path = tmp_path / "t.yaml"
    path.write_text(
        "name: colours\nrecords: r.jsonl\nmetric: exact\ngroup_by: kind\nanswers: [yes, no, red, blue, green]\n"
    )
    return path


def test_what_would_end_an_evaluation_later_is_found_before_a_model_is_loaded(colours: Path, tmp_path: Path) -> None:
    """Too many wordings ended it after the model and its baselines had been asked; a missing picture in the middle."""
    task = load_task(colours)
    items = task_items(task)
    check_tasks([(task, items)], Beside(templates=10), sample=None)
    with pytest.raises(ConfigError, match="11 wordings"):
        check_tasks([(task, items)], Beside(templates=11), sample=None)
    check_tasks([(task, items)], Beside(n=0, templates=11), sample=None)  # then no wording is asked
    banked = task.model_copy(update={"bank": ["charts"]})
    with pytest.raises(ConfigError, match="have no templates"):
        check_tasks([(banked, items)], Beside(templates=2), sample=None)
    (tmp_path / "blue-0.png").unlink()
    with pytest.raises(ImageError, match=r"r\.jsonl:3 \(blue-0\): .*blue-0\.png: cannot open the image: No such file"):
        check_tasks([(task, items)], Beside(), sample=None)
    drawn = {seed: asked_of(task, items, sample=1, seed=seed) for seed in range(20)}
    seed = next(seed for seed, (one,) in drawn.items() if "blue" not in one.id)
    sampled = task.model_copy(update={"sample": SampleConfig(n=1, seed=seed)})
    check_tasks([(sampled, items)], Beside(n=1), sample=None)  # nothing that is asked shows it
    with pytest.raises(ImageError):
        check_tasks([(sampled, items)], Beside(n=500), sample=None)  # a baseline is asked about all


def report_of(colours: Path, out: Path, **options: Any) -> dict[str, Any]:
    return reported(Sees(), load_task(colours), out, console=Console(file=StringIO()), **options)


def test_blank_and_swapped_pictures(colours: Path, tmp_path: Path) -> None:
    report = report_of(colours, tmp_path / "out", probes=("blank", "swap"))
    assert report["accuracy"] == 0.5
    # Every colour is now another one's.
    assert report["swapped_images"]["accuracy"] == report["baselines"]["blank_image"]["accuracy"] == 0
    none = report_of(colours, tmp_path / "none", probes=())
    assert none["baselines"]["blank_image"] is None and none["swapped_images"] is None
    assert none["notes"]["blank_image"] == "not asked for"


def test_swapping_moves_every_picture_and_nothing_else(colours: Path) -> None:
    items = task_items(load_task(colours))
    changed = swapped(items, seed=0)
    assert [item.id for item in changed] == [item.id for item in items]
    for before, after in zip(items, changed, strict=True):
        assert before.prompt.images != after.prompt.images and before.text == after.text
        assert (before.reference, before.group) == (after.reference, after.group)
    assert swapped(items[:2], seed=0) == []  # one picture alone
    assert swapped(items, seed=0) == changed


def test_chance(colours: Path, tmp_path: Path) -> None:
    task = load_task(colours)
    item = Item("a", Record.triple("q", "-"), "x")
    assert possible_answers(task, item) == task.answers
    assert possible_answers(Task(name="t", records="r", metric="pope:lmms"), item) == ("yes", "no")
    lettered = Item("a", item.prompt, {"answer": "A", "options": ["x", "y", "z"]})
    assert possible_answers(task, lettered) == ["A", "B", "C"]
    assert possible_answers(task, Item("a", item.prompt, "x", None, ("u", "v"))) == ("u", "v")
    assert chance(Task(name="t", records="r", metric="exact"), [item], seed=0) is None
    many = [Item(str(n), Record.triple("q", "-", id=str(n)), "yes") for n in range(4000)]
    guesser = chance(task, many, seed=0)
    assert guesser is not None
    answers = guesser.generate([item.prompt for item in many])
    assert abs(answers.count("yes") / 4000 - 0.2) < 0.03
    assert guesser.generate([many[7].prompt]) == [answers[7]]


def test_wordings(colours: Path, tmp_path: Path) -> None:
    report = report_of(colours, tmp_path / "out", templates=3)
    spread = report["wordings"]
    values = [one["accuracy"] for one in spread["each"]]
    assert values == [0.5, 0.0, 0.5]  # the second begins with Please
    assert (spread["mean"], spread["min"], spread["max"]) == (fmean(values), 0, 0.5)
    assert spread["sensitivity"] == pytest.approx(pstdev(values) / fmean(values))
    assert "3 wordings: mean 33.3 %, min 0.0 %, max 50.0 %" in (tmp_path / "out" / "report.md").read_text()
    own = load_task(colours).model_copy(update={"templates": ["Say: {question}"]})
    assert [one.prompt for one in wordings(own, 2, pictures=True)] == ["{question}", "Say: {question}"]
    with pytest.raises(ConfigError, match="3 wordings"):
        wordings(own, 3, pictures=True)
    plain = wordings(load_task(colours), len(GENERAL) - 1, pictures=False)
    assert not any("picture" in one.prompt for one in plain)
    assert sensitivity([0.0, 0.0])["sensitivity"] is None


COLOUR_NAMES = ("red", "blue")
BANK = """\
task: colour
fields: [image, name, colour]
templates:
  - {id: a, input: "{{ image }}Which colour?", target: "{{ colour }}"}
  - {id: h, input: "{{ image }}Name the colour.", target: "{{ colour }}", split: held_out}
  - {id: i, input: "Colour? {{ image }}", target: "{{ colour }}", split: held_out}
"""


def test_a_task_with_a_bank_is_asked_in_its_held_out_wordings(tmp_path: Path) -> None:
    (tmp_path / "bank.yaml").write_text(BANK)
    for name in COLOUR_NAMES:
        PIL.Image.new("RGB", (4, 4), name).save(tmp_path / f"{name}.png")
    given = {"meta": {"task": "colour"}}
    rows = [Record.triple("Which colour?", c, images=[str(tmp_path / f"{c}.png")], id=c, **given) for c in COLOUR_NAMES]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    task = {"name": "t", "records": "rows.jsonl", "metric": "exact", "group_by": "task", "bank": ["bank.yaml"]}
    (tmp_path / "task.yaml").write_text(dump_yaml(task))
    loaded = load_task(tmp_path / "task.yaml")
    items = task_items(loaded)
    asked = bank_wordings(loaded, items, 3)
    assert [name for name, _ in asked] == ["as built", "colour/h", "colour/i"]
    assert [one[0].text for _, one in asked] == ["Which colour?", "Name the colour.", "Colour? "]
    assert [one[1].prompt.images for _, one in asked] == [items[1].prompt.images] * 3
    assert [one[1].reference for _, one in asked] == ["blue"] * 3
    spread = report_of(tmp_path / "task.yaml", tmp_path / "out", templates=3)["wordings"]
    assert [one["prompt"] for one in spread["each"]] == ["as built", "colour/h", "colour/i"] and spread["min"] == 0
    with pytest.raises(ConfigError, match="4 wordings"):
        bank_wordings(loaded, items, 4)
    with pytest.raises(ConfigError, match="task 'None' have no templates"):
        bank_wordings(loaded, task_items(loaded.model_copy(update={"group_by": None})), 2)
    (tmp_path / "bank.yaml").write_text(BANK.replace("Name the colour.", "Name it: {{ name }}."))
    with pytest.raises(ConfigError, match="the question needs 'name', and .* only images, image is known"):
        bank_wordings(loaded, items, 2)


class Page(HTMLParser):
    """What a browser would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown, self.sources, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        self.open += [tag] if tag not in ("meta", "img") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_page_shows_the_worst_answers_with_their_pictures(colours: Path, tmp_path: Path) -> None:
    report_of(colours, tmp_path / "out", templates=2)
    page = Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert not page.open
    assert len(page.sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "3 of the 3 answers that are wrong" in page.shown and "<b>round</b>?" in page.shown
    for said in ("tuned model", "y&n", "Wordings", "red-1 y&n", '"metric": "exact"'):
        assert said in page.shown


def test_the_page_names_frequent_mistakes_and_marks_pictures_between_words(tmp_path: Path) -> None:
    row = {"correct": False, "reference": "yes", "parsed": "no", "answer": "No."}
    other = {"correct": False, "reference": "red", "parsed": None, "answer": ""}
    assert mistakes([row, row, other, row | {"correct": True}]) == [("yes", "no", "2"), ("red", "(empty)", "1")]
    assert mistakes([row, other]) == []
    parts: list[Any] = [Image("a.png"), Text("Is "), Image("b.png"), Text(" larger?")]
    assert words_of(Item("1", Record((Turn("user", tuple(parts)),)), "no")) == "Is [picture 2] larger?"


def test_a_metrics_further_numbers_are_in_the_table_s_caption(tmp_path: Path) -> None:
    for name in ("pope", "mme"):
        CASES[name][0](tmp_path / name)
    said_of = {"pope": "precision 50.0 %, recall 100.0 %, F1 66.7 %", "mme": "perception 100, cognition 50"}
    for name, said in said_of.items():
        task = load_task(name, data_root=tmp_path)
        reported(Sees(), task, tmp_path / name, console=Console(file=StringIO()))
        assert said in (tmp_path / name / "report.md").read_text()


def test_the_worst_answers() -> None:
    rows = [{"id": str(n), "group": "ab"[n % 2], "correct": value} for n, value in enumerate([True, 0.3, False, 0.6])]
    shown = {row["id"]: None for row in rows}
    worst, heading = worst_answers([*rows, {"id": "other", "correct": False}], shown, n=2)  # type: ignore[arg-type]
    assert [row["id"] for row in worst] == ["2", "1"] and "2 of the 3" in heading
    assert worst_answers(rows[:1], shown, n=2) == ([], "No answer is wrong")  # type: ignore[arg-type]
    assert len(worst_answers([{"id": "1", "correct": None}], shown, n=2)[0]) == 1  # type: ignore[arg-type]


def test_several_tasks_make_one_table(colours: Path, tmp_path: Path) -> None:
    tasks = []
    for name in ("pope", "mme", "mmlu"):
        task = load_task(name, data_root=tmp_path / "data")
        CASES[name][0](Path(task.folder or ""))
        tasks.append(task)
    tasks.append(load_task(colours))
    out, shown = tmp_path / "out", StringIO()
    reports = run_tasks(
        Subject(Sees(), "runs/a_b", "f", untuned=lambda: Sees()),
        [(task, task_items(task)) for task in tasks],
        folder_of=lambda task: out / task.name,
        summary_in=out,
        beside=Beside(probes=("blank", "swap")),
        how=How(console=Console(file=shown, width=200), progress=False),
    )
    by_name = {report["task"]: report for report in reports}
    assert by_name["pope"]["accuracy"] == 0.5 and by_name["mme"]["accuracy"] == 150  # half right, none in pairs
    assert by_name["pope"]["by_type"].keys() == {"random", "popular", "adversarial"}
    assert by_name["mme"]["details"]["perception"] and by_name["pope"]["details"]["f1"]
    assert by_name["mmlu"]["accuracy"] == 0.5  # C is the likeliest letter, and right once
    rows = [json.loads(line) for line in (out / "mmlu" / "answers-tuned.jsonl").read_text().splitlines()][1:]
    assert [row["answer"] for row in rows] == ["C", "C"] and rows[0]["likelihoods"] == [-1, -1, 0, -1]
    text = (out / "summary.md").read_text()
    lines = text.splitlines()
    assert all(line.count("|") == 12 for line in lines[:6]) and re.match(
        r"\| pope +\| pope:official +\| +50.0 \|", lines[2]
    )
    assert re.search(r"\| mme +\| mme:lmms +\| 150.0 \|", text) and "runs/a_b" in text
    assert json.loads((out / "summary.json").read_text())["tasks"] == reports
    tex = latex(reports)
    assert tex == (out / "summary.tex").read_text() and tex.count("\\\\\n") == 5
    page = Page((out / "summary.html").read_text("utf-8"))
    assert not page.open and re.search(r"answers that are wrong", page.shown)
    assert text.strip() in shown.getvalue()


def test_likelihood_tasks_need_a_model_that_tells_them(tmp_path: Path) -> None:
    task = load_task("hellaswag", data_root=tmp_path)
    CASES["hellaswag"][0](tmp_path / "hellaswag")

    class Writes:
        def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
            return [""] * len(records)

    with pytest.raises(ModelError, match="likelihoods of choices"):
        answered(Writes(), task, out_dir=tmp_path / "a")
    result = answered(Lazy(lambda: Sees()), task, out_dir=tmp_path / "b")
    assert result.score.n == 1


def test_likelihood_per_character(tmp_path: Path) -> None:
    write_jsonl([Record.triple("q?", "long answer", id="1", meta={"choices": ["ab", "long answer"]})], tmp_path / "r")

    class Scores(Sees):
        def score(self, records: Sequence[Record], choices: Any, **options: Any) -> list[list[float]]:
            return [[-4.0, -11.0] for _ in records]  # -2 and -1 a character

    for kind, right in (("likelihood", 0), ("likelihood_per_character", 1)):
        task = Task(name="t", records=str(tmp_path / "r"), metric="exact:strict", answer_by=kind)  # type: ignore[arg-type]
        result = answered(Scores(), task, out_dir=tmp_path / kind)
        assert result.score.value == right
