"""Metrics that give part of a point, or allow a tolerance: ANLS, relaxed accuracy, ROUGE-L.

In: predictions and references, one per question. Out: a Score. Edit distance and longest common subsequence are
rapidfuzz's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from rapidfuzz.distance import LCSseq, Levenshtein

from mmit.eval.metrics.score import Score, check_lengths, mean_score, options_of, pick

edit_distance = Levenshtein.distance
common_subsequence = LCSseq.similarity


def _collapse(text: str) -> str:
    return " ".join(text.strip().lower().split())


def anls_one(prediction: str, references: Sequence[str], *, profile: str = "lmms") -> float:
    """Return the normalised Levenshtein similarity to the nearest reference; 0 below the threshold of 0.5.

    Raises:
        MmitError: unknown profile.
    """
    raw_lengths = pick(ANLS, profile, where="anls")
    distances, answer = [], _collapse(prediction)
    for reference in references:
        gold = _collapse(reference)
        longest = max(len(reference), len(prediction)) if raw_lengths else max(len(gold), len(answer))
        # Two empty strings are equal, not undefined.
        distances.append(0.0 if longest == 0 else float(edit_distance(gold, answer)) / float(longest))
    similarity = 1 - min(distances)
    return similarity if similarity >= 0.5 else 0.0


# True: divide by the length of the strings as they came (spaces included), as lmms-eval does; the
# prediction is not stripped here. False: divide by the length of the strings that were compared (LLaVA, the
# `anls` package).
ANLS: dict[str, bool] = {"lmms": True, "normalised": False}


def _per_answer(
    name: str,
    profile: str,
    one: Callable[[str, tuple[str, ...]], float],
    *,
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    groups: Sequence[str] | None,
    seed: int,
) -> Score:
    """Score each (prediction, references) pair once, however often it occurs."""
    check_lengths(name, predictions, references=references)
    seen: dict[tuple[str, tuple[str, ...]], float] = {}
    values = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        key = (prediction, options_of(reference, where=f"{name}: question {row}"))
        if key not in seen:
            seen[key] = one(*key)
        values.append(seen[key])
    empty = [not p.strip() for p in predictions]
    return mean_score(name, profile, values, parsed=predictions, unparsed=empty, groups=groups, seed=seed)


def anls(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    profile: str = "lmms",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Average normalised Levenshtein similarity with threshold 0.5 (Biten et al. 2019; DocVQA, ST-VQA).

    Profiles: lmms (lengths of the raw strings), normalised (lengths of the compared strings).

    Args:
        predictions: (n,) answers.
        references: (n,) a text or a list of texts each; the nearest counts.
        profile: lmms or normalised.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the mean similarity, 0 to 1; below 0.5 an answer counts 0.

    Raises:
        MmitError: unknown profile, columns of different length, or a question without references.
    """
    pick(ANLS, profile, where="anls")
    one = partial(anls_one, profile=profile)
    return _per_answer("anls", profile, one, predictions=predictions, references=references, groups=groups, seed=seed)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_one(prediction: str, reference: str, *, tolerance: float = 0.05) -> bool:
    """Return whether two numbers differ by at most `tolerance` of the reference, or two texts are equal.

    "5%" is 0.05; a thousands comma makes a text. A reference of zero has no relative error: compared as text.
    """
    number, gold = _number(prediction), _number(reference)
    if number is not None and gold:
        return abs(number - gold) / abs(gold) <= tolerance
    return prediction.lower() == reference.lower()


# What happens to the prediction before it is compared.
RELAXED: dict[str, Callable[[str], str]] = {"lmms": lambda text: text, "vlmeval": str.strip}


def relaxed_accuracy(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    profile: str = "lmms",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Share of answers within 5 % of a numeric reference, or equal to a textual one (ChartQA).

    Profiles: lmms (the prediction as it is), vlmeval (the prediction stripped). With several references the
    best counts.

    Args:
        predictions: (n,) answers.
        references: (n,) a text or a list of texts each.
        profile: lmms or vlmeval.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right answers.

    Raises:
        MmitError: unknown profile, columns of different length, or a question without references.
    """
    prepare = pick(RELAXED, profile, where="relaxed")

    def one(prediction: str, answers: tuple[str, ...]) -> float:
        return float(any(relaxed_one(prepare(prediction), a) for a in answers))

    return _per_answer(
        "relaxed", profile, one, predictions=predictions, references=references, groups=groups, seed=seed
    )


_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def _rouge_tokens(text: str) -> list[str]:
    return _NOT_ALPHANUMERIC.sub(" ", text.lower()).split()


def rouge_l_one(prediction: str, references: Sequence[str], *, profile: str = "f1") -> float:
    """Return ROUGE-L of one text: the F-measure of the longest common subsequence with the references.

    Raises:
        MmitError: unknown profile.
    """
    tokens, beta = pick(ROUGE_L, profile, where="rouge_l")
    answer = tokens(prediction)
    pairs = []
    for reference in references:
        gold = tokens(reference)
        common = common_subsequence(answer, gold) if answer and gold else 0
        pairs.append((common / max(1, len(answer)), common / max(1, len(gold))))
    if beta == 1.0:
        return max((2 * p * r / (p + r) if p + r > 0 else 0.0) for p, r in pairs)
    # Precision and recall may come from different references: that is how the COCO scorer does it.
    p, r = max(p for p, _ in pairs), max(r for _, r in pairs)
    return (1 + beta**2) * p * r / (r + beta**2 * p) if p and r else 0.0


# f1: words of [a-z0-9], no stemming, best reference (the rouge-score package). coco: words split at single
# spaces and beta 1.2 (pycocoevalcap), for text that is already tokenised.
ROUGE_L: dict[str, tuple[Callable[[str], list[str]], float]] = {
    "f1": (_rouge_tokens, 1.0),
    "coco": (lambda text: text.split(" "), 1.2),
}


def rouge_l(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    profile: str = "f1",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """ROUGE-L (Lin 2004), averaged over texts. Profiles: f1, coco.

    Args:
        predictions: (n,) answers.
        references: (n,) a text or a list of texts each.
        profile: f1 or coco.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the mean over texts, 0 to 1.

    Raises:
        MmitError: unknown profile, columns of different length, or a text without references.
    """
    pick(ROUGE_L, profile, where="rouge_l")
    one = partial(rouge_l_one, profile=profile)
    return _per_answer(
        "rouge_l", profile, one, predictions=predictions, references=references, groups=groups, seed=seed
    )
