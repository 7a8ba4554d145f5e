"""What a score must beat: chance, the majority answer, the untuned model, and the tuned one without its pictures.

In: a task and the models. Out: a `Result` for each baseline, its answers kept beside the tuned model's. The
majority answers are learned from the training split, never from the answers they are compared with, unless
the task names no training split; then one answer for all questions is taken from the test and said to be.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmit.errors import MmitError
from mmit.eval.judges import JUDGES
from mmit.eval.probes import bank_wordings, chance, sensitivity, swapped, wordings
from mmit.eval.runner import Arm, Generates, How, Lazy, Result, evaluate
from mmit.eval.tasks import Item, Task, prompt_text, sample_items, task_items, training_items

if TYPE_CHECKING:
    from mmit.records import Record

LABELS = {"majority": "majority answer", "untuned": "untuned model", "blank_image": "blank image"}
# Beside these three, which every report has.
MORE = {"chance": "chance", "swapped_images": "swapped images"}
PROBES = ("blank", "swap")


class Majority:
    """Gives each question the most frequent answer to that very wording in training.

    A wording that training does not have gets the most frequent answer of all. Of equally frequent answers
    the one met first is taken.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        by_text: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for text, answer in pairs:
            by_text[text][answer] += 1
            overall[answer] += 1
        if not overall:
            raise MmitError("no answers to learn from", where="majority", remedy="Give at least one pair.")
        self.by_text = {text: counts.most_common(1)[0][0] for text, counts in by_text.items()}
        self.overall = overall.most_common(1)[0][0]

    def answer(self, text: str) -> str:
        """Return the answer to a prompt's text."""
        return self.by_text.get(text, self.overall)

    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        """Answer like a model; pictures and options make no difference."""
        return [self.answer(prompt_text(record)) for record in records]


@dataclass(frozen=True, slots=True)
class Baselines:
    """One Result per key of LABELS and MORE, None where there can be none; `notes` tells why, or what is special.

    `wordings` is None, or what `run_wordings` returns.
    """

    results: Mapping[str, Result | None]
    notes: Mapping[str, str]
    wordings: Mapping[str, Any] | None = None


def no_baselines() -> Baselines:
    """Return what a report says of baselines that were not asked for."""
    return Baselines(dict.fromkeys([*LABELS, *MORE]), dict.fromkeys(LABELS, "not asked for"))


def majority(task: Task, items: Sequence[Item]) -> tuple[Majority | None, str]:
    """Learn the majority answers for `items`; return them, or None, and a note for the report."""
    training = training_items(task)
    pairs = [(item.text, answer) for item in training or items for answer in _texts(item.reference)]
    if not pairs:
        return None, "the references are not answers in words"
    if training:
        return Majority(pairs), ""
    # Per wording this would read the answers off the test itself.
    note = "no training split: the most frequent answer of the test, given to every question"
    return Majority([("", answer) for _, answer in pairs]), note


def _texts(reference: Any) -> list[str]:
    """Return the answers in a metric's reference: a text, a list of accepted ones, or {"answer(s)" or "label": ...}."""
    if isinstance(reference, str):
        return [reference]
    if isinstance(reference, Mapping):
        return next((_texts(reference[key]) for key in ("answers", "answer", "label") if key in reference), [])
    return [text for text in reference if isinstance(text, str)] if isinstance(reference, list) else []


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        model: answers the questions.
        name: the model in reports, e.g. its folder.
        fingerprint, number_format: as in `Arm`.
        untuned: builds the untuned model, called only if its answers are missing; None leaves it out.
        no_untuned: why there is none.
    """

    model: Generates
    name: str
    fingerprint: str
    number_format: str | None = None
    untuned: Callable[[], Generates] | None = None
    no_untuned: str = "not asked for"

    def arm(self, prefix: str = "", **facts: Any) -> Arm:
        """Return what its answers are filed under; `prefix` says what was changed."""
        return Arm(prefix + self.fingerprint, number_format=self.number_format, **facts)


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside a score.

    Attributes:
        n: questions the untuned and the blind model are asked; 0 leaves all baselines out.
        probes: those of PROBES that are wanted.
        templates: wordings that are tried on the same questions, the task's own first; 0: none.
    """

    n: int = 500
    probes: Sequence[str] = ("blank",)
    templates: int = 0


USUAL = Beside()


def some_of(asked: Sequence[Item], items: Sequence[Item], *, n: int, seed: int) -> list[Item]:
    """Return the `n` questions of the baselines: of those that were `asked`, or of all `items` if that are fewer.

    Of the same questions as the tuned model, wherever these suffice: only then is the difference one of models.

    Args:
        asked: questions of the tuned model. items: all of the task's.
        n: most that are returned. seed: of the sample.
    """
    return sample_items(asked if len(asked) >= n else items, n, seed)


def run_baselines(
    subject: Subject,
    task: Task,
    *,
    items: Sequence[Item],
    asked: Sequence[Item],
    out_dir: str | os.PathLike[str],
    beside: Beside,
    how: How,
) -> Baselines:
    """Evaluate the baselines of a task.

    Chance and the majority answer all of them. The untuned model and the blind one answer `beside.n` of those that the
    tuned model was asked, or of all if that are fewer.

    Args:
        items: all questions of the task. asked: those of the tuned model.
        out_dir: folder of the files of answers, one an arm.
        beside: which baselines are wanted. how: as the tuned model was asked.

    Raises what `evaluate` does.
    """
    seed = task.seed if how.seed is None else how.seed
    some = some_of(asked, items, n=beside.n, seed=seed)
    results: dict[str, Result | None] = dict.fromkeys([*LABELS, *MORE])
    notes: dict[str, str] = {}

    def run(key: str, model: Generates, of: Sequence[Item], *, prefix: str, **facts: Any) -> None:
        arm = subject.arm(prefix, label=key, **facts)
        results[key] = evaluate(model, task, arm, items=of, out_dir=out_dir, how=how)

    def run_thoughtless(key: str, model: Generates) -> None:
        # Made in a moment, so answers on file are never worth keeping.
        written, anew = task.model_copy(update={"answer_by": "generate", "stop": []}), replace(how, overwrite=True)
        results[key] = evaluate(model, written, Arm(key, key), items=items, out_dir=out_dir, how=anew)

    _thoughtless(run_thoughtless, task, items, notes, seed=seed)
    if "blank" not in beside.probes:
        notes["blank_image"] = "not asked for"
    elif any(item.prompt.images for item in some):
        run("blank_image", subject.model, some, prefix="blank images, ", blank_images=True)
    else:
        notes["blank_image"] = "the questions have no pictures"
    if "swap" in beside.probes and (changed := swapped(some, seed=seed)):
        run("swapped_images", subject.model, changed, prefix=f"swapped images {seed}, ")
    elif "swap" in beside.probes:
        notes["swapped_images"] = "there are no two different pictures"
    if subject.untuned is None:
        notes["untuned"] = subject.no_untuned
    else:
        run("untuned", Lazy(subject.untuned), some, prefix="untuned, ")
    tried = None
    if beside.templates:
        names = {item.id for item in some}
        tried = run_wordings(subject, task, beside.templates, names=names, out_dir=out_dir, how=how)
    return Baselines(results, notes, tried)


def _thoughtless(
    run: Callable[[str, Generates], None], task: Task, items: Sequence[Item], notes: dict[str, str], *, seed: int
) -> None:
    """Run the answers that need no model."""
    if task.metric in JUDGES:
        notes["majority"] = "a judge grades the answers"
        return
    table, note = majority(task, items)
    if note:
        notes["majority"] = note
    if table is not None:
        run("majority", table)
    guesser = chance(task, items, seed=seed)
    if guesser is not None:
        run("chance", guesser)


def run_wordings(
    subject: Subject,
    task: Task,
    n: int,
    *,
    names: Container[str],
    out_dir: str | os.PathLike[str],
    how: How,
) -> dict[str, Any]:
    """Ask some questions in n wordings, the task's own first.

    Args:
        names: ids of the questions.
        out_dir: folder of the files of answers, one a wording.

    Returns:
        mean, min, max and sensitivity of the scores, and "each": prompt, accuracy, ci95, n, invalid_rate.
    """
    each: list[dict[str, Any]] = []
    for number, (worded, prompt, items) in enumerate(_worded(task, n, names), 1):
        arm = subject.arm(f"wording {prompt!r}, ", label=f"wording-{number}")
        found = evaluate(subject.model, worded, arm, items=items, out_dir=out_dir, how=how)
        numbers = {"accuracy": found.score.value, "ci95": list(found.score.ci95), "n": found.score.n}
        each.append({"prompt": prompt, **numbers, "invalid_rate": found.invalid_rate})
    return {**sensitivity([one["accuracy"] for one in each]), "each": each}


def check_wordings(task: Task, items: Sequence[Item], n: int) -> None:
    """Raise ConfigError if questions of the task cannot be asked in `n` wordings."""
    if task.bank:
        bank_wordings(task, items, n)
    else:
        wordings(task, n, pictures=any(item.prompt.images for item in items))


def _worded(task: Task, n: int, names: Container[str]) -> Iterator[tuple[Task, str, list[Item]]]:
    """Yield each wording as (task, its prompt or the names of its templates, the questions of the ids `names`)."""
    whole = task.model_copy(update={"sample": None})

    def asked(task: Task) -> list[Item]:
        return [item for item in task_items(task) if item.id in names]

    own = asked(whole)
    if whole.bank:
        for name, items in bank_wordings(whole, own, n):
            yield whole, name, items
        return
    pictures = any(item.prompt.images for item in own)
    for number, one in enumerate(wordings(whole, n, pictures=pictures)):
        yield one, one.prompt, asked(one) if number else own
