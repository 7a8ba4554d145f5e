"""What a user sees of a run, an answer, an evaluation and an export holds no warning of a library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmit.yamlio import dump_yaml
from tests.tiny_run import DROPOUT, tiny_config

ROOT = Path(__file__).parents[1]
# As Python prints them, and as libraries log them; mmit's own lines begin with "warning:".
WARNING = re.compile(r"\w*Warning: |[Dd]eprecat|will be removed")


def mmit(*arguments: object) -> str:
    """Run a command as a user does, in a process of its own with Python's own filters; returns all it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", "mmit", *map(str, arguments)],
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    return said


def warnings_in(said: str) -> list[str]:
    return [line for line in said.splitlines() if WARNING.search(line)]


def test_what_counts_as_a_warning() -> None:
    said = "a.py:3: FutureWarning: x\n`torch_dtype` is deprecated! Use `dtype`\nstep 1  loss 2.0\nUserWarning: y"
    assert len(warnings_in(said)) == 3


@pytest.mark.slow
def test_no_command_shows_a_warning_of_a_library(tmp_path: Path) -> None:
    data = {**tiny_config(tmp_path).data.model_dump(), "workers": 2}
    train = {"steps": 2, "rows_per_step": 2, "save_every": 1, "schedule": "constant", "warmup": 0}
    config = tiny_config(tmp_path, data=data, train=train, tune=DROPOUT).model_dump()
    config["model"]["vision"]["fit"] = "pad"  # which LLaVA's own layout can hold
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    (tmp_path / "task.yaml").write_text(
        f"name: own\nrecords: {tmp_path / 'data' / 'train.jsonl'}\nmetric: exact\nmax_new_tokens: 4\n"
    )
    run, picture = tmp_path / "run", tmp_path / "data" / "0.png"
    ask = ("-p", "What color is it?", "--max-new-tokens", 4)
    exports = [("export", run, "--out", tmp_path / f, "--format", f) for f in ("llava-hf", "llava", "peft", "mmit")]
    commands: list[tuple[object, ...]] = [
        ("train", "--config", tmp_path / "config.yaml"),
        ("train", "--config", tmp_path / "config.yaml", "train.steps=4", "run.resume=auto"),
        ("chat", run, "--image", picture, *ask),
        ("eval", run, "--task", tmp_path / "task.yaml", "--limit", 4, "--baseline-n", 2, "--batch-size", 2),
        *exports,
        ("chat", tmp_path / "llava-hf", "--image", picture, *ask),
    ]
    shown = {" ".join(map(str, command)): warnings_in(mmit(*command)) for command in commands}
    assert not any(shown.values()), shown
