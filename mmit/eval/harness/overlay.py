"""Overlays: YAMLs that let the tasks of lmms-eval and lm-eval read benchmarks from local folders, offline.

In: names of a harness's tasks and a data root, the one of `mmit eval`. Out: a folder for the harness's
--include_path, with a task NAME_local for every NAME and the questions as the columns that the task reads; pictures
stay where they are. Prompts and scoring are the harness's own: each YAML includes the one that the harness ships.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmit.errors import ConfigError, RecordError, nearest
from mmit.eval import layouts
from mmit.io import write_atomic

if TYPE_CHECKING:
    from mmit.eval.layouts.common import LmmsTask
    from mmit.records import Image, Record

SUFFIX = "_local"


# Tasks of lmms-eval by name, with the layout that has their questions.
LMMS: dict[str, tuple[str, LmmsTask]] = {
    name: (layout, task)
    for layout, entry in layouts.LAYOUTS.items()
    if entry.lmms is not None
    for name, task in entry.lmms.tasks.items()
}
TEXT = ("hellaswag", "gsm8k", "mmlu")
HARNESSES = {"lmms-eval": "lmms_eval", "lm-eval": "lm_eval"}


def write_overlay(
    names: Sequence[str],
    *,
    harness: str,
    data_root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tasks_root: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Write the overlay of some tasks; return the names of the local ones.

    Args:
        names: tasks by the harness's names: keys of LMMS, or of TEXT for lm-eval.
        harness: "lmms-eval" or "lm-eval".
        data_root: folder with one folder per benchmark, laid out as for `mmit eval`.
        out: folder of the YAMLs and, in data/, of the questions; made if need be.
        tasks_root: folder of the harness's own YAMLs; None finds the installed one.

    Raises:
        ConfigError: unknown harness or task, files that are missing, or a harness that is not installed.
        RecordError: a row that is not as expected.
    """
    if harness not in HARNESSES:
        raise ConfigError(f"unknown harness '{harness}'", where="--for", remedy=nearest(harness, HARNESSES))
    known: Iterable[str] = LMMS if harness == "lmms-eval" else TEXT
    for name in names:
        if name not in known:
            problem = f"no overlay for the {harness} task '{name}'"
            raise ConfigError(problem, where="--tasks", remedy=nearest(name, known))
    shipped = Path(tasks_root) if tasks_root is not None else shipped_tasks(harness)
    root, folder = Path(os.path.abspath(data_root)), Path(os.path.abspath(out))
    made: list[str] = []
    for name in names:
        if harness == "lmms-eval":
            made += _write_lmms(name, shipped, root, folder)
        else:
            made += _TEXT[name](shipped, root / name, folder)
    return made


def shipped_tasks(harness: str) -> Path:
    """Return the folder of an installed harness's tasks, without importing it. Raises ConfigError."""
    spec = importlib.util.find_spec(HARNESSES[harness])
    if spec is None or spec.origin is None:
        raise ConfigError(f"{harness} is not installed", where="--for", remedy="pip install 'mmit-tune[harness]'")
    return Path(spec.origin).parent / "tasks"


def _records(task: str, layout: str, folder: Path, split: str | None) -> list[Record]:
    records = list(layouts.read(layout, folder, task=task, split=split))
    if not records:
        raise ConfigError(f"task '{task}' has no questions", where=str(folder), remedy="Check its files.")
    return records


def _write_lmms(name: str, shipped: Path, root: Path, out: Path) -> list[str]:
    layout, task = LMMS[name]
    lmms = layouts.LAYOUTS[layout].lmms
    assert lmms is not None, "LMMS lists layouts that have one"
    rows = [lmms.columns(record) for record in _records(name, layout, root / (task.data or layout), task.split)]
    data = out / "data" / f"{name}.parquet"
    write_parquet(rows, data)
    own = {"dataset_name": None, "test_split": "test", **task.more}
    return [_write_yaml(name, shipped / task.yaml, out, data={"test": data}, kind="parquet", **own)]


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows so that `datasets` opens the column `image` as pictures; those in files are named, not copied."""
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        remedy = "pip install 'mmit-tune[harness]'"
        raise ConfigError(f"writing parquet needs {error.name}", where=str(path), remedy=remedy) from error
    several = isinstance(rows[0]["image"], list)
    table = pyarrow.Table.from_pylist([_stored(row) for row in rows])
    features = datasets.Features.from_arrow_schema(table.schema)
    features["image"] = datasets.List(datasets.Image()) if several else datasets.Image()
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.cast(features.arrow_schema), path)


def _stored(row: Mapping[str, Any]) -> dict[str, Any]:
    image = row["image"]
    kept = [_stored_image(one) for one in image] if isinstance(image, list) else _stored_image(image)
    return {**row, "image": kept}


def _stored_image(image: Image) -> dict[str, Any]:
    if isinstance(image.source, str):
        return {"bytes": None, "path": os.path.abspath(image.source)}
    assert isinstance(image.source, bytes)  # layouts give files or their bytes
    return {"bytes": image.source, "path": None}


def _write_yaml(name: str, included: Path, out: Path, *, data: Mapping[str, Path], kind: str, **more: Any) -> str:
    if not included.is_file():
        problem = f"the installed harness has no {included.name}"
        raise ConfigError(problem, where=str(included), remedy="Install lmms-eval 0.7.3 or lm-eval 0.4.13.")
    local = name + SUFFIX
    keys: dict[str, Any] = {"include": str(included), "task": local, "dataset_path": kind}
    keys |= {"dataset_kwargs": {"data_files": {split: str(path) for split, path in data.items()}}, **more}
    _write(out / f"{local}.yaml", keys)
    return local


def _write(path: Path, content: Any) -> None:
    write_atomic(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _hellaswag(shipped: Path, root: Path, out: Path) -> list[str]:
    data = {"validation": _file(root, "hellaswag", "hellaswag_val.jsonl", "data/hellaswag_val.jsonl")}
    yaml_of = shipped / "hellaswag" / "hellaswag.yaml"
    return [_write_yaml("hellaswag", yaml_of, out, data=data, kind="json", dataset_name=None, training_split=None)]


def _gsm8k(shipped: Path, root: Path, out: Path) -> list[str]:
    data = {
        split: _file(root, "gsm8k", f"{split}.jsonl", f"grade_school_math/data/{split}.jsonl")
        for split in ("train", "test")
    }
    yaml_of = shipped / "gsm8k" / "gsm8k.yaml"
    return [_write_yaml("gsm8k", yaml_of, out, data=data, kind="json", dataset_name=None)]


def _file(root: Path, task: str, *names: str) -> Path:
    """Return the first of `names` in a text benchmark's folder; the error of its layout tells what is expected."""
    entry = layouts.LAYOUTS[task]
    return layouts.Folder(root, entry, task=task, split=entry.splits[0]).find(*names)


def _mmlu(shipped: Path, root: Path, out: Path) -> list[str]:
    """Write one task per subject that has a table, and the group mmlu_local."""
    entry = layouts.LAYOUTS["mmlu"]
    place = layouts.Folder(root, entry, task="mmlu", split="test")
    made = []
    for table in place.find_all("test/*_test.csv", "data/test/*_test.csv"):
        subject = table.name.removesuffix("_test.csv")
        data = {}
        for split in ("test", "dev"):
            given = place.find(f"{split}/{subject}_{split}.csv", f"data/{split}/{subject}_{split}.csv")
            data[split] = out / "data" / "mmlu" / f"{subject}_{split}.jsonl"
            rows = ({"question": q, "choices": options, "answer": n} for q, options, n in _solved(given))
            write_atomic(data[split], "".join(json.dumps(row) + "\n" for row in rows))
        yaml_of = shipped / "mmlu" / "default" / f"mmlu_{subject}.yaml"
        made.append(_write_yaml(f"mmlu_{subject}", yaml_of, out, data=data, kind="json", dataset_name=None, tag=None))
    group = {"group": f"mmlu{SUFFIX}", "task": made}
    _write(out / f"mmlu{SUFFIX}.yaml", group | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]})
    return [f"mmlu{SUFFIX}"]


def _solved(table: Path) -> list[tuple[str, list[str], int]]:
    """Read one of MMLU's tables: question, four options, the right one's number. Raises RecordError."""
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in tuple("ABCD"):
            where = f"{table}:{number}"
            raise RecordError("not a question, four options and a letter", where=where, remedy="Fetch the file again.")
    return [(row[0], row[1:5], "ABCD".index(row[5])) for row in rows]


_TEXT: dict[str, Callable[[Path, Path, Path], list[str]]] = {"hellaswag": _hellaswag, "gsm8k": _gsm8k, "mmlu": _mmlu}
