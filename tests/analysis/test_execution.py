"""A study's folder is its own, its failures are told, and its commands can be typed again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mmit.analysis.config import load_study
from mmit.analysis.execution import claim, run_study
from mmit.analysis.report import write_report
from mmit.analysis.study import Study
from mmit.errors import ConfigError
from mmit.records import Record, write_jsonl
from tests.analysis.worlds import here, write_world


def test_another_study_or_base_in_the_folder_is_refused(tmp_path: Path) -> None:
    path, out = write_world(tmp_path), tmp_path / "out"
    claim(Study(load_study(path), path, out))
    claim(Study(load_study(path), path, out))
    text = path.read_text()
    path.write_text(text.replace("train.steps: 2", "train.steps: 3"))
    with pytest.raises(ConfigError, match=r"config=\{'train.steps': 2\} was, config=\{'train.steps': 3\} is now"):
        run_study(Study(load_study(path), path, out), jobs=1, say=print, execute=here)
    path.write_text(text)
    base = path.parent / "base.yaml"
    base.write_text(base.read_text() + "\n# changed\n")
    with pytest.raises(ConfigError, match="another base"):
        run_study(Study(load_study(path), path, out), jobs=1, say=print, execute=here)


@pytest.mark.parametrize("below", ["records", "."])
def test_other_records_in_files_of_the_same_names_are_refused(tmp_path: Path, below: str) -> None:
    file = tmp_path / "rows" / below / "t.jsonl"
    file.parent.mkdir(parents=True)
    write_jsonl([Record.triple("q", "a", meta={"task": "t"})] * 4, file)
    arms = {"a": {"data.size": 1}, "b": {"data.size": 2}}
    given = {"build": None, "records": "rows", "arms": arms, "questions": {"q": {"task": "pope"}}}
    path = write_world(tmp_path, study="size", **given)
    claim(Study(load_study(path), path, tmp_path / "out"))
    write_jsonl([Record.triple("q", "b", meta={"task": "t"})] * 4, file)
    with pytest.raises(ConfigError, match="a study with another records"):
        claim(Study(load_study(path), path, tmp_path / "out"))


def test_a_failed_arm_is_told_and_stops_no_other(tmp_path: Path) -> None:
    arms = {"all 100 %": {}, "too many": {"data.size": 1000}}
    path = write_world(tmp_path, study="size", arms=arms, seeds=[0])
    study = Study(load_study(path), path, tmp_path / "out")
    run_study(study, jobs=1, say=lambda text: None, execute=here)
    report = write_report(study)
    assert "1000 records are asked for, but there are 24" in report
    told = next(line for line in report.splitlines() if "1000 records" in line)
    assert told.startswith("- too many, seed 0: ") and told.count("mmit analyse arm") == 1
    assert "| all 100 % |" in report and "One seed: there is no interval" in report


def test_commands_can_be_typed_into_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "it's in $HOME"
    path = write_world(folder)
    study = Study(load_study(path), path, folder / "out")
    for step in study.steps:
        assert "$HOME" in step.shown and tuple(shlex.split(step.shown)) == ("mmit", *step.command)
