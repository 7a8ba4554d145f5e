"""Questions of a task: one per question-answer pair, each with the pictures it is about and what is a right answer.

In: records and the task's prompt and keys. Out: `Item`s, all of them or a seeded sample. Reads no file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmit.data.images import check_file
from mmit.errors import ConfigError, RecordError, nearest
from mmit.eval.judges import JUDGES, check_judged
from mmit.eval.metrics import check_reference, get_metric, together
from mmit.records import Image, Record, Text, Turn
from mmit.sections import brief

if TYPE_CHECKING:
    from mmit.eval.tasks import Task

QUESTION = "{question}"
REFERENCE, GROUP, CHOICES = "reference", "group", "choices"  # meta keys of what a layout yields


@dataclass(frozen=True, slots=True)
class Item:
    """One question: the prompt ends with the user's turn; `reference` is what the task's metric expects."""

    id: str
    prompt: Record
    reference: Any
    group: str | None = None
    choices: tuple[str, ...] = ()
    """all answers there are, where the record or the task says so"""
    unit: Any = None
    """questions of one unit are scored together, and so are asked together; None stands alone"""

    @property
    def text(self) -> str:
        """What is asked, in words."""
        return prompt_text(self.prompt)


def prompt_text(prompt: Record) -> str:
    """Return the text of a prompt's turns, one turn after the other."""
    return "\n".join(turn.text for turn in prompt.turns)


def sample_items(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """Return `n` items drawn without replacement, in their order; all if n is None or not fewer.

    Items of one unit come together: as many units as n has room for, and at least one. Depends on the number of items,
    their units, n and seed alone. Raises ConfigError if n is not positive.
    """
    if n is None:
        return list(items)
    if n < 1:
        raise ConfigError(f"{n} questions", where="limit", remedy="Ask at least one question.")
    units: dict[Any, list[int]] = {}
    for index, item in enumerate(items):
        units.setdefault((index, None) if item.unit is None else (None, item.unit), []).append(index)
    if len(units) == len(items):
        chosen = random.Random(seed).sample(range(len(items)), min(n, len(items)))
        return [items[index] for index in sorted(chosen)]
    chosen = []
    for unit in random.Random(seed).sample(list(units.values()), len(units)):
        if chosen and len(chosen) + len(unit) > n:
            break
        chosen += unit
    return [items[index] for index in sorted(chosen)]


def check_ids(items: Sequence[Item]) -> None:
    """Raise RecordError if two questions have the same id."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            remedy = "Answers are kept by id: give each record its own, or none (its row is taken then)."
            raise RecordError(f"the id '{item.id}' is taken already", where=item.prompt.where, remedy=remedy)
        seen.add(item.id)


def check_images(items: Sequence[Item]) -> None:
    """Raise ImageError if a picture that is named by its path is not there; opens none."""
    found: set[str] = set()
    for item in items:
        for image in item.prompt.images:
            if isinstance(image.source, str) and image.source not in found:
                check_file(image.source, f"{item.prompt.where}: {image.source}")
                found.add(image.source)


def check_units(items: Sequence[Item], metric: str) -> None:
    """Raise MmitError if questions that the metric scores together are not all there."""
    if any(item.unit is not None for item in items):
        get_metric(metric)([""] * len(items), [item.reference for item in items])


def record_items(record: Record, task: Task) -> Iterator[Item]:
    """Yield one item per user turn. Raises RecordError, or MmitError: a reference that the metric cannot read."""
    system = record.turns[:1] if record.turns[0].role == "system" else ()
    dialogue = record.turns[len(system) :]
    questions, answers = dialogue[::2], dialogue[1::2]
    groups = _groups(record, task, len(questions))
    references = _references(record, task, len(questions), [turn.text for turn in answers])
    choices = _choices(record, task)
    key = _reference_key(task)
    name = record.id or str(record.row)
    shown: list[Image] = []
    for number, turn in enumerate(questions):
        item_id = name if len(questions) == 1 else f"{name}#{number + 1}"
        user = Turn("user", (*shown, *_asked(turn, task.prompt)))
        prompt = Record((*system, user), item_id, record.source, record.row, record.licence)
        reference = references[number]
        _check_reference(task, reference, where=f"{prompt.where}: meta key '{key}'" if key else prompt.where)
        yield Item(item_id, prompt, reference, groups[number], choices, together(task.metric, reference))
        shown += [part for part in turn.parts if isinstance(part, Image)]


def _check_reference(task: Task, reference: Any, *, where: str) -> None:
    if task.metric in JUDGES:
        check_judged(task.metric, reference, where=where)
    else:
        check_reference(task.metric, reference, where=where)


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


def _choices(record: Record, task: Task) -> tuple[str, ...]:
    choices = record.meta.get(CHOICES, task.answers or ())
    if task.answer_by != "generate" and not choices:
        remedy = "Give the record's meta a list 'choices', or the task 'answers'."
        raise RecordError("no choices whose likelihood could be compared", where=record.where, remedy=remedy)
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        remedy = "Make the meta key 'choices' a list of texts."
        raise RecordError(f"choices are {brief(choices)}", where=record.where, remedy=remedy)
    if task.answer_by != "generate" and not all(choice.strip() for choice in choices):
        remedy = "Name what the model could say, or leave the choice out."
        raise RecordError("a choice is empty, which has no likelihood", where=record.where, remedy=remedy)
    return tuple(choices)


def _reference_key(task: Task) -> str | None:
    """Return the meta key of what the metric compares with; None where it is the assistant's turn."""
    return task.reference or (REFERENCE if task.layout else None)


def _references(record: Record, task: Task, count: int, answers: list[str]) -> list[Any]:
    key = _reference_key(task)
    if key is None:
        if len(answers) < count:
            remedy = "End the record with the answer, or name the meta key that has it: reference."
            raise RecordError("the last question has no answer", where=record.where, remedy=remedy)
        return list(answers)
    value = _meta(record, key, "reference")
    # A lone question may have several accepted answers, so its list is not one entry per question.
    return [value] if count == 1 else _per_question(record, key, value, count)


def _groups(record: Record, task: Task, count: int) -> list[Any]:
    if task.group_by is None:
        return [record.meta.get(GROUP) if task.layout else None] * count
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
