"""The files of a study: arms with their configs, and questions that give each task as many as can be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmit.analysis.config import QuestionsConfig
from mmit.analysis.data import base_records, write_arm, write_questions
from mmit.errors import ConfigError
from mmit.records import Record, read_jsonl, write_jsonl
from mmit.yamlio import parse_yaml


def records(**counts: int) -> list[Record]:
    made = [(task, n) for task, count in counts.items() for n in range(count)]
    return [Record.triple(f"{task} {n}", "yes", meta={"task": task}, id=f"{task}{n}") for task, n in made]


def yaml(path: Path) -> dict[str, Any]:
    found, _ = parse_yaml(path.read_text(), where=str(path))
    return dict(found)


def asked(folder: Path, given: list[Record], **options: Any) -> Counter[Any]:
    write_questions(given, QuestionsConfig(**options), folder, name="q")
    return Counter(record.meta["task"] for record in read_jsonl(folder / "questions.jsonl"))


def test_a_small_task_gives_all_it_has_and_the_others_share_the_rest(tmp_path: Path) -> None:
    given = records(a=2, b=30, c=40)
    assert asked(tmp_path, given, limit=20) == {"a": 2, "b": 9, "c": 9}
    first = (tmp_path / "questions.jsonl").read_bytes()
    assert asked(tmp_path, given, limit=20) and (tmp_path / "questions.jsonl").read_bytes() == first  # a fixed sample
    assert asked(tmp_path, given, limit=999) == {"a": 2, "b": 30, "c": 40}
    assert asked(tmp_path, given, limit=8, tasks=["b"]) == {"b": 8}


def test_the_task_beside_the_questions_says_how_they_are_judged(tmp_path: Path) -> None:
    write_questions(records(a=1), QuestionsConfig(metric="vqa:official"), tmp_path, name="q", banks=["shapes"])
    found = yaml(tmp_path / "task.yaml")
    assert (found["name"], found["metric"], found["group_by"]) == ("q", "vqa:official", "task")
    assert found["records"] == "questions.jsonl" and found["bank"] == ["shapes"]


def test_questions_of_a_task_that_is_not_there_and_of_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no question is of the task 'aa'"):
        asked(tmp_path, records(a=1), tasks=["aa"])
    with pytest.raises(ConfigError, match="a record has no task in its meta"):
        asked(tmp_path, [Record.triple("q", "a")])


def test_an_arm_has_a_file_a_task_and_a_config_over_the_base(tmp_path: Path) -> None:
    base = {"data": {"max_length": 64, "eval": None}, "train": {"steps": 3}}
    keys = {"train.steps": 9, "data.eval.fraction": 0.5, "tune.llm.lr": 1e-3}
    given = {"caps": {"b": 1}}
    count = write_arm(records(b=3, a=2), given, tmp_path, seed=0, base=base, keys=keys, where="arm")
    found = yaml(tmp_path / "train.yaml")
    assert [source["name"] for source in found["data"]["train"]] == ["a", "b"] and count == 3
    assert [len(list(read_jsonl(Path(source["path"])))) for source in found["data"]["train"]] == [2, 1]
    assert found["data"]["max_length"] == 64 and found["data"]["eval"] == {"fraction": 0.5}
    assert (found["train"]["steps"], found["tune"]["llm"]["lr"]) == (9, 1e-3)
    assert base["train"]["steps"] == 3  # the base of the next arm is as it was


def test_records_of_a_build_come_in_the_order_of_its_tasks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no records"):
        base_records(tmp_path)
    for name in ("b", "a"):
        write_jsonl(records(**{name: 2}), tmp_path / "records" / f"{name}.jsonl")
    assert [record.id for record in base_records(tmp_path)] == ["a0", "a1", "b0", "b1"]
    assert [record.id for record in base_records(tmp_path / "records" / "b.jsonl")] == ["b0", "b1"]
