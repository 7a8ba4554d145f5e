"""Which mix of sources is best: a surface fitted to the mixes that were run, and a proposal.

In: for each arm its shares, and a score for each seed. Out: a fitted score = a + sum of b_i * log(n_i + 1) over the
number n_i of records of each source, intervals for what a further run would score, and the mix of the highest fitted
score. The form says that each source helps less the more of it there is; it has one number a source, so that few runs
suffice, and no term for sources that help each other. A proposal is a guess until it has been run: add it as an arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmit.analysis.statistics import student

STEPS = 40  # of the search over mixes: shares of 2.5 %


@dataclass(frozen=True)
class Surface:
    """A fitted surface: coefficients (1 + K,) of 1 and the log counts of K sources.

    `inverse` is (X'X)^-1, `variance` that of one run about the surface, `df` the runs less the coefficients.
    """

    sources: tuple[str, ...]
    size: int
    coefficients: np.ndarray
    inverse: np.ndarray
    variance: float
    df: int

    def predict(self, shares: Mapping[str, float]) -> tuple[float, float, float]:
        """Return the fitted score of a mix, and the ends of the 95 % interval of one further run of it."""
        x = _row(shares, self.sources, self.size)
        mean = float(x @ self.coefficients)
        half = float(student().ppf(0.975, self.df)) * math.sqrt(self.variance * (1 + float(x @ self.inverse @ x)))
        return mean, mean - half, mean + half

    def best(self, *, least: float) -> dict[str, float]:
        """Return the mix of the highest fitted score, each share at least `least` (nobody ran less)."""
        count = len(self.sources)
        floor = max(0, math.ceil(least * STEPS - 1e-9))
        shares = [floor] * count
        # Every added step goes where it helps most: right for a sum of concave terms. Terms that a source makes worse
        # stay at the floor.
        for _ in range(STEPS - floor * count):
            gains = [self._gain(place, shares[place]) for place in range(count)]
            shares[int(np.argmax(gains))] += 1
        return {source: share / STEPS for source, share in zip(self.sources, shares, strict=True)}

    def _gain(self, place: int, share: int) -> float:
        now, then = (math.log1p(steps / STEPS * self.size) for steps in (share, share + 1))
        return float(self.coefficients[1 + place]) * (then - now)


def _row(shares: Mapping[str, float], sources: Sequence[str], size: int) -> np.ndarray:
    return np.array([1.0, *(math.log1p(shares.get(source, 0.0) * size) for source in sources)])


def fit(mixes: Sequence[Mapping[str, float]], scores: Sequence[float], *, size: int) -> Surface | None:
    """Fit the surface to runs (one mix and one score each); None where there are too few different mixes."""
    sources = tuple(sorted({source for mix in mixes for source in mix}))
    X = np.stack([_row(mix, sources, size) for mix in mixes])
    y = np.asarray(scores, dtype=np.float64)
    df = len(y) - X.shape[1]
    if df < 1 or np.linalg.matrix_rank(X) < X.shape[1]:
        return None
    inverse = np.linalg.inv(X.T @ X)
    coefficients = inverse @ X.T @ y
    variance = float(((y - X @ coefficients) ** 2).sum()) / df
    return Surface(sources, size, coefficients, inverse, variance, df)


def left_out(mixes: Mapping[str, Mapping[str, float]], scores: Mapping[str, Sequence[float]], *, size: int) -> Any:
    """Predict each mix from the others: return Spearman's correlation with what was seen, and how many intervals held.

    None where the others do not suffice for a fit.
    """
    predicted, seen, held, runs = [], [], 0, 0
    for name, mix in mixes.items():
        others = [(mixes[other], score) for other in mixes if other != name for score in scores[other]]
        surface = fit([m for m, _ in others], [s for _, s in others], size=size)
        if surface is None:
            return None
        mean, low, high = surface.predict(mix)
        predicted.append(mean)
        seen.append(float(np.mean(scores[name])))
        held += sum(low <= score <= high for score in scores[name])
        runs += len(scores[name])
    return {"rank_correlation": spearman(predicted, seen), "held": held, "runs": runs}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where one of the two does not vary."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def proposal(
    mixes: Mapping[str, Mapping[str, float]], scores: Mapping[str, Mapping[int, float]], *, size: int
) -> dict[str, Any] | None:
    """Return what the surface says: weight of each source, the proposed mix and its score, and how well it predicts."""
    runs = [(mixes[name], score) for name in mixes for score in scores[name].values()]
    surface = fit([mix for mix, _ in runs], [score for _, score in runs], size=size)
    if surface is None:
        return None
    least = min(share for mix in mixes.values() for share in (mix.get(source, 0.0) for source in surface.sources))
    best = surface.best(least=least)
    mean, low, high = surface.predict(best)
    top = max(mixes, key=lambda name: float(np.mean(list(scores[name].values()))))
    return {
        "coefficients": dict(zip(surface.sources, map(float, surface.coefficients[1:]), strict=True)),
        "proposed": best,
        "predicted": mean,
        "ci95": [low, high],
        "best_run": top,
        "best_seen": float(np.mean(list(scores[top].values()))),
        "left_out": left_out(mixes, {name: list(by.values()) for name, by in scores.items()}, size=size),
    }
