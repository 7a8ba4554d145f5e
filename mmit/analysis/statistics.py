"""Means, contrasts and verdicts of a study, whose scores vary with the training seed and with the image.

In: arrays of scores (seeds, questions) and which image each question is about. Out: means with 95 % intervals,
differences of two arms with p-values, verdicts. Nothing here is random.

Both sources of variance count. A model trained with another seed answers otherwise, and other images are easier or
harder for all seeds alike; an interval over questions knows of neither (by simulation it holds the truth in 37 of 100
studies where it says 95, see `tests/analysis/test_statistics.py`). So a score is taken as mean + seed + image + rest,
all three drawn at random, without replication (Searle, Casella and McCulloch 1992, ch. 4): the variance of the mean is
(MS_seed + MS_image - MS_rest) / (S P), its degrees of freedom are Satterthwaite's (1946).

Known limits: with one seed there is no interval; three seeds see differences of about 0.2, five of about 0.13 (the
smallest detectable difference is printed beside every contrast). Scores near 0 or 1 make the normal model coarse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from mmit.errors import ConfigError, MmitError
from mmit.eval.metrics.intervals import wilson

POWER = 0.8  # at which the smallest detectable difference is found
Verdict = Literal["higher", "lower", "equal", "undecided", "no interval"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over S seeds and P images; `ci95`, `error` and `df` are None with one seed or one image."""

    mean: float
    seeds: int
    images: int
    questions: int
    error: float | None = None
    df: float | None = None
    ci95: tuple[float, float] | None = None
    by_seed: tuple[float, ...] = ()

    @property
    def detectable(self) -> float | None:
        """The smallest true mean that a test at 5 % finds with a power of 80 %; of use for differences."""
        if self.error is None or self.df is None:
            return None
        t = student()
        return float(self.error * (t.ppf(0.975, self.df) + t.ppf(POWER, self.df)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "by_seed": list(self.by_seed), "detectable": self.detectable}


@dataclass(frozen=True, slots=True)
class Contrast:
    """Arm `a` minus arm `b` on the seeds and questions of both.

    Attributes:
        p: two-sided, of no difference. holm: the same, adjusted for all contrasts of the study (Holm 1979).
        equal_p: of a difference of `margin` or more (the larger of the two one-sided tests, Schuirmann 1987).
        verdict: higher or lower where holm < .05; else equal where equal_p < .05; else undecided.
    """

    a: str
    b: str
    difference: Estimate
    margin: float
    p: float | None
    equal_p: float | None
    holm: float | None = None
    verdict: Verdict = "no interval"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "difference": self.difference.to_json()}


def student() -> Any:
    """Return scipy's Student distribution. Raises ConfigError: scipy is not installed."""
    try:
        from scipy.stats import t
    except ImportError:
        remedy = "Install it with: pip install 'mmit-tune[analysis]' (or: pip install scipy)"
        raise ConfigError("scipy is not installed", where="mmit analyse", remedy=remedy) from None
    return t


def estimate(scores: np.ndarray, images: Sequence[str]) -> Estimate:
    """Return the mean of scores (S seeds, Q questions) with the interval of the two-way random model.

    Images may have different numbers of questions: the mean is that over questions, and each image enters with the sum
    of its questions' distances from it (the linearised ratio of Cochran 1977, 9A.2).

    Args:
        scores: (S, Q) numbers, the same questions for all seeds.
        images: (Q,) the image that each question is about.

    Raises:
        MmitError: no scores, columns of another number, or a score that is no number.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or not values.size or values.shape[1] != len(images):
        problem = f"scores of shape {values.shape} for {len(images)} questions"
        raise MmitError(problem, where="estimate", remedy="Give one row a seed, one column a question.")
    if not np.isfinite(values).all():
        problem = "a score is not a number"
        raise MmitError(problem, where="estimate", remedy="Use a metric with a verdict on each question.")
    S, Q = values.shape
    _, index, sizes = np.unique(np.asarray(images), return_inverse=True, return_counts=True)
    P, mean = len(sizes), float(values.mean())
    by_seed = tuple(float(m) for m in values.mean(axis=1))
    if S < 2 or P < 2:
        return Estimate(mean, S, P, Q, by_seed=by_seed)
    # A two-way table of seeds and images with one number in each cell: what is left of a cell after both its margins is
    # the only measure of noise there is, since no image is asked twice of one seed.
    sums = np.stack([np.bincount(index, weights=row, minlength=P) for row in values])  # (S, P)
    cells = (sums - mean * sizes) * P / Q
    of_seed, of_image = cells.mean(axis=1, keepdims=True), cells.mean(axis=0, keepdims=True)
    rest = cells - of_seed - of_image + cells.mean()
    squares = (
        P * float(((of_seed - cells.mean()) ** 2).sum()) / (S - 1),
        S * float(((of_image - cells.mean()) ** 2).sum()) / (P - 1),
        float((rest**2).sum()) / ((S - 1) * (P - 1)),
    )
    if not any(squares):  # nothing varied: each image counts as one answer, as in `mmit eval`
        share = mean in (0.0, 1.0) and bool(((values == 0) | (values == 1)).all())
        return Estimate(mean, S, P, Q, ci95=wilson(round(mean * P), P) if share else None, by_seed=by_seed)
    error, df = _error(squares, (S, P))
    # Student's t, not the normal: with a handful of seeds the error itself is hardly known.
    half = float(student().ppf(0.975, df)) * error
    return Estimate(mean, S, P, Q, error, df, (mean - half, mean + half), by_seed)


def _error(squares: tuple[float, float, float], shape: tuple[int, int]) -> tuple[float, float]:
    """Return the standard error of the mean and its degrees of freedom from the mean squares of seed, image, rest."""
    seed, image, rest = squares
    S, P = shape
    # The difference of mean squares may fall below either of them; less than the larger of the two components that
    # stand alone would claim more than a one-way analysis does.
    total = max(seed + image - rest, seed, image)
    below = seed**2 / (S - 1) + image**2 / (P - 1)
    if total > max(seed, image):  # the rest was taken off
        below += rest**2 / ((S - 1) * (P - 1))
    return math.sqrt(total / (S * P)), max(1.0, total**2 / below)


def contrast(
    a: str, b: str, scores: Mapping[str, Mapping[int, np.ndarray]], images: Sequence[str], *, margin: float
) -> Contrast:
    """Compare two arms on the seeds that both have.

    Args:
        a, b: names of arms.
        scores: arm -> seed -> (Q,) scores.
        images: (Q,) the image of each question.
        margin: differences smaller than this count as none.

    Raises:
        MmitError: the arms have no seed in common, or other questions.
    """
    seeds = sorted(scores[a].keys() & scores[b].keys())
    if not seeds:
        remedy = "Give both arms the same seeds."
        raise MmitError("the two arms have no seed in common", where=f"{a} - {b}", remedy=remedy)
    # Differences question by question, before anything is averaged: how hard a question is, and what a seed drew, is
    # the same for both arms and cancels.
    found = estimate(np.stack([scores[a][s] - scores[b][s] for s in seeds]), images)
    if found.error is None or found.df is None:
        if found.ci95 is None or found.mean != 0:
            return Contrast(a, b, replace(found, ci95=None), margin, None, None)
        # No question was answered otherwise: of other images, up to so large a share could be.
        most = found.ci95[1]
        return Contrast(a, b, replace(found, ci95=(-most, most)), margin, 1.0, 0.0 if most < margin else 1.0)
    t = student()
    p = 2 * float(t.sf(abs(found.mean) / found.error, found.df))
    above, below = (margin - found.mean) / found.error, (margin + found.mean) / found.error
    return Contrast(a, b, found, margin, p, float(max(t.sf(above, found.df), t.sf(below, found.df))))


def judged(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Return the contrasts of a study with Holm's adjusted p-values and verdicts, in their order."""
    tested = sorted((c.p, place) for place, c in enumerate(contrasts) if c.p is not None)
    adjusted: dict[int, float] = {}
    largest = 0.0
    # Step down from the smallest p; the running maximum keeps the adjusted ones in the order of the plain ones.
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        adjusted[place] = largest
    return [_judged(c, adjusted.get(place)) for place, c in enumerate(contrasts)]


def _judged(found: Contrast, holm: float | None) -> Contrast:
    if holm is None or found.equal_p is None:
        return found
    verdict: Verdict = "undecided"
    # Holm's p decides before the margin: a difference that is both clear and small is told as a difference.
    if holm < 0.05:
        verdict = "higher" if found.difference.mean > 0 else "lower"
    elif found.equal_p < 0.05:
        verdict = "equal"
    return replace(found, holm=holm, verdict=verdict)
