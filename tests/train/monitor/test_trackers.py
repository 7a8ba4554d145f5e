"""Trackers: one that is missing is told at once, and a run that goes on goes on in the same run there."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mmit.errors import ConfigError
from mmit.train.monitor import trackers
from mmit.train.run import run
from tests.tiny_run import tiny_config

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "swanlab"])
def test_a_tracker_that_is_missing_is_told_before_anything_is_loaded(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda found: None)
    config = tiny_config(tmp_path, train={"steps": 1, "report_to": [name]})
    with pytest.raises(ConfigError, match="is not installed") as error:
        run(config)
    assert f"mmit-tune[{name}]" in error.value.remedy and error.value.where == "train.report_to"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="tensorboard"):
        tiny_config(tmp_path, train={"steps": 1, "report_to": ["tensorbord"]})


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    # It reads the folder when it is imported.
    code = """
import sys
from pathlib import Path
from mmit.train.monitor.trackers import open_trackers
for step in (1, 2):
    (tracker,) = open_trackers(["trackio"], Path(sys.argv[1]), {"run.seed": 0})
    tracker.begin(step - 1)
    tracker.log(step, {"loss": 1.0 / step})
    tracker.close()
"""
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept"), "TRACKIO_PROJECT": "tests", "PYTHONPATH": str(ROOT)}
    (tmp_path / "run").mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    identity = json.loads((tmp_path / "run" / "trackio.json").read_text())["id"]
    with sqlite3.connect(tmp_path / "kept" / "tests.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(text)) for name, step, text in rows] == [
        (f"run-{identity}", 1, {"loss": 1.0}),
        (f"run-{identity}", 2, {"loss": 0.5}),
    ]


@pytest.mark.slow
def test_swanlab_keeps_a_run_here_and_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    for step in (1, 2):
        (tracker,) = trackers.open_trackers(["swanlab"], tmp_path, {"run.seed": 0})
        tracker.begin(step - 1)
        tracker.log(step, {"loss": 1.0 / step})
        tracker.close()
    identity = json.loads((tmp_path / "swanlab.json").read_text())["id"]
    kept = sorted((tmp_path / "swanlab").glob(f"run-*-{identity}"))
    assert kept and all((folder / f"run-{identity}.swanlab").stat().st_size for folder in kept)
    monkeypatch.setenv("SWANLAB_MODE", "online")
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    with pytest.raises(ConfigError, match="SwanLab refuses: ") as error:
        trackers.open_trackers(["swanlab"], tmp_path, {})
    assert "swanlab login" in error.value.remedy and error.value.where == "train.report_to"
