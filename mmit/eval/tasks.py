"""Tasks: which questions are asked, with which prompt, and by which metric the answers are judged.

In: a task's YAML (a path, or the name of one in mmit/configs/eval). Out: a typed `Task`, and its questions as
`Item`s: one per question-answer pair, each with the pictures it is about. Never runs a model, never scores.

A task of one's own is records, prompt and metric (configs/eval/custom_example.yaml is a whole one):

    name: my_task
    records: my_test.json        # LLaVA's layout here; any name in mmit.data.formats.FORMATS
    format: llava
    image_root: pictures
    prompt: "{question}\\nAnswer the question using a single word or phrase."
    metric: exact                # any name in mmit.eval.metrics.METRICS

A benchmark that mmit knows by the files its makers distribute names a layout instead of records:

    name: gqa
    layout: gqa                  # a name in mmit.eval.layouts.LAYOUTS; its files are in <data root>/gqa
    prompt: "{question}\\nAnswer the question using a single word or phrase."
    metric: gqa:lmms
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from mmit import sections
from mmit.configs import moved, shipped, shipped_banks
from mmit.data.formats import FORMATS, easy_vqa, find_format, import_file
from mmit.errors import ConfigError, MmitError, nearest
from mmit.eval import layouts
from mmit.eval.judges import JUDGES
from mmit.eval.layouts.common import PREFIX as HUB
from mmit.eval.layouts.common import local_folder
from mmit.eval.metrics import METRICS, get_metric
from mmit.eval.questions import QUESTION, Item, check_ids, check_units, prompt_text, record_items, sample_items
from mmit.plugins import is_spec
from mmit.sections import Section, brief
from mmit.yamlio import parse_yaml

if TYPE_CHECKING:
    from mmit.records import Record

__all__ = [
    "Item",
    "SampleConfig",
    "Task",
    "asked_of",
    "load_task",
    "load_tasks",
    "prompt_text",
    "sample_items",
    "task_items",
    "training_items",
]

SPLIT = "{split}"
_PACKAGE = "package:"
PACKAGES: dict[str, Callable[[str], Iterator[Record]]] = {"easy-vqa": easy_vqa}
_TASK_FILE = (
    "Give the path of a task's YAML, or the name of one that mmit ships, such as pope. A file of questions is named in "
    "such a YAML, by `records` (configs/eval/custom_example.yaml)."
)
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class SampleConfig(Section):
    """A fixed part of the questions."""

    n: PositiveInt
    """how many questions; all of them where there are fewer"""
    seed: NonNegativeInt = 0
    """decides which"""


class Task(Section):
    """One benchmark: data, prompt, metric."""

    name: str
    """name in reports, and of the folder of its results"""
    records: str | None = None
    """package:easy-vqa, or a JSON/JSONL file, {split} standing for the split, * for any part of its name (all such
    files, as `mmit build` writes one a task); a relative path is looked for in the data root, then in the folder of
    this YAML; null where the task has a layout"""
    layout: str | None = None
    """layout of a benchmark's files, a name in mmit.eval.layouts.LAYOUTS or my_pkg.my_mod:NAME of a Layout of your own,
    instead of records"""
    folder: str | None = None
    """folder of a layout's files in the data root (by default data/), or hub:owner/name of a data set on the hub;
    null takes the task's name"""
    options: dict[str, Any] = {}
    """options of the layout"""
    format: str = "mmit"
    """format of the file's rows, a name in mmit.data.formats.FORMATS"""
    split: str | None = None
    """split that is asked"""
    image_root: str | None = None
    """folder that relative image paths start from; null takes the folder of the records"""
    train_records: str | None = None
    """file (or files, with *) the majority answers are learned from; null takes records, with train_split"""
    train_split: str | None = None
    """split the majority answers are learned from"""
    prompt: str = QUESTION
    """what is asked: {question} and any words around it"""
    templates: list[str] = []
    """other wordings of the prompt, for --templates; without any, mmit's general ones are put around it"""
    bank: list[str] = []
    """banks of templates, shipped names or files, that the questions were built by: --templates then asks in their
    held-out wordings; the group of a question (group_by) is the task of its bank"""
    metric: str
    """name of a metric in mmit.eval.metrics.METRICS, e.g. exact, vqa:official, pope:official, or
    my_pkg.my_mod:name of a function (predictions, references) -> one number for each answer"""
    reference: str | None = None
    """meta key of what the metric compares with (a list with one entry per question where a record has
    several questions); null takes the assistant's turn"""
    group_by: str | None = None
    """meta key of the type of question: one text, or a list with one per question"""
    answers: list[str] | None = None
    """all answers there are, if the set is closed; others are counted as invalid"""
    answer_by: Literal["generate", "likelihood", "likelihood_per_character"] = "generate"
    """generate writes an answer; likelihood takes the likeliest of a question's choices (those of its record's meta
    key `choices`, else `answers`), per character with its log-likelihood divided by its length"""
    max_new_tokens: PositiveInt = 32
    """longest answer in tokens"""
    stop: list[str] = []
    """texts that end an answer and are left out of it"""
    sample: SampleConfig | None = None
    """ask only some of the questions; null asks all"""
    how_to_get: str = ""
    """where the data comes from, told when it is missing"""

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not _FOLDER_NAME.fullmatch(name):
            raise ValueError(f"'{name}' cannot name a folder; use letters, digits, '.', '_' and '-'")
        return name

    @field_validator("records", "train_records")
    @classmethod
    def _package_exists(cls, spec: str | None) -> str | None:
        if spec and spec.startswith(_PACKAGE) and spec.removeprefix(_PACKAGE) not in PACKAGES:
            known = [_PACKAGE + name for name in PACKAGES]
            raise ValueError(f"mmit does not know '{spec}'; {nearest(spec, known)}, or the path of a file")
        return spec

    @field_validator("format")
    @classmethod
    def _format_exists(cls, name: str) -> str:
        if is_spec(name):
            find_format(name)
        elif name not in FORMATS:
            raise ValueError(f"unknown format '{name}'; {nearest(name, FORMATS)}")
        return name

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, name: str) -> str:
        if is_spec(name) and name not in JUDGES:
            get_metric(name)
        elif name not in METRICS and name not in JUDGES:
            raise ValueError(f"unknown metric '{name}'; {nearest(name, [*METRICS, *JUDGES])}")
        return name

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, given: list[str]) -> list[str]:
        if "" in given:
            raise ValueError("holds an empty text, at which every answer would end")
        return given

    @field_validator("prompt", "templates")
    @classmethod
    def _prompt_asks_once(cls, given: str | list[str]) -> str | list[str]:
        for prompt in [given] if isinstance(given, str) else given:
            if prompt.count(QUESTION) != 1:
                raise ValueError(f"must contain {QUESTION} exactly once, got {brief(prompt)}")
        return given

    @model_validator(mode="after")
    def _one_source(self) -> Task:
        if (self.records is None) == (self.layout is None):
            raise ValueError("records: required (text), unless the task names a layout; it takes one of the two")
        if self.layout is None:
            given = [key for key in ("folder", "options") if getattr(self, key)]
            if given:
                raise ValueError(f"{given[0]}: belongs to a layout, and the task has records")
            return self
        try:
            for split in (self.split, self.train_split):
                layouts.check_options(self.layout, split, self.options)
        except ConfigError as error:
            raise ValueError(f"{error.where}: {error.problem}; {error.remedy}") from error
        return self

    @model_validator(mode="after")
    def _splits_have_a_place(self) -> Task:
        if self.layout is not None or self.records is None:
            return self
        _check_split("split", self.split, self.records)
        if self.training is not None:
            spec, split = self.training
            _check_split("train_split", split, spec)
            if (spec, split) == (self.records, self.split):
                raise ValueError("train_split: the majority answers would be learned from the test itself")
        return self

    @model_validator(mode="after")
    def _closed_set_can_be_read(self) -> Task:
        if self.answers is not None and self.metric in METRICS:
            try:
                METRICS[self.metric](self.answers, self.answers)
            except MmitError as error:
                raise ValueError(f"answers: no closed set for metric '{self.metric}': {error}") from error
        return self

    @property
    def training(self) -> tuple[str, str | None] | None:
        """The source and split that majority answers are learned from, if the task names any."""
        if self.train_records is None and self.train_split is None:
            return None
        return self.train_records or self.records or "", self.train_split

    @property
    def seed(self) -> int:
        """The seed of `sample`, 0 without one."""
        return self.sample.seed if self.sample else 0


def _check_split(key: str, split: str | None, spec: str) -> None:
    takes_split = spec.startswith(_PACKAGE) or SPLIT in spec
    if takes_split and split is None:
        raise ValueError(f"{key}: required (text) but missing, since {spec} has splits")
    if not takes_split and split is not None:
        raise ValueError(f"{key}: {spec} is one file; write {SPLIT} in its path, or leave {key} out")


def load_task(path_or_name: str | os.PathLike[str], *, data_root: str | os.PathLike[str] | None = None) -> Task:
    """Read a task's YAML, given by path or by the name of one that mmit ships.

    Relative paths in it start at `data_root` if the records are there, else at the YAML's folder (of a layout, at
    `data_root` or ./data); the Task has them absolute.
    Raises ConfigError: unknown task, unknown key (with the nearest), or a value that cannot be.
    """
    path = _task_file(os.fspath(path_or_name))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the task: {error}", where=str(path), remedy=_TASK_FILE) from None
    try:
        raw, lines = parse_yaml(text, where=str(path))
    except ConfigError as error:
        raise ConfigError(error.problem, where=error.where, remedy=_TASK_FILE) from None
    if not isinstance(raw, dict):
        keys = ", ".join(Task.model_fields)
        problem = f"expected a task with the keys {keys}, got {brief(raw)}"
        raise ConfigError(problem, where=str(path), remedy=_TASK_FILE)
    try:
        task = Task.model_validate(raw)
    except ValidationError as error:
        origins = {keys: f"{path}:{line}" for keys, line in lines.items()}
        raise sections.config_error(error, Task, raw, where=str(path), origins=origins) from None
    base = os.path.abspath(_home(task, path, data_root))
    places: dict[str, Any] = {
        key: _anchored(getattr(task, key), base) for key in ("records", "train_records", "image_root")
    }
    places["bank"] = [name if name in shipped_banks() else os.path.join(base, name) for name in task.bank]
    if task.layout:
        places["folder"] = _anchored(task.folder or task.name, base)
    return task.model_copy(update=places)


def load_tasks(names: Sequence[str], *, where: str, data_root: str | os.PathLike[str] | None = None) -> list[Task]:
    """Read tasks as `load_task` does. Raises ConfigError at `where` if two have one name and so one folder."""
    tasks = [load_task(name, data_root=data_root) for name in names]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            remedy = "Name each task once; of two YAMLs with one `name` change one."
            raise ConfigError(f"two tasks have one name, '{name}'", where=where, remedy=remedy)
    return tasks


def _home(task: Task, path: Path, data_root: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """Return where a task's relative paths start: one data root may serve benchmarks and tasks of one's own."""
    if task.records is None:
        return "data" if data_root is None else data_root
    if data_root is None or task.records.startswith(_PACKAGE):
        return path.parent
    name = task.records.replace(SPLIT, task.split or "")
    places = [place for place in (data_root, path.parent) if _files(os.path.join(place, name))]
    return places[0] if places else data_root


def _task_file(given: str) -> Path:
    """Return the file a path or name stands for. A name has neither folder nor suffix."""
    if os.path.basename(given) != given or given.endswith((".yaml", ".yml")):
        return moved("eval", given)
    # A project that keeps its own tasks as this repository does may name them too; what mmit ships comes first.
    found = {path.stem: path for path in Path("configs", "eval").glob("*.yaml")} | shipped("eval")
    if given not in found:
        raise ConfigError(
            f"unknown task '{given}'",
            where="task",
            remedy=f"{nearest(given, found)}\nOr give the path of a task's YAML.",
        )
    return found[given]


def _anchored(path: str | None, base: str) -> str | None:
    if path is None or path.startswith((_PACKAGE, HUB)):
        return path
    return os.path.join(base, os.path.expanduser(path))


def task_items(task: Task, limit: int | None = None, seed: int | None = None) -> list[Item]:
    """Return the task's questions in data order; `limit` and `seed` go before the task's own `sample`.

    Every question of a record is asked alone, without the answers before it, but with every picture shown up
    to it. Raises ConfigError for missing data, RecordError for a record without an answer or group, or
    with an id that another has.
    """
    items = _items(task, task.records or "", task.split)
    check_ids(items)
    check_units(items, task.metric)
    return asked_of(task, items, sample=limit, seed=task.seed if seed is None else seed)


def asked_of(task: Task, items: Sequence[Item], *, sample: int | None, seed: int) -> list[Item]:
    """Return those of all of a task's questions that are asked.

    Args:
        items: all of them.
        sample: how many are asked; None for the task's own sample, or all where it has none.
        seed: of the sample.
    """
    n = task.sample.n if sample is None and task.sample else sample
    return sample_items(items, n, seed)


def training_items(task: Task) -> list[Item]:
    """Return the questions that majority answers are learned from, without groups; [] if there are none."""
    if task.training is None:
        return []
    return _items(task.model_copy(update={"group_by": None}), *task.training)


def _items(task: Task, spec: str, split: str | None) -> list[Item]:
    items = [item for record in _records(task, spec, split) for item in record_items(record, task)]
    if not items:
        where = spec or task.folder or ""
        raise ConfigError(f"task '{task.name}' has no questions", where=where, remedy="Check its files.")
    return items


def _records(task: Task, spec: str, split: str | None) -> Iterator[Record]:
    if task.layout:
        folder = local_folder(task.folder or task.name)
        return layouts.read(task.layout, folder, task=task.name, split=split, **task.options)
    if spec.startswith(_PACKAGE):
        return PACKAGES[spec.removeprefix(_PACKAGE)](split or "")
    path = spec.replace(SPLIT, split or "")
    files = _files(path)
    if not files:
        lack = "such files, and there are none" if "*" in path else "this file, which does not exist"
        if os.path.isdir(path):
            lack = "files, and this is a folder; name its files, for instance with /*.jsonl behind it"
        remedy = "A relative path is looked for in the data root (--data-root), then in the folder of the task's YAML."
        raise ConfigError(
            f"task '{task.name}' needs {lack}",
            where=path,
            remedy="\n".join(filter(None, [task.how_to_get.strip(), remedy])),
        )
    root = None if task.image_root is None else task.image_root.replace(SPLIT, split or "")
    return (record for file in files for record in import_file(file, task.format, image_root=root))


def _files(path: str) -> list[str]:
    """Return the files of a path in which `*` stands for any part of a name; none is a list of none."""
    if "*" not in os.path.basename(path):
        return [path] if os.path.isfile(path) else []
    folder, name = os.path.split(path)
    try:
        names = sorted(fnmatch.filter(os.listdir(folder or "."), name))
    except OSError:
        return []
    return [file for file in (os.path.join(folder, found) for found in names) if os.path.isfile(file)]
