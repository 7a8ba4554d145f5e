"""A study's folder is its own, its failures are told, and its commands can be typed again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mmit.analysis.config import load_study
from mmit.analysis.data import write_questions
from mmit.analysis.execution import claim, run_study
from mmit.analysis.findings import findings
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


def test_other_questions_in_the_file_that_was_asked_are_refused(tmp_path: Path) -> None:
    write_jsonl([Record.triple("q", "a", meta={"task": "t"})] * 4, tmp_path / "train.jsonl")
    write_jsonl([Record.triple("r", "a", meta={"task": "t"})], tmp_path / "test.jsonl")
    arms, asked = {"a": {"data.size": 1}, "b": {"data.size": 2}}, {"records": "test.jsonl"}
    given = {"study": "size", "build": None, "records": "train.jsonl", "arms": arms}
    path = write_world(tmp_path, **given, questions={"mine": asked})
    claim(Study(load_study(path), path, tmp_path / "out"))
    write_jsonl([Record.triple("r", "b", meta={"task": "t"})], tmp_path / "test.jsonl")
    with pytest.raises(ConfigError, match="the file of the questions 'mine' has changed"):
        claim(Study(load_study(path), path, tmp_path / "out"))
    # As the remedy says.
    (tmp_path / "test.jsonl").rename(tmp_path / "new.jsonl")
    write_jsonl([Record.triple("r", "a", meta={"task": "t"})], tmp_path / "test.jsonl")
    path = write_world(tmp_path, **given, questions={"mine": asked, "new": {"records": "new.jsonl"}})
    claim(Study(load_study(path), path, tmp_path / "out"))


def test_questions_that_are_trained_on_are_told(tmp_path: Path) -> None:
    trained = [Record.triple(f"q{number}", "a", id=str(number), meta={"task": "t"}) for number in range(4)]
    new = Record.triple("new", "a", id="new", meta={"task": "t"})
    write_jsonl(trained, tmp_path / "train.jsonl")
    write_jsonl([*trained[:2], new], tmp_path / "test.jsonl")
    write_jsonl([new], tmp_path / "new.jsonl")
    asked = {"mine": {"records": "test.jsonl"}, "other": {"records": "new.jsonl"}}
    arms = {"a": {"data.size": 1}, "b": {"data.size": 2}}
    path = write_world(tmp_path, study="size", build=None, records="train.jsonl", arms=arms, questions=asked)
    study = Study(load_study(path), path, tmp_path / "out")
    for name, questions in study.config.questions.items():
        folder = study.out / "questions" / name
        write_questions(study.records_in(tmp_path / str(questions.records)), questions, folder, name=name)
    told = [line for line in findings(study)["cannot_tell"] if "trained on" in line]
    assert len(told) == 1 and told[0].startswith("2 of 3 questions of 'mine' are among the records")


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
