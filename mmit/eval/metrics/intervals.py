"""Confidence intervals and paired tests for benchmark scores.

In: counts or one number per answer, and which answers belong together. Out: 95 % intervals, and differences of two
models on the same questions with their p-value. All randomness comes from the `seed` argument.

Questions about one image are right or wrong together, so n of them say less than n images would. `clustered`,
`cluster_bootstrap_counts` and `paired_clusters` count images, not questions; the others treat answers as independent
draws. Known limit: all of them describe this one model. Another seed of its training is a source of variance that no
interval here contains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmit.errors import MmitError

Z95 = 1.959963984540054
RESAMPLES = 1000
# Above this many distinct values, resampling positions is cheaper than one multinomial draw over the values.
_MAX_DISTINCT = 2000
_CHUNK = 4_000_000


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Model A minus model B on the same n questions: mean difference, 95 % interval, two-sided p."""

    difference: float
    ci95: tuple[float, float]
    p: float
    n: int
    method: str


def wilson(k: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of k successes in n trials (Wilson 1927); (0, 1) for n = 0.

    Raises:
        MmitError: k is not in 0..n.
    """
    if not 0 <= k <= n:
        raise MmitError(f"{k} successes in {n} trials", where="wilson", remedy="Give 0 <= k <= n.")
    if n == 0:
        return 0.0, 1.0
    # The ends are exact at k = 0 and k = n; rounding must not move them inside.
    return _wilson_at(k / n, n, Z95)


def _quantiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """Return (resamples,) means of n values drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(values)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _MAX_DISTINCT:
        # How often each distinct value is drawn is multinomial: the same distribution without n positions.
        drawn: np.ndarray = rng.multinomial(n, counts / n, size=resamples)
        return np.asarray(drawn @ distinct / n)
    rows = max(1, _CHUNK // n)
    means = [
        values[rng.integers(0, n, size=(min(rows, resamples - done), n), dtype=np.int32)].mean(axis=1)
        for done in range(0, resamples, rows)
    ]
    return np.concatenate(means)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `values` (n,).

    Raises:
        MmitError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise MmitError("no values", where="bootstrap_mean", remedy="Give at least one value.")
    return _quantiles(_resampled_means(array, seed=seed, resamples=resamples))


def resample_counts(
    counts: Sequence[int] | np.ndarray, *, seed: int | Sequence[int] = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Return (resamples, C) tables of counts, each drawn with replacement from the answers in `counts` (C,).

    Raises:
        MmitError: all counts are zero.
    """
    table = np.asarray(counts, dtype=np.float64)
    n = int(table.sum())
    if n == 0:
        raise MmitError("no counts", where="resample_counts", remedy="Give at least one answer.")
    return np.random.default_rng(seed).multinomial(n, table / n, size=resamples)


def bootstrap_counts(
    counts: Sequence[int] | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic of a table of counts, such as F1 of a 2x2 table.

    Args:
        counts: (C,) how many answers fell in each cell.
        statistic: maps (resamples, C) counts to (resamples,) numbers.
        seed: of the resampling.
        resamples: how many tables are drawn.

    Raises:
        MmitError: all counts are zero.
    """
    draws = resample_counts(counts, seed=seed, resamples=resamples)
    return _quantiles(np.asarray(statistic(draws), dtype=np.float64))


def cluster_bootstrap_counts(
    cells: Sequence[int] | np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    count: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Return the 95 % interval of a statistic of a table of counts where answers of one cluster are not independent.

    Clusters are drawn whole. One cluster says nothing about others: all that a share can be.

    Args:
        cells: (n,) the cell that each answer fell in, 0 to C - 1.
        clusters: (n,) what each answer belongs to.
        statistic: maps (resamples, C) counts to (resamples,) shares.
        count: C.

    Raises:
        MmitError: no answers.
    """
    if not len(cells):
        raise MmitError("no counts", where="cluster_bootstrap_counts", remedy="Give at least one answer.")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    tables = np.zeros((int(index.max()) + 1, count))
    np.add.at(tables, (index, np.asarray(cells)), 1)
    if len(tables) == len(cells):  # as without clusters
        return bootstrap_counts(tables.sum(0), statistic, seed=seed, resamples=resamples)
    if len(tables) < 2:
        return 0.0, 1.0
    drawn = resample_counts(np.ones(len(tables)), seed=seed, resamples=resamples)
    return _quantiles(np.asarray(statistic(drawn @ tables), dtype=np.float64))


def t_quantile(df: int) -> float:
    """Return the 97.5 % quantile of Student's t with `df` degrees of freedom, within 0.1 %.

    Closed forms for 1 and 2, from there the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    """
    if df <= 2:
        return math.tan(math.pi * 0.475) if df == 1 else 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / df ** (power + 1) for power, term in enumerate(terms)))


def cluster_error(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, int]:
    """Return the standard error of the mean of `values` (n,) drawn in clusters, and the number of clusters G.

    The linearised ratio estimator (Cochran 1977, 9A.2), whose squared error has G - 1 degrees of freedom. Clusters may
    differ in size.
    """
    _, index, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    count = len(sizes)
    if count < 2:
        return math.inf, count
    residuals = np.bincount(index, weights=values) - values.mean() * sizes
    return math.sqrt(count / (count - 1) * float((residuals**2).sum())) / len(values), count


def clustered(
    values: Sequence[float] | np.ndarray, clusters: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` (n,), of which those of one cluster are not independent.

    Shares of right answers (0 or 1): Wilson's interval at the effective sample size, n divided by the design effect,
    with Student's t in place of z (Korn and Graubard 1998 do so with Clopper-Pearson's). Where all answers are the same
    they say nothing about the design effect, and each cluster counts as one answer. Other numbers: a bootstrap of
    clusters.

    Args:
        values: (n,) one number per answer.
        clusters: (n,) what each answer belongs to, such as the image that the question is about.
        seed, resamples: of the bootstrap.

    Raises:
        MmitError: no values, or columns of different length.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or len(array) != len(clusters):
        problem = f"{len(array)} values in {len(clusters)} clusters"
        raise MmitError(problem, where="clustered", remedy="Give the cluster of each value.")
    error, count = cluster_error(array, clusters)
    share = bool(((array == 0) | (array == 1)).all())
    # No two answers share a cluster: then this must give what an evaluation without images gives.
    if count == len(array):
        return wilson(int(array.sum()), len(array)) if share else bootstrap_mean(array, seed=seed, resamples=resamples)
    if count < 2:  # one image says nothing about others: all that is possible, or as much of it as was seen
        return (0.0, 1.0) if share else (float(array.min()), float(array.max()))
    mean, n = float(array.mean()), len(array)
    if not share:
        return _cluster_bootstrap(array, clusters, seed=seed, resamples=resamples)
    # Never more than n: where answers of a cluster happen to differ more than independent ones would, the interval must
    # not become narrower than that of n independent answers.
    independent = mean * (1 - mean) / n
    effective = count if independent == 0 else min(n, independent / error**2 * n if error else n)
    return _wilson_at(mean, effective, t_quantile(count - 1))


def _wilson_at(p: float, n: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a share p at n effective trials with quantile z."""
    z2 = z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)


def _cluster_bootstrap(
    values: np.ndarray, clusters: Sequence[str], *, seed: int, resamples: int
) -> tuple[float, float]:
    _, index, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    sums, count, rng = np.bincount(index, weights=values), len(sizes), np.random.default_rng(seed)
    means = []
    rows = max(1, _CHUNK // count)
    for done in range(0, resamples, rows):
        # Clusters are drawn whole, so the number of answers differs from draw to draw: a mean is a ratio of two sums.
        drawn = rng.integers(0, count, size=(min(rows, resamples - done), count), dtype=np.int32)
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return _quantiles(np.concatenate(means))


def _two_sided_sign_p(b: int, c: int) -> float:
    """Return the exact two-sided p of b against c under Binomial(b + c, 1/2)."""
    n, k = b + c, min(b, c)
    if n == 0 or 2 * k == n:
        return 1.0
    log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    # Terms shrink geometrically below k, so a relative cut ends the sum early even for a million questions.
    total, term = 0.0, 1.0
    while k >= 0 and term > 1e-17 * total:
        total += term
        term *= k / (n - k + 1)
        k -= 1
    return min(1.0, 2 * math.exp(log_term + math.log(total)))


def _pair(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(first) != len(second) or not len(first):
        raise MmitError(
            f"{len(first)} values of A against {len(second)} of B",
            where=where,
            remedy="Give both models' values on the same questions, in the same order.",
        )
    return first, second


def mcnemar(correct_a: Sequence[bool] | np.ndarray, correct_b: Sequence[bool] | np.ndarray) -> PairedDifference:
    """Compare two models' right/wrong answers to the same questions.

    The p-value is McNemar's exact test (two-sided binomial on the questions where just one model is right);
    the interval of the difference in accuracy is Agresti and Min's (2005): half an observation per cell.

    Raises:
        MmitError: different lengths, no questions, or values other than 0 and 1.
    """
    first, second = _pair(correct_a, correct_b, "mcnemar")
    if not np.isin(first, (0, 1)).all() or not np.isin(second, (0, 1)).all():
        raise MmitError(
            "values other than right (1) and wrong (0)",
            where="mcnemar",
            remedy="Use paired_bootstrap for these.",
        )
    n = len(first)
    b, c = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    centre = (b - c) / (n + 2)
    half = Z95 * math.sqrt(max(0.0, (b + c + 1) / (n + 2) - centre * centre)) / math.sqrt(n + 2)
    ci = (max(-1.0, centre - half), min(1.0, centre + half))
    return PairedDifference(difference=(b - c) / n, ci95=ci, p=_two_sided_sign_p(b, c), n=n, method="mcnemar")


def paired_bootstrap(
    values_a: Sequence[float] | np.ndarray,
    values_b: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> PairedDifference:
    """Compare two models' scores on the same questions by resampling questions.

    The p-value is the share of resampled differences, shifted to mean zero, at least as far out as the
    observed one (with one added to both counts, so it is never 0).

    Args:
        values_a: (n,) scores of one model.
        values_b: (n,) scores of the other, in the same order.
        seed: of the draws.
        resamples: how many draws of n questions; the interval's ends are quantiles of them.

    Returns:
        the difference a - b with its 95 % interval and two-sided p-value.

    Raises:
        MmitError: different lengths or no questions.
    """
    first, second = _pair(values_a, values_b, "paired_bootstrap")
    gap = first - second
    observed = float(gap.mean())
    means = _resampled_means(gap, seed=seed, resamples=resamples)
    beyond = int((np.abs(means - observed) >= abs(observed) - 1e-12).sum())
    return PairedDifference(
        difference=observed,
        ci95=_quantiles(means),
        p=(beyond + 1) / (resamples + 1),
        n=len(gap),
        method="paired_bootstrap",
    )


def paired_clusters(
    values_a: Sequence[float] | np.ndarray,
    values_b: Sequence[float] | np.ndarray,
    clusters: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> PairedDifference:
    """Compare two models' scores on the same questions, of which those of one cluster are not independent.

    The interval is the mean difference plus and minus t times its standard error over clusters. The p-value flips the
    sign of each cluster's sum of differences at random (one added to both counts): exact under the hypothesis that
    the models are exchangeable on every image, whatever the questions of an image have in common.

    Args:
        values_a, values_b: (n,) one number per question.
        clusters: (n,) what each question belongs to, such as its image.
        seed, resamples: of the sign flips.

    Raises:
        MmitError: columns of different length or no questions.
    """
    first, second = _pair(values_a, values_b, "paired_clusters")
    gap = first - second
    if len(clusters) != len(gap):
        problem = f"{len(gap)} values in {len(clusters)} clusters"
        raise MmitError(problem, where="paired_clusters", remedy="Give the cluster of each value.")
    error, count = cluster_error(gap, clusters)
    observed = float(gap.mean())
    if count < 2:
        ci = (float(gap.min()), float(gap.max()))
    else:
        half = t_quantile(count - 1) * error
        ci = (observed - half, observed + half)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=gap)
    sums = sums[sums != 0]
    rng, beyond = np.random.default_rng(seed), 0
    rows = max(1, _CHUNK // max(1, len(sums)))
    for done in range(0, resamples, rows):
        signs = rng.integers(0, 2, size=(min(rows, resamples - done), len(sums)), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ sums) >= abs(float(sums.sum())) - 1e-9).sum())
    return PairedDifference(
        difference=observed, ci95=ci, p=(beyond + 1) / (resamples + 1), n=len(gap), method="paired_clusters"
    )
