"""`mmit eval` in real processes: killed ten times, or shared by two and four ranks, it ends with the same file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.records import Image, Record, Text, Turn, write_jsonl
from mmit.train.run import run
from tests.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = 240
OPTIONS = ("--batch-size", "2", "--baseline-n", "40", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, a task of 240 questions, and the results of an evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("processes")
    run(tiny_config(folder, train={"steps": 2}))
    records = []
    for number in range(QUESTIONS):
        picture = Image(str(folder / "data" / f"{number // 20}.png"))
        turns = (Turn("user", (picture, Text(f"Is it {number}?"))), Turn("assistant", (Text("yes"),)))
        records.append(Record(turns, id=str(number)))
    write_jsonl(records, folder / "test.jsonl")
    (folder / "task.yaml").write_text("name: t\nrecords: test.jsonl\nmetric: exact\nmax_new_tokens: 6\n")
    result = CliRunner().invoke(app, [*command(folder, "whole"), *OPTIONS])
    assert result.exit_code == 0, result.output
    return folder


def command(folder: Path, out: str) -> list[str]:
    return ["eval", str(folder / "run"), "--task", str(folder / "task.yaml"), "--out", str(folder / out)]


def started(arguments: list[str], timeout: float) -> str:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def answers(folder: Path) -> dict[str, list[bytes]]:
    """The sorted lines of every file of answers."""
    return {path.name: sorted(path.read_bytes().splitlines()) for path in folder.glob("answers-*")}


@pytest.mark.slow
def test_killed_ten_times_an_evaluation_ends_with_the_same_files(folder: Path) -> None:
    said = started(
        ["-m", "tests.eval.killed", str(folder / "killed"), "10", *command(folder, "killed"), *OPTIONS], timeout=300
    )
    assert "killed 10, then ended with 0" in said
    whole = answers(folder / "whole")
    assert len(whole["answers-tuned.jsonl"]) == QUESTIONS + 1 and len(whole) >= 4
    assert answers(folder / "killed") == whole


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_torchrun_end_with_the_file_of_one_process(folder: Path, ranks: int) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    out = f"ranks-{ranks}"
    started([*launcher, "-m", "mmit", *command(folder, out), *OPTIONS, "--no-baselines"], timeout=300)
    assert answers(folder / out) == {
        name: lines for name, lines in answers(folder / "whole").items() if name == "answers-tuned.jsonl"
    }


@pytest.mark.slow
def test_ranks_that_mmit_starts_end_with_the_file_of_one_process(folder: Path) -> None:
    started(["-m", "mmit", *command(folder, "devices"), *OPTIONS, "--no-baselines", "--devices", "2"], timeout=300)
    assert answers(folder / "devices") == {
        name: lines for name, lines in answers(folder / "whole").items() if name == "answers-tuned.jsonl"
    }
