"""Tasks: which questions are asked, with which prompt, and by which metric the answers are judged.

In: a task's YAML (a path, or the name of one in configs/eval). Out: a typed `Task`, and its questions as
`Item`s: one per question-answer pair, each with the pictures it is about. Never runs a model, never scores.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from mmit import sections
from mmit.data.formats import FORMATS, easy_vqa, import_file
from mmit.errors import ConfigError, MmitError, RecordError, nearest
from mmit.eval.metrics import METRICS
from mmit.records import Image, Record, Text, Turn
from mmit.sections import Section, brief
from mmit.yamlio import parse_yaml

QUESTION = "{question}"
SPLIT = "{split}"
_PACKAGE = "package:"
PACKAGES: dict[str, Callable[[str], Iterator[Record]]] = {"easy-vqa": easy_vqa}
SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "eval"
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
    records: str
    """package:easy-vqa, or a JSON/JSONL file, {split} standing for the split; relative paths start at the
    data root, by default the folder of this YAML"""
    format: str = "mmit"
    """format of the file's rows, a name in mmit.data.formats.FORMATS"""
    split: str | None = None
    """split that is asked"""
    image_root: str | None = None
    """folder that relative image paths start from; null takes the folder of the records"""
    train_records: str | None = None
    """file the majority answers are learned from; null takes records, with train_split"""
    train_split: str | None = None
    """split the majority answers are learned from"""
    prompt: str = QUESTION
    """what is asked: {question} and any words around it"""
    metric: str
    """name of a metric in mmit.eval.metrics.METRICS, e.g. exact, vqa:official, pope:official"""
    reference: str | None = None
    """meta key of what the metric compares with (a list with one entry per question where a record has
    several questions); null takes the assistant's turn"""
    group_by: str | None = None
    """meta key of the type of question: one text, or a list with one per question"""
    answers: list[str] | None = None
    """all answers there are, if the set is closed; others are counted as invalid"""
    max_new_tokens: PositiveInt = 32
    """longest answer in tokens"""
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
        if name not in FORMATS:
            raise ValueError(f"unknown format '{name}'; {nearest(name, FORMATS)}")
        return name

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, name: str) -> str:
        if name not in METRICS:
            raise ValueError(f"unknown metric '{name}'; {nearest(name, METRICS)}")
        return name

    @field_validator("prompt")
    @classmethod
    def _prompt_asks_once(cls, prompt: str) -> str:
        if prompt.count(QUESTION) != 1:
            raise ValueError(f"must contain {QUESTION} exactly once, got {brief(prompt)}")
        return prompt

    @model_validator(mode="after")
    def _splits_have_a_place(self) -> Task:
        _check_split("split", self.split, self.records)
        if self.training is not None:
            spec, split = self.training
            _check_split("train_split", split, spec)
            if (spec, split) == (self.records, self.split):
                raise ValueError("train_split: the majority answers would be learned from the test itself")
        return self

    @model_validator(mode="after")
    def _closed_set_can_be_read(self) -> Task:
        if self.answers is not None:
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
        return self.train_records or self.records, self.train_split

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


@dataclass(frozen=True, slots=True)
class Item:
    """One question: the prompt ends with the user's turn; `reference` is what the task's metric expects."""

    id: str
    prompt: Record
    reference: Any
    group: str | None = None

    @property
    def text(self) -> str:
        """What is asked, in words."""
        return prompt_text(self.prompt)


def prompt_text(prompt: Record) -> str:
    """Return the text of a prompt's turns, one turn after the other."""
    return "\n".join(turn.text for turn in prompt.turns)


def load_task(
    path_or_name: str | os.PathLike[str], *, data_root: str | os.PathLike[str] | None = None
) -> Task:
    """Read a task's YAML, given by path or by the name of one that mmit ships.

    Relative paths in it start at `data_root`, by default the YAML's folder; the Task has them absolute.
    Raises ConfigError: unknown task, unknown key (with the nearest), or a value that cannot be.
    """
    path = _task_file(os.fspath(path_or_name))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give the path of a task's YAML, or the name of one in configs/eval."
        raise ConfigError(f"cannot read the task: {error}", where=str(path), remedy=remedy) from None
    raw, lines = parse_yaml(text, where=str(path))
    if not isinstance(raw, dict):
        keys = ", ".join(Task.model_fields)
        raise ConfigError(f"expected a task with the keys {keys}, got {brief(raw)}", where=str(path))
    try:
        task = Task.model_validate(raw)
    except ValidationError as error:
        origins = {keys: f"{path}:{line}" for keys, line in lines.items()}
        raise sections.config_error(error, Task, raw, where=str(path), origins=origins) from None
    base = os.path.abspath(path.parent if data_root is None else data_root)
    places = {key: _anchored(getattr(task, key), base) for key in ("records", "train_records", "image_root")}
    return task.model_copy(update=places)


def _task_file(given: str) -> Path:
    """Return the file a path or name stands for. A name has neither folder nor suffix."""
    if os.path.basename(given) != given or given.endswith((".yaml", ".yml")):
        return Path(given)
    # Installed without its repository, mmit has no configs of its own; those of a checkout one is in will do.
    folders = [folder for folder in (SHIPPED, Path("configs", "eval")) if folder.is_dir()]
    found = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}
    if given not in found:
        remedy = nearest(given, found) if found else f"There is no folder {SHIPPED}."
        raise ConfigError(
            f"unknown task '{given}'", where="task", remedy=f"{remedy}\nOr give the path of a task's YAML."
        )
    return found[given]


def _anchored(path: str | None, base: str) -> str | None:
    if path is None or path.startswith(_PACKAGE):
        return path
    return os.path.join(base, os.path.expanduser(path))


def task_items(task: Task, limit: int | None = None, seed: int | None = None) -> list[Item]:
    """Return the task's questions in data order; `limit` and `seed` go before the task's own `sample`.

    Every question of a record is asked alone, without the answers before it, but with every picture shown up
    to it. Raises ConfigError for missing data, RecordError for a record without an answer or group, or
    with an id that another has.
    """
    items = _items(task, task.records, task.split)
    _check_ids(items)
    n = task.sample.n if limit is None and task.sample else limit
    return sample_items(items, n, task.seed if seed is None else seed)


def training_items(task: Task) -> list[Item]:
    """Return the questions that majority answers are learned from, without groups; [] if there are none."""
    if task.training is None:
        return []
    return _items(task.model_copy(update={"group_by": None}), *task.training)


def sample_items(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """Return `n` items drawn without replacement, in their order; all if n is None or not fewer.

    Depends on the number of items, n and seed alone. Raises ConfigError if n is not positive.
    """
    if n is None:
        return list(items)
    if n < 1:
        raise ConfigError(f"{n} questions", where="limit", remedy="Ask at least one question.")
    chosen = random.Random(seed).sample(range(len(items)), min(n, len(items)))
    return [items[index] for index in sorted(chosen)]


def _items(task: Task, spec: str, split: str | None) -> list[Item]:
    items = [item for record in _records(task, spec, split) for item in _record_items(record, task)]
    if not items:
        raise ConfigError(f"task '{task.name}' has no questions", where=spec, remedy="Check its records.")
    return items


def _check_ids(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            remedy = "Answers are kept by id: give each record its own, or none (its row is taken then)."
            raise RecordError(f"the id '{item.id}' is taken already", where=item.prompt.where, remedy=remedy)
        seen.add(item.id)


def _records(task: Task, spec: str, split: str | None) -> Iterator[Record]:
    if spec.startswith(_PACKAGE):
        return PACKAGES[spec.removeprefix(_PACKAGE)](split or "")
    path = spec.replace(SPLIT, split or "")
    if not os.path.isfile(path):
        remedy = "Relative paths start at the data root (--data-root), by default the task's folder."
        raise ConfigError(
            f"task '{task.name}' needs this file, which does not exist",
            where=path,
            remedy="\n".join(filter(None, [task.how_to_get.strip(), remedy])),
        )
    root = None if task.image_root is None else task.image_root.replace(SPLIT, split or "")
    return import_file(path, task.format, image_root=root)


def _record_items(record: Record, task: Task) -> Iterator[Item]:
    """Yield one item per user turn."""
    system = record.turns[:1] if record.turns[0].role == "system" else ()
    dialogue = record.turns[len(system) :]
    questions, answers = dialogue[::2], dialogue[1::2]
    groups = _groups(record, task, len(questions))
    references = _references(record, task, len(questions), [turn.text for turn in answers])
    name = record.id or str(record.row)
    shown: list[Image] = []
    for number, turn in enumerate(questions):
        item_id = name if len(questions) == 1 else f"{name}#{number + 1}"
        user = Turn("user", (*shown, *_asked(turn, task.prompt)))
        prompt = Record((*system, user), item_id, record.source, record.row, record.licence)
        yield Item(item_id, prompt, references[number], groups[number])
        shown += [part for part in turn.parts if isinstance(part, Image)]


def _asked(turn: Turn, template: str) -> tuple[Text | Image, ...]:
    """Put the template's words before the first and after the last text of a user turn."""
    before, after = template.split(QUESTION)
    parts = list(turn.parts)
    texts = [place for place, part in enumerate(parts) if isinstance(part, Text)]
    if not texts:  # a question made of pictures alone
        return (*parts, Text(before + after)) if before + after else tuple(parts)
    for place, words in ((texts[0], (before, "")), (texts[-1], ("", after))):
        part = parts[place]
        assert isinstance(part, Text)
        parts[place] = Text(words[0] + part.text + words[1])
    return tuple(parts)


def _references(record: Record, task: Task, count: int, answers: list[str]) -> list[Any]:
    if task.reference is None:
        if len(answers) < count:
            remedy = "End the record with the answer, or name the meta key that has it: reference."
            raise RecordError("the last question has no answer", where=record.where, remedy=remedy)
        return list(answers)
    value = _meta(record, task.reference, "reference")
    # A lone question may have several accepted answers, so its list is not one entry per question.
    return [value] if count == 1 else _per_question(record, task.reference, value, count)


def _groups(record: Record, task: Task, count: int) -> list[Any]:
    if task.group_by is None:
        return [None] * count
    value = _meta(record, task.group_by, "group_by")
    if not isinstance(value, list):
        return [str(value)] * count
    return [str(group) for group in _per_question(record, task.group_by, value, count)]


def _meta(record: Record, key: str, role: str) -> Any:
    if key not in record.meta:
        problem = f"no meta key '{key}', which the task names as {role}"
        remedy = nearest(key, map(str, record.meta)) if record.meta else "The record's meta is empty."
        raise RecordError(problem, where=record.where, remedy=remedy)
    return record.meta[key]


def _per_question(record: Record, key: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        problem = f"meta key '{key}' is {brief(value)}, but the record has {count} questions"
        raise RecordError(problem, where=record.where, remedy="Give a list with one entry per question.")
    return value
