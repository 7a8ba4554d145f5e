"""The files of a study: an arm's records with its training config, and the questions with their task.

In: records of a build's folder or of one file. Out: folders that `mmit train` and `mmit eval` read as they are.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.analysis.transform import Transform, task_of, transformed
from mmit.data.formats import detect_format, import_file
from mmit.errors import ConfigError, nearest
from mmit.io import write_atomic
from mmit.records import Record, read_jsonl, write_jsonl
from mmit.yamlio import dump_yaml, merge

if TYPE_CHECKING:
    from mmit.analysis.config import QuestionsConfig


def record_files(source: Path) -> list[Path]:
    """Return the files that hold the records of a build's folder, or `source` itself; [] where there are none."""
    if source.is_dir():
        return sorted((source / "records").glob("*.jsonl")) or sorted(source.glob("*.jsonl"))
    return [source] if source.is_file() else []


def base_records(source: Path, *, image_root: str | None = None) -> list[Record]:
    """Return the records of a build's folder, in the order of its tasks, or of one file in any format of mmit.

    Args:
        image_root: where relative image paths of a file start; None takes the file's folder.

    Raises:
        ConfigError: there are none. RecordError: a bad row, or rows of no known format.
    """
    files = record_files(source)
    if not files:
        raise ConfigError("there are no records", where=str(source), remedy="Give mmit records, or a build's folder.")
    if source.is_dir():
        return [record for file in files for record in read_jsonl(file)]
    options: dict[str, Any] = {} if image_root is None else {"image_root": image_root}
    return list(import_file(source, detect_format(source)[0], **options))


def write_arm(
    records: Sequence[Record],
    given: Mapping[str, Any],
    folder: Path,
    *,
    seed: int,
    base: Mapping[str, Any],
    keys: Mapping[str, Any],
    where: str,
) -> int:
    """Write records/TASK.jsonl and train.yaml, the latter last; returns the number of records.

    Args:
        given: keys of a `Transform`.
        base: the training config that the arm begins with. keys: dotted keys over it.
        where: place of the arm, for messages.

    Raises:
        ConfigError: the transform does not suit the records.
    """
    made = transformed(records, Transform.of(given, where=where), seed=seed, where=where)
    by_task: dict[str, list[Record]] = {}
    for record in made:
        by_task.setdefault(task_of(record, where=where), []).append(record)
    sources = []
    for number, (task, own) in enumerate(sorted(by_task.items())):
        file = folder / "records" / f"{number:02d}.jsonl"
        write_jsonl(own, file)
        sources.append({"path": str(file.resolve()), "name": task})
    # A copy: keys of this arm must not reach the next one through the sections that both begin with.
    config: dict[str, Any] = merge(copy.deepcopy(dict(base)), {"data": {"train": sources}})
    for key, value in keys.items():
        *path, last = key.split(".")
        section = config
        for part in path:
            if not isinstance(section.get(part), dict):
                section[part] = {}  # also where the base has null
            section = section[part]
        section[last] = value
    write_atomic(folder / "train.yaml", dump_yaml(config))
    return len(made)


def write_questions(
    records: Iterable[Record], asked: QuestionsConfig, folder: Path, *, name: str, banks: Sequence[str] = ()
) -> None:
    """Write questions.jsonl, a fixed sample with as many of each task as can be, and task.yaml. Raises ConfigError.

    Args:
        banks: that they were built by, for other wordings in `mmit eval --templates`.
    """
    by_task: dict[str, list[Record]] = {}
    where = f"questions '{name}'"
    for record in records:
        by_task.setdefault(task_of(record, where=where), []).append(record)
    for task in asked.tasks:
        if task not in by_task:
            raise ConfigError(f"no question is of the task '{task}'", where=where, remedy=nearest(task, by_task))
    chosen = {task: own for task, own in sorted(by_task.items()) if not asked.tasks or task in asked.tasks}
    kept: list[Record] = []
    left = asked.limit
    for number, (task, own) in enumerate(sorted(chosen.items(), key=lambda item: len(item[1]))):
        share = min(len(own), left // (len(chosen) - number))
        kept += sorted(random.Random(f"0|{task}").sample(own, share), key=lambda record: record.row or 0)
        left -= share
    write_jsonl(kept, folder / "questions.jsonl")
    settings: dict[str, Any] = {
        "name": name,
        "records": "questions.jsonl",
        "metric": asked.metric,
        "group_by": "task",
        "max_new_tokens": asked.max_new_tokens,
    }
    if banks:
        settings["bank"] = list(banks)
    write_atomic(folder / "task.yaml", dump_yaml(settings))
