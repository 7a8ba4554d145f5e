"""Metrics that compare a short answer with one or more reference strings.

In: predictions and references, one per question. Out: a Score. Each profile follows the named reference,
quirks included; nothing is corrected silently.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

from mmit.eval.metrics.score import Score, check_lengths, mean_score, memo, pick

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".,;:!?").rstrip()


# How each profile rewrites both the prediction and the reference before they must be equal.
EXACT: dict[str, Callable[[str], str]] = {
    "plain": _plain,
    "strict": lambda text: text,
}


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    profile: str = "plain",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Share of predictions equal to their reference (or to any of them, where a reference is a list).

    Profiles:
        plain: both sides stripped, lower-cased and without final punctuation.
        strict: the strings as they are.

    Raises:
        MmitError: unknown profile, no predictions, or columns of different length.
    """
    normalise = memo(pick(EXACT, profile, where="exact"))
    check_lengths("exact", predictions, references=references)
    parsed = [normalise(p) for p in predictions]
    values = [
        float(p == normalise(r) if isinstance(r, str) else any(p == normalise(x) for x in r))
        for p, r in zip(parsed, references, strict=True)
    ]
    return mean_score(
        "exact", profile, values, parsed=parsed, unparsed=[not p for p in parsed], groups=groups, seed=seed
    )
