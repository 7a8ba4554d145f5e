"""What a score must beat: the majority answer, the untuned model, and the tuned model that sees nothing.

In: a task and the models. Out: a `Result` for each baseline, its answers kept beside the tuned model's. The
majority answers are learned from the training split, never from the answers they are compared with, unless
the task names no training split; then one answer for all questions is taken from the test and said to be.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmit.errors import MmitError
from mmit.eval.runner import Generates, Lazy, Result, evaluate
from mmit.eval.tasks import Item, Task, prompt_text, sample_items, training_items
from mmit.records import Record

LABELS = {"majority": "majority answer", "untuned": "untuned model", "blank_image": "blank image"}


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
    """One Result per key of LABELS, None where there can be none; `notes` tells why, or what is special."""

    results: Mapping[str, Result | None]
    notes: Mapping[str, str]


def no_baselines() -> Baselines:
    """Return what a report says of baselines that were not asked for."""
    return Baselines(dict.fromkeys(LABELS), dict.fromkeys(LABELS, "not asked for"))


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
    """Return the answers in a metric's reference: a text, a list of accepted ones, or {"answer(s)": ...}."""
    if isinstance(reference, str):
        return [reference]
    if isinstance(reference, Mapping):
        return _texts(reference.get("answers", reference.get("answer")))
    return [text for text in reference if isinstance(text, str)] if isinstance(reference, list) else []


def run_baselines(
    tuned: Generates,
    task: Task,
    *,
    untuned_factory: Callable[[], Generates] | None,
    items: Sequence[Item],
    asked: Sequence[Item],
    out_dir: str | os.PathLike[str],
    fingerprint: str,
    baseline_n: int,
    seed: int,
    batch_size: int,
    overwrite: bool = False,
    progress: bool = True,
) -> Baselines:
    """Evaluate the baselines of a task.

    The majority answers all `items`. The untuned model and the blind one answer `baseline_n` of the questions
    `asked` of the tuned model, or of all if that are fewer. The untuned model is built only if answers of it
    are missing; None leaves it out. Raises what `evaluate` does.
    """
    pool = asked if len(asked) >= baseline_n else items
    some = sample_items(pool, baseline_n, seed)
    results: dict[str, Result | None] = dict.fromkeys(LABELS)
    notes: dict[str, str] = {}

    def run(key: str, model: Generates, of: Sequence[Item], **options: Any) -> None:
        common: dict[str, Any] = {"out_dir": out_dir, "seed": seed, "batch_size": batch_size}
        results[key] = evaluate(model, task, label=key, items=of, progress=progress, **(common | options))

    table, note = majority(task, items)
    if note:
        notes["majority"] = note
    if table is not None:
        # Made in a moment, so answers on file are never worth keeping.
        run("majority", table, items, fingerprint="majority", overwrite=True)
    if any(item.prompt.images for item in some):
        mark = f"blank images, {fingerprint}"
        run("blank_image", tuned, some, fingerprint=mark, blank_images=True, overwrite=overwrite)
    else:
        notes["blank_image"] = "the questions have no pictures"
    if untuned_factory is None:
        notes["untuned"] = "not asked for"
    else:
        mark = f"untuned, {fingerprint}"
        run("untuned", Lazy(untuned_factory), some, fingerprint=mark, overwrite=overwrite)
    return Baselines(results, notes)
