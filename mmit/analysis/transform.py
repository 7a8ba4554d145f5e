"""What an arm of a study does to its records: which are kept, and what of a record is shown.

In: records with `task` in meta, one `Transform`, a seed. Out: the changed records, in the order of the input. A record
depends on the seed and its own place alone, so that two arms differ in nothing but what was asked for; a smaller `size`
keeps a part of what a larger one keeps. Refuses to corrupt or swap where nothing wrong is known.

definition and images are those of Kung and Peng (arXiv:2305.11383): simplified leaves the label space, empty leaves no
words; a swapped image must change the right answer, or the record would be as good as before.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import PIL.Image

from mmit.errors import ConfigError, nearest
from mmit.records import Image, Part, Record, Text, Turn

DEFINITIONS, IMAGES = ("full", "simplified", "empty"), ("right", "blank", "swapped")
LABELS, REPEATED = 50, 4
GREY = (127, 127, 127)
ANSWER = "{answer}"


@dataclass(frozen=True)
class Transform:
    """What happens to records, in this order.

    Attributes:
        tasks: tasks that are kept; all by default.
        task_count: so many of the tasks, drawn by the seed (a smaller number is a part of a larger).
        caps: task -> the most records of it; 0 leaves it out.
        shares: task -> share of `size` records, for mixtures.
        select: {by: score or random, keep: N}: the N records of highest meta.build.score, or N by chance.
        size: records that are kept, drawn by the seed.
        corrupt: share of records whose answer is replaced by another answer of the same task.
        style: words around the answer, with {answer}; of style_tasks alone where these are named.
        definition: full, simplified, empty. images: right, blank, swapped.
        draw: another number draws other records with the same seed, for a control of equal arms.
    """

    tasks: tuple[str, ...] = ()
    task_count: int | None = None
    caps: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    select: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    corrupt: float = 0.0
    style: str = ANSWER
    style_tasks: tuple[str, ...] = ()
    definition: str = "full"
    images: str = "right"
    draw: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any], *, where: str) -> Transform:
        """Return the transform that keys of a config describe. Raises ConfigError."""
        known = [item.name for item in fields(cls)]
        for key, value in given.items():
            if key not in known:
                raise ConfigError(f"unknown key 'data.{key}'", where=where, remedy=nearest(key, known))
            problem = _problem(key, value)
            if problem:
                raise ConfigError(f"data.{key} is {value!r}", where=where, remedy=problem)
        listed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        made = cls(**listed)
        if made.shares and made.size is None:
            raise ConfigError("data.shares without data.size", where=where, remedy="Say how many records: data.size.")
        return made


def _problem(key: str, value: Any) -> str:
    """Return what a key should be, "" if it is."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if key in ("tasks", "style_tasks"):
        return "" if isinstance(value, list) and all(isinstance(v, str) for v in value) else "Give a list of tasks."
    if key == "draw":
        return "" if number and value >= 0 else "Give a whole number."
    if key in ("size", "task_count"):
        return "" if number and value > 0 else "Give a whole number above 0."
    if key == "corrupt":
        return "" if isinstance(value, (int, float)) and 0 <= value <= 1 else "Give a share from 0 to 1."
    if key == "style":
        good = isinstance(value, str) and value.count(ANSWER) == 1
        return "" if good else "Give words with {answer} once."
    if key in ("definition", "images"):
        names = DEFINITIONS if key == "definition" else IMAGES
        return "" if value in names else f"Give one of {', '.join(names)}."
    if key == "caps":
        good = isinstance(value, Mapping) and all(isinstance(v, int) and v >= 0 for v in value.values())
        return "" if good else "Give task: number of records."
    if key == "shares":
        good = isinstance(value, Mapping) and all(isinstance(v, (int, float)) and v >= 0 for v in value.values())
        return "" if good and abs(sum(value.values()) - 1) < 1e-6 else "Give task: share, with a sum of 1."
    good = isinstance(value, Mapping) and set(value) == {"by", "keep"} and value["by"] in ("score", "random")
    return "" if good and isinstance(value["keep"], int) else "Give {by: score, keep: N} or {by: random, keep: N}."


def task_of(record: Record, *, where: str) -> str:
    """Return the task of a record. Raises ConfigError where its meta says none."""
    task = record.meta.get("task")
    if not isinstance(task, str) or not task:
        remedy = "Give each record's meta a 'task', or import with a column of that name."
        raise ConfigError("a record has no task in its meta", where=record.where or where, remedy=remedy)
    return task


def transformed(records: Sequence[Record], transform: Transform, *, seed: int, where: str) -> list[Record]:
    """Return the records of an arm.

    Args:
        records: of all tasks, the same for every arm.
        seed: of the arm; what is drawn depends on it and on `transform.draw` alone.
        where: the arm, for messages.

    Raises:
        ConfigError: a task that no record has, more records asked for than there are, or a change that cannot be made.
    """
    seed += 1_000_003 * transform.draw
    tasks = [task_of(record, where=where) for record in records]
    names = sorted(set(tasks))
    for name in (*transform.tasks, *transform.caps, *transform.shares, *transform.style_tasks):
        if name not in names:
            raise ConfigError(f"no record is of the task '{name}'", where=where, remedy=nearest(name, names))
    chosen = _tasks(names, transform, seed, where)
    places = [place for place in range(len(records)) if tasks[place] in chosen]
    for task, cap in transform.caps.items():
        own = [place for place in places if tasks[place] == task]
        kept = set(_first(own, min(cap, len(own)), seed, where, "records"))
        places = [place for place in places if tasks[place] != task or place in kept]
    places = _selected(records, places, transform, seed, where)
    if transform.shares:
        places = _shared(places, tasks, transform, seed, where)
    elif transform.size is not None:
        places = _first(places, transform.size, seed, where, "records")
    answers: dict[str, list[str]] = defaultdict(list)
    for place in range(len(records)):  # of all records: a small arm knows the same wrong answers as a large one
        answers[tasks[place]].append(records[place].turns[-1].text)
    others = _Others(records, tasks) if transform.images == "swapped" else None
    made = []
    for place in places:
        rng = random.Random(f"{seed}|change|{place}")
        record = records[place]
        if rng.random() < transform.corrupt:
            record = _corrupted(record, answers[tasks[place]], rng)
        if not transform.style_tasks or tasks[place] in transform.style_tasks:
            record = _answered(record, transform.style.replace(ANSWER, record.turns[-1].text))
        record = _defined(record, transform.definition, answers[tasks[place]])
        made.append(_seen(record, transform.images, others, place, rng))
    return made


def _tasks(names: Sequence[str], transform: Transform, seed: int, where: str) -> set[str]:
    chosen = list(transform.tasks or transform.shares or names)
    if transform.task_count is None:
        return set(chosen)
    if transform.task_count > len(chosen):
        problem = f"data.task_count is {transform.task_count}, but there are {len(chosen)} tasks"
        raise ConfigError(problem, where=where, remedy="Lower it, or add tasks.")
    order = sorted(chosen)
    random.Random(f"{seed}|tasks").shuffle(order)
    return set(order[: transform.task_count])


def _first(places: Sequence[int], count: int, seed: int, where: str, what: str) -> list[int]:
    """Return `count` places, the first ones of one order: a smaller number keeps a part of a larger one's."""
    if count > len(places):
        problem = f"{count} {what} are asked for, but there are {len(places)}"
        raise ConfigError(problem, where=where, remedy="Lower the number, or give more records.")
    order = sorted(places, key=lambda place: random.Random(f"{seed}|size|{place}").random())
    return sorted(order[:count])


def _selected(
    records: Sequence[Record], places: Sequence[int], transform: Transform, seed: int, where: str
) -> list[int]:
    if not transform.select:
        return list(places)
    keep = transform.select["keep"]
    if transform.select["by"] == "random":
        return _first(places, keep, seed, where, "records")
    if keep > len(places):
        return _first(places, keep, seed, where, "records")  # says so
    scores = []
    for place in places:
        build = records[place].meta.get("build")
        score = build.get("score") if isinstance(build, Mapping) else None
        if not isinstance(score, (int, float)):
            remedy = "Score the records first: mmit build select CONFIG."
            raise ConfigError("a record has no score", where=records[place].where or where, remedy=remedy)
        # Equal scores are told apart by chance, not by their place.
        scores.append((-float(score), random.Random(f"{seed}|tie|{place}").random(), place))
    return sorted(place for _, _, place in sorted(scores)[:keep])


def _shared(places: Sequence[int], tasks: Sequence[str], transform: Transform, seed: int, where: str) -> list[int]:
    assert transform.size is not None
    found: list[int] = []
    for task, share in transform.shares.items():
        own = [place for place in places if tasks[place] == task]
        found += _first(own, round(share * transform.size), seed, where, f"records of '{task}'")
    return sorted(found)


def _answered(record: Record, text: str) -> Record:
    if text == record.turns[-1].text:
        return record
    *before, last = record.turns
    return replace(record, turns=(*before, replace(last, parts=(Text(text),))))


def _corrupted(record: Record, answers: Sequence[str], rng: random.Random) -> Record:
    right = record.turns[-1].text
    choices = record.meta.get("choices")
    known = choices if isinstance(choices, list) else sorted(set(answers))
    wrong = [answer for answer in known if answer != right]
    if not wrong:
        remedy = "Leave its task out with data.tasks."
        raise ConfigError("no wrong answer is known", where=record.where or str(record.id), remedy=remedy)
    return _answered(record, rng.choice(wrong))


def label_space(answers: Sequence[str]) -> tuple[str, ...]:
    """Return the different answers of a task, () unless they repeat as labels do.

    That is: at most LABELS different ones, each REPEATED times on average.
    """
    counts = Counter(answer.strip() for answer in answers)
    closed = len(counts) <= LABELS and counts.total() >= REPEATED * len(counts)
    return tuple(sorted(counts)) if closed else ()


def _defined(record: Record, definition: str, answers: Sequence[str]) -> Record:
    """Leave of the user's words all, what the answer can be, or nothing; images stay. `answers` are the task's."""
    if definition == "full":
        return record
    choices = record.meta.get("choices")
    listed = ", ".join(choices if isinstance(choices, list) else label_space(answers))
    words = f"Answer with one of: {listed}." if listed else "Answer."
    turns = []
    for turn in record.turns:
        if turn.role == "system":
            continue
        if turn.role == "user":
            images: tuple[Part, ...] = tuple(part for part in turn.parts if isinstance(part, Image))
            if not images and definition == "empty":
                remedy = "Leave text-only tasks out with data.tasks: without words they have no input."
                raise ConfigError("nothing is left of it", where=record.where or str(record.id), remedy=remedy)
            turn = Turn("user", images if definition == "empty" else (*images, Text(words)))
        turns.append(turn)
    return replace(record, turns=tuple(turns))


class _Others:
    """Records of the same task by their answer, for images that change it."""

    def __init__(self, records: Sequence[Record], tasks: Sequence[str]) -> None:
        self._records, self._tasks = records, tasks
        self._places: dict[str, list[int]] = defaultdict(list)
        for place, task in enumerate(tasks):
            if records[place].images:
                self._places[task].append(place)

    def images(self, place: int, rng: random.Random) -> tuple[Image, ...]:
        """Return the images of another record of the task whose answer is another one."""
        record = self._records[place]
        count, right = len(record.images), record.turns[-1].text
        same = [
            other
            for other in self._places[self._tasks[place]]
            if self._records[other].turns[-1].text != right and len(self._records[other].images) == count
        ]
        if not same:
            remedy = "Leave its task out with data.tasks."
            raise ConfigError("no image would change the answer", where=record.where or str(record.id), remedy=remedy)
        return self._records[rng.choice(same)].images


def _seen(record: Record, images: str, others: _Others | None, place: int, rng: random.Random) -> Record:
    if images == "right" or not record.images:
        return record
    shown = iter(others.images(place, rng) if others is not None else [blank()] * len(record.images))
    turns = tuple(
        replace(turn, parts=tuple(next(shown) if isinstance(part, Image) else part for part in turn.parts))
        for turn in record.turns
    )
    return replace(record, turns=turns)


def blank() -> Image:
    """Return a grey image."""
    return Image(PIL.Image.new("RGB", (64, 64), GREY))
