"""`mmit eval` of endpoints and runs, and `mmit compare`, down to the files; a mistake ends with one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmit.configs import shipped
from mmit.generate import Model
from tests.cli.commands import assert_one_message, good, mmit, write_task
from tests.eval.benchmarks import CASES
from tests.eval.test_judges import Stub


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("pope", "mmvet"):
        CASES[name][0](tmp_path / "data" / name)
    return tmp_path / "data"


def answer(body: dict[str, Any]) -> tuple[int, Any]:
    content = body["messages"][0]["content"]
    return 200, "0.5" if isinstance(content, str) and "Correctness" in content else "yes"


def test_an_endpoint_on_two_tasks_with_a_judge_then_compared(stub: Stub, data: Path, tmp_path: Path) -> None:
    stub.reply = answer
    judge = ("--judge-url", stub.url, "--judge-model", "judge")
    tasks = ("--tasks", "pope, mmvet", "--data-root", data, "--probe", "blank,swap")
    for name in ("a", "b"):
        out = tmp_path / name
        model = ("--model", stub.url, "--endpoint-model", "m")
        result = mmit("eval", *model, *tasks, "--templates", 2, "--out", out, *judge)
        assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    pope, mmvet = summary["tasks"]
    assert (pope["accuracy"], pope["n"], pope["chance"]["n"]) == (0.5, 6, 6) and len(pope["wordings"]["each"]) == 2
    # 6 questions, 6 without and 6 with another picture (of two), 6 in another wording; then those of the other task.
    assert pope["ledger"]["m"]["requests"] == 24 and pope["ledger"]["m"]["cost"] == 0
    assert mmvet["ledger"].keys() == {"m", "judge"} and mmvet["ledger"]["judge"]["attempts"] >= 1
    assert mmvet["accuracy"] == 0.5 and (out / "mmvet" / "judgements.jsonl").exists()
    assert pope["notes"]["untuned"] == "an endpoint shows the model alone"
    assert "| pope " in result.output and (out / "pope" / "report.html").exists()
    result = mmit("eval", "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.json")
    assert "is now `mmit compare`" in result.stderr
    assert result.exit_code == 0 and "paired, by image" in result.output
    found = json.loads((tmp_path / "c.json").read_text())["tasks"]
    assert {one["task"]: one["difference"]["difference"] for one in found} == {"pope": 0, "mmvet": 0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-t", "gqa"], "testdev_balanced_questions.json"),
        (["-t", "gqqa"], "did you mean 'gqa'"),
        (["-t", "mmvet"], "needs a judge"),
        (["-t", "pope", "--probe", "swop"], "did you mean 'swap'"),
        (["-t", "pope"], "give --out"),
        (["-t", "pope", "--out", "x"], "no model named"),
        (["-t", "pope", "--templates", "99", "--out", "x"], "99 wordings"),
        (["-t", "pope,{pope}"], "two tasks have one name, 'pope'"),
        (["-t", "pope", "--model", "m"], "two models"),
    ],
)
def test_mistakes(arguments: list[str], said: str, data: Path) -> None:
    named = [word.replace("{pope}", str(shipped("eval")["pope"])) for word in arguments]
    result = mmit("eval", "http://127.0.0.1:9/v1", "--data-root", data, *named)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


# a run


def test_eval_reports_the_score_beside_three_baselines(made, tmp_path):
    task = write_task(made)
    result = good("eval", made / "run", "--task", task, "--limit", 6, "--baseline-n", 3, "--batch-size", 4)
    folder = made / "run" / "eval" / "colours"
    report = json.loads((folder / "report.json").read_text())
    assert report["n"] == 6 and report["baselines"].keys() == {"majority", "untuned", "blank_image"}
    assert all(report["baselines"].values()) and report["baselines"]["untuned"]["n"] == 3
    for name in ("tuned model", "majority answer", "untuned model", "blank image"):
        assert name in result.output
    answers = [json.loads(line) for line in (folder / "answers-tuned.jsonl").read_text().splitlines()]
    assert len(answers) == 7 and answers[1]["prompt"]
    assert report["number_format"] == answers[0]["number_format"] == "fp32"
    other = mmit("eval", made / "run", "--task", task, "--limit", 8, "--baseline-n", 3, "--dtype", "bf16")
    assert_one_message(other, "number_format was 'fp32', is now 'bf16'", "--dtype fp32")
    good("eval", made / "run", "--task", task, "--limit", 6, "--no-baselines", "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["n"] == 6 and not any(report["baselines"].values())
    assert not (tmp_path / "out" / "answers-untuned.jsonl").exists()


def test_eval_of_a_run_that_goes_on_and_removes_the_checkpoint(made, tmp_path, monkeypatch):
    """The untuned model is loaded last: the checkpoint that was evaluated may be gone by then."""
    shutil.copytree(made / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    shutil.copytree(checkpoint, checkpoint.with_name("step-000002"))
    real = Model.generate

    def generate(self, *args, **options):
        shutil.rmtree(checkpoint, ignore_errors=True)
        return real(self, *args, **options)

    options = ("--task", write_task(made), "--limit", 4, "--baseline-n", 3, "--probe", "none")
    good("eval", made / "run", *options, "--out", tmp_path / "kept")
    monkeypatch.setattr(Model, "generate", generate)
    good("eval", tmp_path / "run", *options, "--out", tmp_path / "gone")
    assert not checkpoint.exists()
    for name in ("tuned", "untuned"):
        kept, gone = (
            [json.loads(line)["answer"] for line in (folder / f"answers-{name}.jsonl").read_text().splitlines()[1:]]
            for folder in (tmp_path / "kept", tmp_path / "gone")
        )
        assert kept == gone and len(kept) >= 3
