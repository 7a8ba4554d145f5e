"""A command in a fork sees what a user's would, and tells how it ended."""

from __future__ import annotations

import os

from mmit.analysis import forks


def test_exit_code_output_and_environment_are_those_of_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "IMPORTED", [])  # torch would take seconds
    log = tmp_path / "log"
    environment = {**os.environ, "COLUMNS": "60", "NO_COLOR": "1"}
    assert forks.run_command(["--version"], log, environment) == 0
    first = log.read_text()
    assert first.startswith("mmit ")
    assert forks.run_command(["analyse", "report", "none.yaml", "--out", str(tmp_path)], log, environment) != 0
    told = log.read_text().removeprefix(first)
    assert "none.yaml" in told and "error" in told
