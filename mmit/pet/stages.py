"""The three stages: one model for each pattern, soft labels of what they say together, one model that learned these.

Each writes into the folder of a task (`task.py`) and goes on where it was stopped.
"""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.build.annotated import Made
from mmit.build.licences import terms_of
from mmit.build.write import Counts, Stated, write_build
from mmit.data.choices import CHOICES, SHARES, choices_of
from mmit.errors import ConfigError, MmitError, nearest
from mmit.io import whole_file
from mmit.pet.scoring import accuracy, scores, soft_labels
from mmit.pet.settings import Fitting, Generations, Labelling
from mmit.pet.task import (
    LABELLED,
    STATE,
    STUDENT,
    Fitted,
    begun,
    digest_of_pattern,
    digest_of_rows,
    fitted_models,
    read_state,
    short_digest,
    write_state,
)
from mmit.records import Record, Text, Turn, read_jsonl

if TYPE_CHECKING:
    from mmit.generate import Model
    from mmit.pet.patterns import Pattern, Patterns
    from mmit.pet.rows import Example

Say = Callable[[str], None]
OVER = ("labels", "vocabulary")
# A run on a few rows: what the start's config measures while it trains is not theirs.
_ALONE: dict[str, Any] = {
    "train.eval_every": None,
    "train.eval_tasks": [],
    "train.keep_best": None,
    "data.split_turns": False,
}


def _quiet(text: str) -> None:
    pass


def fit(
    model: str | os.PathLike[str],
    patterns: Patterns,
    labelled: Sequence[Example],
    *,
    dir: str | os.PathLike[str],
    unlabelled: Sequence[Example] = (),
    how: Fitting = Fitting(),  # noqa: B008 - frozen
    generations: Generations = Generations(),  # noqa: B008 - frozen
    say: Say = _quiet,
) -> list[Fitted]:
    """Fit a model to the labelled rows for every pattern and repetition.

    Args:
        model: a run or checkpoint, the start of every model.
        dir: the folder of the task.
        unlabelled: rows that models label for each other, where there is more than one generation.

    Returns:
        the models of all generations.

    Raises:
        ConfigError: a setting that cannot be used, or the folder was begun with others. MmitError: a run was stopped.
    """
    if generations.count > 1 and not unlabelled:
        problem = "models can label for each other only rows without a label, and there are none"
        raise ConfigError(problem, where="unlabelled", remedy="Name them, or set generations.count to 1.")
    if generations.count > 1 and len(patterns.patterns) * how.repetitions < 2:
        problem = "one model has no other to label for it"
        raise ConfigError(problem, where="generations", remedy="Write two patterns, or set fit.repetitions to 2.")
    for example in labelled:  # before the first run, so that a row which does not suit a pattern is met at once
        for pattern in patterns.patterns:
            pattern.record(example.fields, example.label, where=example.where)
    folder = Path(dir)
    asked = {"model": os.fspath(model), "fit": asdict(how), "generations": asdict(generations)}
    asked |= {"labelled": digest_of_rows(labelled), "patterns": {p.id: digest_of_pattern(p) for p in patterns.patterns}}
    done = begun(folder, asked | ({"unlabelled": digest_of_rows(unlabelled)} if generations.count > 1 else {}))
    before = _before(model, patterns, labelled, done, folder)
    given: dict[str, list[Example]] = {}
    for generation in range(generations.count):
        models = []
        for position, pattern in enumerate(patterns.patterns, 1):
            for repetition in range(how.repetitions):
                name = f"g{generation}/{position}_{_named(pattern.id)}-{repetition}"
                rows = given.get(f"{position}-{repetition}", list(labelled))
                # Written down when it is fitted: the same command goes on with the next one.
                if name not in done["models"]:
                    records = [_record(pattern, row) for row in rows]
                    seed = how.seed * 1000 + generation * 100 + repetition
                    _trained(model, records, folder / name, how, seed=seed, objective={"kind": "choices", "lm": how.lm})
                    after = accuracy(_loaded_scores(folder / name, pattern, labelled), labelled, patterns.labels)
                    facts = Fitted(pattern.id, repetition, generation, name, len(rows), before[pattern.id], after)
                    done["models"][name] = asdict(facts)
                    write_state(folder, done)
                    say(f"{name}: {len(rows)} rows, accuracy on the labelled ones {facts.before:.3f} -> {after:.3f}")
                models.append(Fitted(**done["models"][name]))
        if generation + 1 < generations.count:
            found = [scored(folder, fitted, patterns, unlabelled) for fitted in models]
            given = _next(models, found, patterns, labelled, unlabelled, generations=generations, seed=how.seed)
    return [Fitted(**facts) for facts in done["models"].values()]


def _record(pattern: Pattern, row: Example) -> Record:
    provenance: dict[str, Any] = {"source": row.source, "row": row.row, "licence": row.licence}
    return pattern.record(row.fields, row.label, where=row.where, id=f"{row.where}", **provenance)


def _trained(
    model: str | os.PathLike[str],
    data: Any,
    folder: Path,
    how: Fitting,
    *,
    seed: int,
    objective: Mapping[str, Any],
) -> None:
    """A run, or the rest of it. Raises MmitError after a signal."""
    from mmit.api import train

    settings: dict[str, Any] = {**_ALONE, **(how.settings or {}), "run.seed": seed}
    settings |= {f"train.objective.{key}": value for key, value in objective.items()}
    resume = "auto" if folder.exists() else None
    run = train(model, data, dir=folder, tune=how.tune, steps=how.steps, resume=resume, settings=settings)
    if not run.finished:
        raise MmitError("stopped by a signal", where=str(folder), remedy="The same command goes on.")


def _loaded_scores(
    model: str | os.PathLike[str], pattern: Pattern, rows: Sequence[Example], *, calibrate: bool = False
) -> np.ndarray:
    """Scores (N, K) by a model that is loaded for it and let go."""
    return scores(_load(model), pattern, rows, calibrate=calibrate)


def _load(model: str | os.PathLike[str]) -> Model:
    from mmit.generate import load

    gc.collect()  # of the model before: cycles hold its weights
    return load(model)


def _before(
    model: str | os.PathLike[str],
    patterns: Patterns,
    labelled: Sequence[Example],
    done: dict[str, Any],
    folder: Path,
) -> dict[str, float]:
    """Accuracy of each pattern on the labelled rows with the start."""
    if "before" not in done:
        start = _load(model)
        found = {p.id: accuracy(scores(start, p, labelled), labelled, patterns.labels) for p in patterns.patterns}
        done["before"] = found
        write_state(folder, done)
    return dict(done["before"])


def scored(
    folder: Path, fitted: Fitted, patterns: Patterns, rows: Sequence[Example], *, calibrate: bool = False
) -> np.ndarray:
    """What a fitted model says of rows; kept beside its run, so that nobody loads the model for the same rows again.

    Args:
        folder: of the run. fitted: the model. patterns: of the task. rows: N examples.
        calibrate: see `scores`.

    Returns:
        (N, K) scores of the K labels.
    """
    pattern = patterns.by_id[fitted.pattern]
    # Kept for whoever asks the same: the next generation and `label` do, and each would load the model again.
    digest = short_digest([calibrate, digest_of_pattern(pattern), digest_of_rows(rows)])
    path = folder / f"{fitted.run}.scores.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["digest"]) == digest:
                return np.array(kept["scores"])
    found = _loaded_scores(folder / fitted.run, pattern, rows, calibrate=calibrate)
    with whole_file(path) as file:
        np.savez(file, scores=found, digest=np.array(digest))
    return found


def _next(
    models: Sequence[Fitted],
    found: Sequence[np.ndarray],
    patterns: Patterns,
    labelled: Sequence[Example],
    unlabelled: Sequence[Example],
    *,
    generations: Generations,
    seed: int,
) -> dict[str, list[Example]]:
    """Rows of each model's next generation: the labelled ones, and some that other models are sure of."""
    generation = models[0].generation
    # As many of each label as the labelled rows have, grown: without that the commonest answer would take over.
    growth = generations.factor ** (generation + 1) - 1
    wanted = {name: round(sum(row.label == name for row in labelled) * growth) for name in patterns.labels}
    given: dict[str, list[Example]] = {}
    for place, fitted in enumerate(models):
        draw = random.Random(f"{seed}/{generation}/{fitted.run}")
        # Never itself: a model that is fitted to its own answers only grows surer of them.
        others = [n for n in range(len(models)) if n != place]
        chosen = draw.sample(others, max(1, round(len(others) * generations.share)))
        together = [found[n] for n in chosen]
        shares = soft_labels(together, weights=[models[n].before for n in chosen], temperature=1.0)
        new = confident(shares, patterns.labels, wanted, draw=draw)
        position = list(patterns.by_id).index(fitted.pattern) + 1
        rows = [replace(unlabelled[n], label=name) for n, name in new]
        given[f"{position}-{fitted.repetition}"] = [*labelled, *rows]
    return given


def confident(
    shares: np.ndarray, labels: Sequence[str], wanted: Mapping[str, int], *, draw: random.Random
) -> list[tuple[int, str]]:
    """Draw rows for each label among those that have it, the surer the likelier.

    Args:
        shares: (N, K) probabilities of the K labels. labels: their names.
        wanted: how many of each label; where fewer rows have it, all of them are taken. draw: the random numbers.

    Returns:
        (row, label) pairs.
    """
    best = shares.argmax(axis=1)
    found = []
    for k, name in enumerate(labels):
        rows = np.flatnonzero(best == k)
        count = min(wanted[name], len(rows))
        if count:
            chances = shares[rows, k] / shares[rows, k].sum()
            rng = np.random.default_rng(draw.getrandbits(64))
            found += [(int(n), name) for n in rng.choice(rows, size=count, replace=False, p=chances)]
    return found


def label(
    dir: str | os.PathLike[str],
    patterns: Patterns,
    unlabelled: Sequence[Example],
    *,
    how: Labelling = Labelling(),  # noqa: B008 - frozen
    settings: Mapping[str, Any] | None = None,
) -> Counts:
    """Label rows with the last generation of fitted models, into the folder `labelled` of the task.

    Args:
        dir: the folder of the task. settings: kept in build.json.

    Raises:
        ConfigError: nothing was fitted there, or it is labelled already.
    """
    folder = Path(dir)
    models = fitted_models(folder)
    last = max(fitted.generation for fitted in models)
    models = [fitted for fitted in models if fitted.generation == last]
    pattern = patterns.named(how.pattern, where="label.pattern")
    fitted_with = read_state(folder)["asked"].get("patterns", {})
    for fitted in models:
        own = patterns.named(fitted.pattern, where=str(folder / STATE))
        if fitted_with.get(own.id, digest_of_pattern(own)) != digest_of_pattern(own):
            problem = f"the models of pattern '{own.id}' were fitted with another wording or other answers"
            remedy = "Set the pattern back, or fit it with a new --out."
            raise ConfigError(problem, where=str(folder / STATE), remedy=remedy)
    for row in unlabelled:
        pattern.record(row.fields, where=row.where)
    given = [scored(folder, fitted, patterns, unlabelled, calibrate=how.calibrate) for fitted in models]
    weights = [fitted.before for fitted in models] if how.weights == "accuracy" else None
    shares = soft_labels(given, weights=weights, temperature=how.temperature)
    facts = {"models": [fitted.run for fitted in models], **asdict(how)}

    def made() -> Iterator[Made]:
        for row, of_row in zip(unlabelled, shares, strict=True):
            yield Made(patterns.task, soft_record(pattern, row, of_row, patterns=patterns, facts=facts), False)

    # The rows are the user's own choice, nobody's that a build would bring in; the records keep their terms.
    terms = {term for row in unlabelled for term in terms_of(row.licence)}
    return write_build(made(), folder / LABELLED, Stated(dict(settings or facts)), allow_licences=sorted(terms))


def soft_record(
    pattern: Pattern, row: Example, shares: np.ndarray, *, patterns: Patterns, facts: Mapping[str, Any]
) -> Record:
    """The record of a row with the best label as its answer, and the shares of all in its meta.

    Args:
        pattern: asks the question. row: the example. shares: (K,) probabilities of the labels.
        patterns: of the task. facts: of the build, for the meta.
    """
    best = patterns.labels[int(shares.argmax())]
    meta: dict[str, Any] = {"task": patterns.task, "label": best, "labels": list(patterns.labels)}
    meta["build"] = {"how": "pet", "template": pattern.id, "wording": pattern.template.digest, **facts}
    provenance: dict[str, Any] = {"source": row.source, "row": row.row, "licence": row.licence}
    return pattern.record(
        row.fields, best, shares=shares.tolist(), where=row.where, id=row.where, meta=meta, **provenance
    )


def distil(
    model: str | os.PathLike[str],
    dir: str | os.PathLike[str],
    *,
    how: Fitting = Fitting(lm=0.0),  # noqa: B008 - frozen
    over: str = "labels",
    temperature: float = 2.0,
) -> Path:
    """Train one model on the labelled set of a task; returns the folder of its run.

    Args:
        model: a run or checkpoint, the start.
        over: `labels`, the cross-entropy over the choices with the soft labels, as published; or `vocabulary`, plain
            tuning on each answer with its share as the weight.
        temperature: what the student's scores are divided by too, as published; of `labels` alone.

    Raises:
        ConfigError: nothing was labelled there, or no such `over`. MmitError: the run was stopped.
    """
    if over not in OVER:
        raise ConfigError(f"is '{over}'", where="distil.over", remedy=nearest(over, OVER))
    folder = Path(dir)
    files = sorted((folder / LABELLED / "records").glob("*.jsonl"))
    if not files:
        problem = "there is no labelled set here"
        raise ConfigError(problem, where=str(folder), remedy="Run mmit pet label first, with the same --out.")
    data: list[Any] = [{"path": str(file), "format": "mmit"} for file in files]
    objective: dict[str, Any] = {"kind": "choices", "lm": how.lm, "temperature": temperature}
    if over == "vocabulary":
        data = [part for file in files for record in read_jsonl(file) for part in weighted_answers(record)]
        objective = {"kind": "sft"}
    _trained(model, data, folder / STUDENT, how, seed=how.seed, objective=objective)
    return folder / STUDENT


def weighted_answers(record: Record) -> list[Record]:
    """The record once for each choice that has a share, with the share as its weight."""
    answers, shares = choices_of(record)
    meta = {key: value for key, value in record.meta.items() if key not in (CHOICES, SHARES)}
    plain = replace(record, meta=meta)
    return [
        replace(plain, turns=(*record.turns[:-1], Turn("assistant", (Text(answer),))), weight=record.weight * share)
        for answer, share in zip(answers, shares, strict=True)
        if share > 0
    ]


def _named(name: str) -> str:
    """An id as part of a file's name."""
    return re.sub(r"[^\w.-]", "_", name)
