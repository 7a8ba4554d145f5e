"""Benchmark metrics as pure functions: answers and references in, a Score with its interval out.

Every function takes `(predictions, references, *, groups=None, seed=0)`. Where public scorers disagree, each
is a named profile, and `METRICS` has one entry per `metric:profile`. Knows nothing of models or prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mmit.eval.metrics import text
from mmit.eval.metrics.intervals import (
    PairedDifference,
    bootstrap_counts,
    bootstrap_mean,
    mcnemar,
    paired_bootstrap,
    wilson,
)
from mmit.eval.metrics.score import Score

__all__ = [
    "METRICS",
    "PairedDifference",
    "Score",
    "bootstrap_counts",
    "bootstrap_mean",
    "mcnemar",
    "paired_bootstrap",
    "wilson",
]

METRICS: dict[str, Callable[..., Score]] = {
    "exact": partial(text.exact_match, profile="plain"),
    "exact:strict": partial(text.exact_match, profile="strict"),
}
