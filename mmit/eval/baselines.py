"""What a score must beat: chance, the majority answer, the untuned model, and the tuned one without its pictures.

In: a task and the models. Out: a `Result` for each baseline, its answers kept beside the tuned model's. The
majority answers are learned from the training split, never from the answers they are compared with, unless
the task names no training split; then one answer for all questions is taken from the test and said to be.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmit.errors import MmitError
from mmit.eval.judges import JUDGES
from mmit.eval.probes import chance, sensitivity, swapped, wordings
from mmit.eval.ranks import ALONE, Ranks
from mmit.eval.runner import Generates, Lazy, Result, evaluate
from mmit.eval.tasks import Item, Task, prompt_text, sample_items, task_items, training_items

if TYPE_CHECKING:
    from mmit.eval.metrics import Score
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


def run_baselines(  # noqa: PLR0913
    tuned: Generates,
    task: Task,
    *,
    untuned_factory: Callable[[], Generates] | None,
    items: Sequence[Item],
    asked: Sequence[Item],
    out_dir: str | os.PathLike[str],
    fingerprint: str,
    number_format: str | None = None,
    baseline_n: int,
    seed: int,
    batch_size: int,
    probes: Sequence[str] = ("blank",),
    templates: int = 0,
    metric: Callable[..., Score] | None = None,
    ranks: Ranks = ALONE,
    overwrite: bool = False,
    progress: bool = True,
) -> Baselines:
    """Evaluate the baselines of a task.

    Chance and the majority answer all `items`. The untuned model and the blind one answer `baseline_n` of the questions
    `asked` of the tuned model, or of all if that are fewer. The untuned model is built only if answers of it
    are missing; None leaves it out. `probes` are those of PROBES that are wanted; `templates` wordings are tried
    on the same questions (0: none). Raises what `evaluate` does.
    """
    pool = asked if len(asked) >= baseline_n else items
    some = sample_items(pool, baseline_n, seed)
    results: dict[str, Result | None] = dict.fromkeys([*LABELS, *MORE])
    notes: dict[str, str] = {}
    common: dict[str, Any] = {"out_dir": out_dir, "seed": seed, "batch_size": batch_size, "progress": progress}
    common |= {"metric": metric, "overwrite": overwrite, "ranks": ranks, "number_format": number_format}

    def run(key: str, model: Generates, of: Sequence[Item], *, of_task: Task = task, **options: Any) -> None:
        results[key] = evaluate(model, of_task, label=key, items=of, **(common | options))

    _thoughtless(run, task, items, notes, seed=seed)
    has_pictures = any(item.prompt.images for item in some)
    if "blank" not in probes:
        notes["blank_image"] = "not asked for"
    elif has_pictures:
        run("blank_image", tuned, some, fingerprint=f"blank images, {fingerprint}", blank_images=True)
    else:
        notes["blank_image"] = "the questions have no pictures"
    if "swap" in probes:
        changed = swapped(some, seed=seed)
        if changed:
            run("swapped_images", tuned, changed, fingerprint=f"swapped images {seed}, {fingerprint}")
        else:
            notes["swapped_images"] = "there are no two different pictures"
    if untuned_factory is None:
        notes["untuned"] = "not asked for"
    else:
        run("untuned", Lazy(untuned_factory), some, fingerprint=f"untuned, {fingerprint}")
    tried = None
    if templates:
        names = {item.id for item in some}
        tried = run_wordings(tuned, task, templates, names=names, fingerprint=fingerprint, **common)
    return Baselines(results, notes, tried)


def _thoughtless(
    run: Callable[..., None], task: Task, items: Sequence[Item], notes: dict[str, str], *, seed: int
) -> None:
    """Run the answers that need no model: made in a moment, so those on file are never worth keeping."""
    if task.metric in JUDGES:
        notes["majority"] = "a judge grades the answers"
        return
    written = task.model_copy(update={"answer_by": "generate", "stop": []})
    anew: dict[str, Any] = {"overwrite": True, "number_format": None}
    table, note = majority(task, items)
    if note:
        notes["majority"] = note
    if table is not None:
        run("majority", table, items, of_task=written, fingerprint="majority", **anew)
    guesser = chance(task, items, seed=seed)
    if guesser is not None:
        run("chance", guesser, items, of_task=written, fingerprint="chance", **anew)


def run_wordings(
    model: Generates, task: Task, n: int, *, names: Container[str], fingerprint: str, **common: Any
) -> dict[str, Any]:
    """Ask the questions of the ids `names` in n wordings, the task's own first.

    Returns mean, min, max and sensitivity of the scores, and "each": prompt, accuracy, ci95, n, invalid_rate.
    """
    each: list[dict[str, Any]] = []
    whole = task.model_copy(update={"sample": None})
    pictures: bool | None = None
    tasks = [whole]
    for number in range(n):
        items = [item for item in task_items(tasks[number]) if item.id in names]
        if pictures is None:
            pictures = any(item.prompt.images for item in items)
            tasks = wordings(whole, n, pictures=pictures)
        mark = f"wording {tasks[number].prompt!r}, {fingerprint}"
        found = evaluate(model, tasks[number], items=items, label=f"wording-{number + 1}", fingerprint=mark, **common)
        numbers = {"accuracy": found.score.value, "ci95": list(found.score.ci95), "n": found.score.n}
        each.append({"prompt": tasks[number].prompt, **numbers, "invalid_rate": found.invalid_rate})
    return {**sensitivity([one["accuracy"] for one in each]), "each": each}
