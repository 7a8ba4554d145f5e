"""The result of one metric, and the small steps that every metric shares.

In: one number per answer (or counts of a table). Out: a `Score` with its sample size, its 95 % interval, the
share of answers that could not be read, and the same numbers per group. Knows no benchmark's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mmit.errors import MmitError, nearest
from mmit.eval.metrics.intervals import bootstrap_mean, cluster_bootstrap_counts, clustered, wilson
from mmit.sections import brief


@dataclass(frozen=True, slots=True)
class Counted:
    """A number of a table of counts, such as F1: what its interval over clusters needs.

    Attributes:
        key: of `Score.details`; its interval is `KEY_ci95` there, and that of the score where this is its value.
        cells: (n,) the cell that each answer fell in, 0 to `count` - 1.
        statistic: (R, count) counts -> (R,) shares.
    """

    key: str
    cells: Sequence[int]
    count: int
    statistic: Callable[[np.ndarray], np.ndarray]

    def interval(self, clusters: Sequence[str], at: Sequence[int], *, seed: int) -> tuple[float, float]:
        """Return the interval of the answers `at`, drawn in their clusters."""
        cells, own = [self.cells[i] for i in at], [clusters[i] for i in at]
        return cluster_bootstrap_counts(cells, own, self.statistic, count=self.count, seed=seed)


_IN_QUOTES = 'Write answers as texts, numbers too: "5", not 5.'
# Keys of `Score.details` with one entry per answer, in input order: what a report shows and `compare` pairs.
PER_ANSWER = ("values", "parsed")


@dataclass(frozen=True, slots=True)
class Score:
    """One metric over n answers.

    `value` is a share in 0..1 unless the metric says otherwise (MME sums, OCRBench points, CIDEr).
    `unparsed_rate` is the share of answers that are empty or not in a form the metric can read.
    `details["values"]` has one number per scored unit and `details["parsed"]` what was read from each answer.
    """

    name: str
    profile: str
    value: float
    n: int
    ci95: tuple[float, float]
    unparsed_rate: float = 0.0
    by_group: Mapping[str, Score] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    counted: Counted | None = None

    def with_details(self, **more: Any) -> Score:
        """Return the score with further facts, kept as they are."""
        return replace(self, details={**self.details, **more})

    def to_json(self, *, per_answer: bool = False) -> dict[str, Any]:
        """Return plain JSON data; the lists with one entry per answer only when `per_answer` is set."""
        details = {k: v for k, v in self.details.items() if per_answer or k not in PER_ANSWER}
        return {
            "name": self.name,
            "profile": self.profile,
            "value": self.value,
            "n": self.n,
            "ci95": list(self.ci95),
            "unparsed_rate": self.unparsed_rate,
            "by_group": {k: v.to_json(per_answer=per_answer) for k, v in self.by_group.items()},
            "details": details,
        }


def check_lengths(
    name: str, predictions: Sequence[Any] | np.ndarray, **others: Sequence[Any] | np.ndarray | None
) -> None:
    """Refuse empty input and columns of different length.

    Raises:
        MmitError: nothing to score, or a column does not have one entry per prediction.
    """
    if not len(predictions):
        raise MmitError("nothing to score: no predictions", where=name, remedy="Check the task's data and limit.")
    for column, values in others.items():
        if values is not None and len(values) != len(predictions):
            raise MmitError(
                f"{len(predictions)} predictions but {len(values)} {column}",
                where=name,
                remedy="Give one entry per prediction, in the same order.",
            )


def need(reference: Any, keys: Sequence[str], *, where: str) -> None:
    """Check that a reference that has several parts is a mapping with all of `keys`.

    Raises:
        MmitError: names the missing keys.
    """
    missing = [k for k in keys if not isinstance(reference, Mapping) or k not in reference]
    if missing:
        raise MmitError(
            f"a reference lacks {', '.join(missing)}; got {str(reference)[:80]!r}",
            where=where,
            remedy=f"Each reference of this metric is a mapping with the keys {', '.join(keys)}.",
        )


def each(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Any],
    *,
    keys: Sequence[str] = (),
    groups: Sequence[str] | None = None,
    unit: str = "question",
) -> Iterator[tuple[str, str, Any]]:
    """Yield (where, prediction, reference), columns and the references' keys being checked.

    Args:
        name: metric, for messages. unit: what a row is called there.
        predictions, references: (n,) each.
        keys: that every reference must have.
        groups: (n,) or None; only their number is checked.

    Raises:
        MmitError: columns of different length, or a reference without one of `keys`.
    """
    check_lengths(name, predictions, references=references, groups=groups)
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        where = f"{name}: {unit} {row}"
        if keys:
            need(reference, keys, where=where)
        yield where, prediction, reference


def text_of(reference: Any, *, where: str) -> str:
    """Return a reference that must be a text.

    Raises:
        MmitError: it is none.
    """
    if not isinstance(reference, str):
        raise MmitError(f"the reference is {brief(reference)}, no text", where=where, remedy=_IN_QUOTES)
    return reference


def options_of(reference: Any, *, where: str) -> tuple[str, ...]:
    """Return a reference as a tuple: a lone string is one accepted answer.

    Raises:
        MmitError: no accepted answer, or one that is no text.
    """
    if isinstance(reference, str):
        return (reference,)
    if not isinstance(reference, (list, tuple)) or not all(isinstance(answer, str) for answer in reference):
        problem = f"the reference is {brief(reference)}, neither a text nor a list of texts"
        raise MmitError(problem, where=where, remedy=_IN_QUOTES)
    if not reference:
        raise MmitError("no reference answer", where=where, remedy="Leave the question out or give an answer.")
    return tuple(reference)


def pick(table: Mapping[str, Any], profile: str, *, where: str) -> Any:
    """Return `table[profile]`.

    Raises:
        MmitError: lists the valid profiles.
    """
    if profile not in table:
        raise MmitError(f"unknown profile '{profile}'", where=where, remedy=nearest(profile, table))
    return table[profile]


def interval(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean: Wilson when every value is 0 or 1, else a seeded bootstrap."""
    array = np.asarray(values, dtype=np.float64)
    if bool(((array == 0) | (array == 1)).all()):
        return wilson(int(array.sum()), len(array))
    return bootstrap_mean(array, seed=seed)


def split(groups: Sequence[str] | None) -> dict[str, list[int]]:
    """Return the positions of each group, groups in order of first appearance; {} without groups."""
    where: dict[str, list[int]] = {}
    for i, group in enumerate(groups or ()):
        where.setdefault(str(group), []).append(i)
    return where


def mean_score(
    name: str,
    profile: str,
    values: Sequence[float] | np.ndarray,
    *,
    parsed: Sequence[Any] | None = None,
    unparsed: Sequence[bool] | np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Build the Score of a metric that is the mean of one number per answer.

    Args:
        name: metric, for messages and reports.
        profile: which reference's rule was used.
        values: (n,) one number per answer.
        parsed: (n,) what was read from each answer, kept for reports.
        unparsed: (n,) True where nothing could be read; default: none.
        groups: (n,) group of each answer; each group gets its own Score.
        seed: of the bootstrap.

    Raises:
        MmitError: no values, or columns of different length.
    """
    check_lengths(name, values, parsed=parsed, unparsed=unparsed, groups=groups)
    array = np.asarray(values, dtype=np.float64)
    missing = np.zeros(len(array), bool) if unparsed is None else np.asarray(unparsed, bool)

    def part(at: list[int] | slice, by_group: Mapping[str, Score], more: Mapping[str, Any]) -> Score:
        some = array[at]
        return Score(
            name=name,
            profile=profile,
            # The plain running sum is what the official scripts use, so the last digit agrees with theirs.
            value=sum(some.tolist()) / len(some),
            n=len(some),
            ci95=interval(some, seed=seed),
            unparsed_rate=float(missing[at].mean()),
            by_group=by_group,
            details=more,
        )

    groups_of = {g: part(at, {}, {}) for g, at in split(groups).items()}
    kept: dict[str, Any] = {"values": array.tolist()}
    if parsed is not None:
        kept["parsed"] = list(parsed)
    return part(slice(None), groups_of, kept)


def by_cluster(score: Score, clusters: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> Score:
    """Return the score with intervals that count clusters, such as images, where they counted answers.

    For scores that are the mean of one number per answer, and for what `Score.counted` names; others (sums over pairs
    of questions, corpus scores) come back as they are. `details["interval_by_image"]` is set where it was done.

    Args:
        score: of n answers.
        clusters: (n,) what each answer belongs to.
        groups: (n,) as the metric got them.
        seed: of a bootstrap.
    """
    values = np.asarray(score.details.get("values", ()), dtype=np.float64)
    counted = score.counted
    if len(values) != len(clusters) or not len(values):
        return score
    if abs(values.mean() - score.value) > 1e-9 and (counted is None or score.details[counted.key] != score.value):
        return score

    def part(found: Score, at: list[int]) -> Score:
        some = values[at]
        if abs(some.mean() - found.value) <= 1e-9:
            found = replace(found, ci95=clustered(some, [clusters[i] for i in at], seed=seed))
        if counted is None:
            return found
        ends = counted.interval(clusters, at, seed=seed)
        if found.details[counted.key] == found.value != some.mean():
            found = replace(found, ci95=ends)
        return replace(found, details={**found.details, f"{counted.key}_ci95": list(ends)})

    by_group = {name: part(score.by_group[name], at) for name, at in split(groups).items() if name in score.by_group}
    whole = part(score, list(range(len(values))))
    details = {**whole.details, "interval_by_image": len(set(clusters))}
    return replace(whole, by_group={**score.by_group, **by_group}, details=details)


def memo(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """Remember a pure function of one string.

    Benchmarks repeat a few thousand short answers millions of times, so normalising each distinct string once
    is what makes a million answers cheap. The table lives as long as the returned function: one metric call.
    """
    seen: dict[str, Any] = {}

    def cached(text: str) -> Any:
        try:
            return seen[text]
        except KeyError:
            result = seen[text] = function(text)
            return result

    return cached
