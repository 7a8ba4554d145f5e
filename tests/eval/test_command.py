"""`mmit eval` of an endpoint and `mmit compare`, from the command line to the files; mistakes end with one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.configs import shipped
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


def mmit(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
