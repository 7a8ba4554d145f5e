"""Commands of mmit run in this process or in one of its own, and the one message that a mistake gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mmit.cli import app
from mmit.yamlio import dump_yaml

ROOT = Path(__file__).parents[2]


def mmit(*arguments: object, input: str | None = None) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input, env={"COLUMNS": "200"})


def good(*arguments: object, input: str | None = None) -> Any:
    """Run a command that has to succeed."""
    result = mmit(*arguments, input=input)
    assert result.exit_code == 0, result.output
    return result


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with this repository's mmit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )


def assert_one_message(result: Any, *expected: str) -> None:
    """Exit code 2 and, on stderr alone, one error with what is expected in it and a remedy on its own line."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.output
    message = result.stderr[result.stderr.index("error: ") :]
    for text in expected:
        assert text in message, message


def write_task(folder: Path) -> Path:
    task = {
        "name": "colours",
        "records": str(folder / "data" / "train.jsonl"),
        "metric": "exact",
        "max_new_tokens": 4,
        "answers": ["red", "green", "blue", "black", "yes"],
    }
    path = folder / "colours.yaml"
    path.write_text(dump_yaml(task))
    return path
