"""Trends over arms that are numbers: the size of the data, the number of tasks or of wordings.

In: a score for each (amount, seed). Out: the slope per doubling with an interval over seeds, and for sizes a saturating
curve a - b * n ** -c (Hestness et al. 2017) with what the next doubling would bring. Says "cannot tell" where the
interval of that is wider than the margin or holds zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmit.analysis.statistics import student


def slope_per_doubling(scores: Mapping[float, Mapping[int, float]]) -> dict[str, Any] | None:
    """Return mean, 95 % interval and number of seeds of the slope over log2(amount), one slope a seed.

    Only seeds that every amount has count. None with fewer than two amounts; no interval with one seed.
    """
    amounts = sorted(scores)
    seeds = sorted(set.intersection(*(set(by) for by in scores.values()))) if scores else []
    if len(amounts) < 2 or not seeds or amounts[0] <= 0:
        return None
    x = np.log2(amounts) - np.log2(amounts).mean()
    slopes = [float(x @ np.array([scores[a][seed] for a in amounts]) / (x @ x)) for seed in seeds]
    mean = float(np.mean(slopes))
    found: dict[str, Any] = {"slope": mean, "seeds": len(seeds), "ci95": None}
    if len(seeds) > 1:
        half = float(student().ppf(0.975, len(seeds) - 1)) * float(np.std(slopes, ddof=1)) / math.sqrt(len(seeds))
        found["ci95"] = [mean - half, mean + half]
    return found


def saturating(scores: Mapping[float, Mapping[int, float]], *, margin: float) -> dict[str, Any] | None:
    """Fit a - b * n ** -c to every (amount, seed) and say what twice the largest amount would bring.

    Returns:
        a, b, c; `gain`, its 95 % interval by the delta method, and `verdict`. None with fewer than four amounts, or
        where no curve fits.
    """
    points = [(n, y) for n, by in sorted(scores.items()) for y in by.values()]
    if len(scores) < 4 or len(points) < 5:
        return None
    from scipy.optimize import curve_fit

    n, y = np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points])
    scale = float(n.min())

    def curve(n: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a - b * (n / scale) ** -c

    try:
        start = (float(y.max()), max(float(np.ptp(y)), 1e-3), 0.5)
        best, spread = curve_fit(curve, n, y, start, bounds=([0, 0, 1e-3], [1.5, 10, 5]), maxfev=20_000)
    except (RuntimeError, ValueError):
        return None
    top = float(n.max())

    def gain(values: Sequence[float]) -> float:
        return float(curve(np.array(2 * top), *values) - curve(np.array(top), *values))

    steps = np.maximum(np.abs(best), 1e-3) * 1e-4
    slopes = np.array([(gain(best + step) - gain(best - step)) / (2 * step.sum()) for step in np.diag(steps)])
    variance = float(slopes @ spread @ slopes)
    mean, error = gain(best), math.sqrt(variance) if math.isfinite(variance) and variance >= 0 else math.inf
    half = float(student().ppf(0.975, len(points) - 3)) * error
    low, high = mean - half, mean + half
    verdict = "cannot tell"
    if low > 0 and high - low <= 2 * margin:
        verdict = f"the next doubling buys {mean:+.3f}"
    elif -margin < low and high < margin:
        verdict = f"the next doubling buys less than {margin:g}"
    a, b, c = (float(v) for v in best)
    return {"a": a, "b": b * scale**c, "c": c, "gain": mean, "ci95": [low, high], "verdict": verdict, "to": 2 * top}
