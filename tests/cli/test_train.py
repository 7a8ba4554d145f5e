"""`mmit train`: its config either way, the rest of a run, the launcher's script."""

from __future__ import annotations

import json
from pathlib import Path

from mmit.cli.train import split_arguments
from tests.cli.commands import ROOT, good, mmit, python


def test_train_takes_its_config_either_way():
    file = Path("x.yaml")
    assert split_arguments(file, ["a.b=1"]) == (file, ["a.b=1"])
    assert split_arguments(None, ["x.yaml", "a.b=1", "resume=auto"]) == (file, ["a.b=1", "run.resume=auto"])
    # A file after --config is no override, and load_config will say so.
    assert split_arguments(file, ["y.yaml"]) == (file, ["y.yaml"])
    for nothing in ([], ["a.b=1"]):
        result = mmit("train", *nothing)
        assert result.exit_code == 2 and "--config" in result.stderr


def test_train_and_resume(fresh):
    endless = ("train.schedule=constant", "train.warmup=0")  # whose runs may be made longer
    good("train", fresh / "config.yaml", "train.steps=2", *endless)
    again = mmit("train", fresh / "config.yaml", "train.steps=2")
    assert again.exit_code == 2 and "resume=auto" in again.stderr
    longer = good("train", "--config", fresh / "config.yaml", "train.steps=4", "resume=auto", *endless)
    assert "resume: train.steps was 2 and is 4" in longer.stderr
    steps = [json.loads(line)["step"] for line in (fresh / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_script_for_the_launcher_is_the_same_command(made):
    script = [str(ROOT / "scripts" / "train.py"), "--local_rank=0", "--config", str(made / "config.yaml")]
    result = python(*script, "train.stps=3")
    assert result.returncode == 2 and "train.stps: unknown key" in result.stderr
    assert "(rank 1)" in python(*script, "train.stps=3", WORLD_SIZE="2", RANK="1").stderr
