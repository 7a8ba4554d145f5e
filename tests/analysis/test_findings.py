"""What a study found, from answers on file: no model runs here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmit.analysis.config import StudyConfig
from mmit.analysis.findings import findings
from mmit.analysis.kinds import ALWAYS, LIMITS
from mmit.analysis.statistics import contrast, judged
from mmit.analysis.study import Cell, Step
from mmit.eval.answers import TUNED
from mmit.records import Record, write_jsonl
from mmit.train.monitor.run_files import METRICS

Score = Callable[[str, int, int], bool]  # arm, seed, question: whether the answer is right
QUESTIONS = 24


class World:
    """A study in a folder whose cells are finished, but for those in `failed` and `waiting`."""

    def __init__(self, out: Path, right: Score, **changes: Any) -> None:
        given = {"study": "custom", "question": "Does it help?", "base": "b.yaml", "records": "rows.jsonl"}
        arms: dict[str, Any] = {"plain": {}, "more": {"data.size": 20}}
        given |= {"arms": arms, "seeds": [0, 1], "questions": {"all": {"records": "q.jsonl"}}, "controls": False}
        self.config = StudyConfig.model_validate(given | changes)
        self.out, self.steps, self.trained = out, [Step("train", "t", ("train", "--x", "a b"), (), out)], rows()
        self.cells = [self._cell(arm, seed, right) for seed in self.config.seeds for arm in self.config.arms]
        for name in self.config.questions:
            (out / "questions" / name).mkdir(parents=True)
            asked = [Record.triple(f"Which of {n}?", label(n), id=str(n), meta=meta(n)) for n in range(QUESTIONS)]
            write_jsonl(asked, out / "questions" / name / "questions.jsonl")

    def _cell(self, arm: str, seed: int, right: Score) -> Cell:
        folder = self.out / arm / str(seed)
        for name in self.config.questions:
            place = self.answers_of(arm, seed, name)
            place.mkdir(parents=True)
            lines = [json.dumps({"settings": 1})]
            for n in range(QUESTIONS):
                row = {"id": str(n), "prompt": f"Which of {n}?", "images": [f"image {n // 2}"], "reference": label(n)}
                good = right(arm, seed, n)
                row |= {"group": None, "answer": label(n) if good else "I am sorry", "correct": good}
                lines.append(json.dumps(row))
            (place / TUNED).write_text("\n".join(lines) + "\n")
        (folder / "run").mkdir()
        steps = [{"step": n, "epoch": n / 2, "loss": 1.0, "records": 3, "tokens": 10 * seed + n} for n in (1, 2)]
        more = {"seconds": 0.5, "tokens_per_s": 1.0, "skipped_steps": 0, "bad_records": 0}
        (folder / "run" / METRICS).write_text("".join(json.dumps(row | more) + "\n" for row in steps))
        return Cell(arm, seed, folder, (Step("eval", "e", (), (folder / "done",), folder),))

    def finish(self, *but: tuple[str, int]) -> World:
        for cell in self.cells:
            if (cell.arm, cell.seed) not in but:
                (cell.folder / "done").write_text("")
        return self

    def answers_of(self, arm: str, seed: int, name: str) -> Path:
        return self.out / arm / str(seed) / "eval" / name

    def keys_of(self, arm: str) -> dict[str, Any]:
        return self.config.arms[arm]

    def own_records(self) -> list[Record]:
        return self.trained

    @property
    def found(self) -> dict[str, Any]:
        return findings(self)  # type: ignore[arg-type]


def label(n: int) -> str:
    return "left" if n % 4 else "right"


def meta(n: int) -> dict[str, Any]:
    return {"task": f"side{n % 2}", "build": {"template": f"w{n % 3}"}}


def rows(count: int = 40) -> list[Record]:
    return [Record.triple(f"Train {n}?", label(n), meta={"task": f"side{n % 2}"}) for n in range(count)]


def better(arm: str, seed: int, n: int) -> bool:
    """The second arm is right where the first is, and in half of the rest; seeds differ in a question."""
    return n % 5 <= seed or (arm == "more" and n % 2 == 0)


def test_means_contrasts_and_baselines_are_those_of_the_answers_on_file(tmp_path: Path) -> None:
    found = World(tmp_path, better).finish().found
    of = found["questions"]["all"]
    expected = {a: np.array([[better(a, s, n) for n in range(QUESTIONS)] for s in (0, 1)]) for a in ("plain", "more")}
    assert of["n"] == QUESTIONS and of["images"] == QUESTIONS // 2
    for arm, scores in expected.items():
        assert of["arms"][arm]["mean"] == pytest.approx(scores.mean()) and of["arms"][arm]["seeds"] == 2
        for task in (0, 1):
            assert of["by_task"][f"side{task}"][arm] == pytest.approx(scores[:, task::2].mean())
    scores = {arm: {seed: row.astype(float) for seed, row in enumerate(rows)} for arm, rows in expected.items()}
    images = [f"image {n // 2}" for n in range(QUESTIONS)]
    alone = judged([contrast("more", "plain", scores, images, margin=found["margin"])])
    assert found["contrasts"] == [{"questions": "all", **alone[0].to_json()}]
    # Of training, "left" is all of side1 and half of side0.
    assert of["spaces_from_answers"] == ["side0", "side1"]
    assert of["baselines"]["random in label space"] == pytest.approx((0.5 + 1) / 2)
    commonest = np.mean([label(n) == "left" for n in range(QUESTIONS)])
    assert of["baselines"]["commonest answer of the task"] == pytest.approx(commonest)
    assert found["cannot_tell"] == [LIMITS["custom"], *ALWAYS]


def test_holm_covers_all_contrasts_of_all_sets_of_questions(tmp_path: Path) -> None:
    one = World(tmp_path / "one", better).finish().found["contrasts"]
    sets = {"a": {"records": "q.jsonl"}, "b": {"records": "q.jsonl"}, "c": {"records": "q.jsonl"}}
    three = World(tmp_path / "three", better, questions=sets).finish().found["contrasts"]
    assert [row["questions"] for row in three] == ["a", "b", "c"] and {row["p"] for row in three} == {one[0]["p"]}
    assert three[0]["holm"] == pytest.approx(min(1, 3 * one[0]["p"])) and one[0]["holm"] == one[0]["p"]


def test_what_failed_and_what_has_not_run_is_listed_and_enters_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, better).finish(("more", 0), ("more", 1))
    (world.out / "more/0/failed.json").write_text(json.dumps({"step": "train", "log": "train.log"}))
    found = world.found
    assert found["failed"] == [{"arm": "more", "seed": 0, "step": "train", "log": "train.log"}]
    assert found["waiting"] == ["more, seed 1"] and found["contrasts"] == []
    assert found["questions"]["all"]["arms"].keys() == {"plain"} and found["arms"]["more"]["cost"] == {}
    assert found["commands"] == ["mmit train --x 'a b'"]
    nothing = World(tmp_path / "none", better).found
    assert nothing["questions"]["all"] == {"n": 0, "arms": {}, "baselines": {}, "by_task": {}}


def test_the_cost_of_an_arm_is_the_mean_over_its_runs(tmp_path: Path) -> None:
    cost = World(tmp_path, better).finish().found["arms"]["more"]["cost"]
    assert cost == {"steps": 2, "epochs": 1, "records": 6, "tokens": (3 + 23) / 2, "seconds": 1}


def test_one_seed_and_questions_that_are_trained_on_are_told(tmp_path: Path) -> None:
    world = World(tmp_path, better, seeds=[3]).finish()
    assert world.found["cannot_tell"][0].startswith("One seed: there is no interval")
    world.trained = [*rows(), *(Record.triple(f" Which of {n}? ", "x", meta={"task": "side0"}) for n in range(5))]
    told = world.found["cannot_tell"][1]
    assert told.startswith("5 of 24 questions of 'all' are among the records that are trained on")
    world.trained = [Record.triple("Which of 1?", "x", images=[b"another image"], meta={"task": "side0"})]
    assert len(world.found["cannot_tell"]) == 2 + len(ALWAYS)  # the same words about an image are another question


def test_controls_are_named_in_words_where_they_ran(tmp_path: Path) -> None:
    world = World(tmp_path, better).finish()
    (tmp_path / "controls/all").mkdir(parents=True)
    report = {"baselines": {"blank_image": {"accuracy": 0.25}, "swapped_images": None}, "untuned": {"accuracy": 0.125}}
    (tmp_path / "controls/all/report.json").write_text(json.dumps(report))
    baselines = world.found["questions"]["all"]["baselines"]
    assert baselines["first arm, blank images"] == 0.25 and baselines["the model before tuning"] == 0.125
    assert "first arm, images of other questions" not in baselines


@pytest.mark.parametrize("amounts", [(10, 20, 40, 80), (10, 20, None, "all")])
def test_a_trend_is_over_the_arms_whose_amount_is_a_number(tmp_path: Path, amounts: tuple[Any, ...]) -> None:
    """A question more is right with every doubling, whatever the seed."""
    arms = {f"n{place}": {} if size is None else {"data.size": size} for place, size in enumerate(amounts)}
    if amounts[-1] == "all":
        arms["n3"] = {"config.train.steps": 5}

    def right(arm: str, seed: int, n: int) -> bool:
        return n < 6 + 3 * int(arm[1]) + seed

    trend = World(tmp_path, right, study="size", arms=arms).finish().found["questions"]["all"]["trend"]
    assert trend["key"] == "data.size" and trend["slope_per_doubling"]["slope"] == pytest.approx(3 / QUESTIONS)
    assert trend["slope_per_doubling"]["ci95"] == pytest.approx([3 / QUESTIONS] * 2)
    assert (trend["curve"] is None) == (amounts[-1] == "all")  # two amounts make no curve
    if amounts[-1] == "all":
        return
    tasks = {arm: {"data.task_count": keys["data.size"]} for arm, keys in arms.items()}
    found = World(tmp_path / "tasks", right, study="tasks", arms=tasks).finish().found["questions"]["all"]["trend"]
    assert found == {"key": "data.task_count", "slope_per_doubling": trend["slope_per_doubling"]}
    other = World(tmp_path / "custom", right, arms=arms).finish().found["questions"]["all"]
    assert other["trend"] is None and other["mixture"] is None and other["style"] == {}


def test_style_is_counted_for_each_arm_and_learned_from_its_training_answers(tmp_path: Path) -> None:
    frame = "Let me think. {answer} is what I see."
    world = World(
        tmp_path, better, study="imitation", style="rules", arms={"plain": {}, "styled": {"data.style": frame}}
    )
    for arm, text in (("plain", "left"), ("styled", "Let me think. left is what I see.")):
        place = tmp_path / arm / "0" / "data" / "records"
        place.mkdir(parents=True)
        write_jsonl([Record.triple(f"q{n}", text) for n in range(4)], place / "a.jsonl")
        answers = world.answers_of(arm, 0, "all") / TUNED
        if arm == "styled":
            answers.write_text(answers.read_text().replace('"answer": "left"', f'"answer": "{text}"'))
    style = world.finish().found["questions"]["all"]["style"]
    assert style["plain"]["in_frame"] == 0 < style["styled"]["in_frame"]
    assert style["plain"]["learned"] < style["styled"]["learned"] and style["plain"]["answers"] == 2 * QUESTIONS
