"""Answers that cost no thought, and questions put differently: chance, swapped pictures, other wordings.

In: a task and its questions. Out: a model that guesses, the same questions with each other's pictures, tasks with
other prompts, and how much a score hangs on the wording. Runs no model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from mmit.errors import ConfigError, MmitError, nearest
from mmit.records import Image, Record, Text

if TYPE_CHECKING:
    from mmit.eval.questions import Item
    from mmit.eval.tasks import Task
    from mmit.templates import Template

# A yes-or-no benchmark's answers, told by its metric.
_CLOSED = {"pope": ("yes", "no"), "mme": ("yes", "no"), "nlvr": ("true", "false"), "nlvr2": ("True", "False")}
_WITH_PICTURE = "Look at the picture and answer.\n"
# Put around a task's own prompt where it has no templates of its own: {} is the prompt.
GENERAL = (
    "{}",
    "Please answer. {}",
    "Question: {}",
    "{}\nAnswer:",
    _WITH_PICTURE + "{}",
    "I have a question for you. {}",
    "Answer the following question as well as you can.\n{}",
    "Q: {}\nA:",
    "Here is a task.\n{}\nGive the answer alone.",
    "{}\nMake sure that the answer is right.",
)


class Chance:
    """Answers at random among each question's possible answers; "" where they are not known."""

    def __init__(self, possible: Mapping[str, Sequence[str]], *, seed: int) -> None:
        self.possible, self.seed = possible, seed

    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        """Answer like a model; a question's answer depends on the seed and its id alone."""
        return [self._pick(record.id) for record in records]

    def _pick(self, name: str) -> str:
        possible = self.possible[name]
        return random.Random(f"{self.seed} {name}").choice(list(possible)) if possible else ""


def chance(task: Task, items: Sequence[Item], *, seed: int) -> Chance | None:
    """Return the model that guesses, or None where no question's possible answers are known."""
    possible = {item.id: possible_answers(task, item) for item in items}
    return Chance(possible, seed=seed) if any(possible.values()) else None


def possible_answers(task: Task, item: Item) -> Sequence[str]:
    """Return the answers a question may have: its choices, the letters of its options, the task's, yes and no."""
    if item.choices:
        return item.choices
    options = item.reference.get("options") if isinstance(item.reference, Mapping) else None
    if options:
        return list(options) if isinstance(options, Mapping) else list(ascii_uppercase[: len(options)])
    if task.answers:
        return task.answers
    return _CLOSED.get(task.metric.partition(":")[0], ())


def swapped(items: Sequence[Item], *, seed: int) -> list[Item]:
    """Return the questions that have pictures, each with those of another question that has other ones.

    [] if there are not two different ones to swap.
    """
    shown = list(dict.fromkeys(item.prompt.images for item in items if item.prompt.images))
    if len(shown) < 2:
        return []
    random.Random(seed).shuffle(shown)
    # A cycle through all sets of images, so that none can get its own.
    partner = dict(zip(shown, shown[1:] + shown[:1], strict=True))
    return [_with(item, partner[item.prompt.images]) for item in items if item.prompt.images]


def _with(item: Item, images: tuple[Image, ...]) -> Item:
    turns, number = [], 0
    for turn in item.prompt.turns:
        parts: list[Text | Image] = []
        for part in turn.parts:
            if isinstance(part, Image):
                parts.append(images[number % len(images)])
                number += 1
            else:
                parts.append(part)
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(item, prompt=replace(item.prompt, turns=tuple(turns)))


def wordings(task: Task, n: int, *, pictures: bool) -> list[Task]:
    """Return the task in `n` wordings, its own first. Raises ConfigError if there are not so many."""
    general = [frame for frame in GENERAL[1:] if pictures or not frame.startswith(_WITH_PICTURE)]
    others = task.templates or [frame.replace("{}", task.prompt) for frame in general]
    prompts = list(dict.fromkeys([task.prompt, *others]))
    if not 2 <= n <= len(prompts):
        where = f"task '{task.name}': templates"
        remedy = f"Ask for 2 to {len(prompts)}, or list more under `templates` in the task."
        raise ConfigError(f"{n} wordings", where=where, remedy=remedy)
    return [task.model_copy(update={"prompt": prompt}) for prompt in prompts[:n]]


def bank_wordings(task: Task, items: Sequence[Item], n: int) -> list[tuple[str, list[Item]]]:
    """Return (name, questions) for each of `n` wordings: the questions as they are, then in held-out ones of the bank.

    What stands before the question, such as a system turn, stays. Raises ConfigError: there are not so many wordings,
    a question is of no task of the bank, or a template asks by more than the images.
    """
    from mmit.templates import open_banks

    banks = {bank.task: bank.of_split("held_out") for bank in open_banks(task.bank, Path())}
    groups = sorted({str(item.group) for item in items})
    where = f"task '{task.name}': bank"
    for group in groups:
        if group not in banks:
            remedy = f"{nearest(group, banks)}\nSet group_by to the meta key that names the task of a question."
            raise ConfigError(f"questions of the task '{group}' have no templates", where=where, remedy=remedy)
    most = 1 + min(len(banks[group]) for group in groups)
    if not 2 <= n <= most:
        raise ConfigError(f"{n} wordings", where=where, remedy=f"Ask for 2 to {most}: the own one and held-out ones.")
    found = [("as built", list(items))]
    for number in range(n - 1):
        names = ", ".join(f"{group}/{banks[group][number].id}" for group in groups)
        found.append((names, [_asked_by(item, banks[str(item.group)][number]) for item in items]))
    return found


def _asked_by(item: Item, template: Template) -> Item:
    from mmit.templates import ask

    images = list(item.prompt.images)
    fields = {"images": images} | ({"image": images[0]} if images else {})
    user = replace(item.prompt.turns[-1], parts=ask(template, fields, row=item.id))
    return replace(item, prompt=replace(item.prompt, turns=(*item.prompt.turns[:-1], user)))


def sensitivity(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, min, max and sensitivity of the scores of several wordings.

    Sensitivity is the standard deviation over the mean (MultiInstruct, Xu et al. 2023), here of one task; None if
    the mean is 0. Raises MmitError without values.
    """
    if not values:
        raise MmitError("no scores", where="sensitivity", remedy="Give the score of each wording.")
    mean = fmean(values)
    ratio = pstdev(values) / mean if mean else None
    return {"mean": mean, "min": min(values), "max": max(values), "sensitivity": ratio}
