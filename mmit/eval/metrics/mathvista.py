"""MathVista (Lu et al. 2023): the part of its scoring that needs no judge.

In: answers (or a judge's extractions) and {"question_type", "answer_type", "choices", "precision", "answer"}
references. Out: a Score. An answer that only a judge could read is wrong, and counted as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from mmit.errors import MmitError
from mmit.eval.metrics.score import Score, each, mean_score, need, pick
from mmit.eval.metrics.similarity import edit_distance

_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LIST = re.compile(r"\[[^\[\]]*\]")


def _int(text: str) -> str | None:
    try:
        return str(int(text))
    except ValueError:
        return None


def _float(text: str) -> str | None:
    try:
        return str(float(text))
    except ValueError:
        return None


def extract(text: str, reference: Mapping[str, Any]) -> str | None:
    """Return the answer if the whole text is one, or 'The answer is "...".' says it; else None."""
    text = text.strip()
    choices = [str(c) for c in reference.get("choices") or ()]
    if reference["question_type"] == "multi_choice":
        letters = ascii_uppercase[: len(choices)]
        bare = text.rstrip(".").strip("()")
        if text in choices or (len(bare) == 1 and bare.upper() in letters):
            return text if text in choices else bare.upper()
        if text.startswith("(") and _BRACKETED.match(text):
            return text
    elif reference["answer_type"] == "integer" and _int(text) is not None:
        return _int(text)
    elif reference["answer_type"] == "float" and _float(text) is not None:
        return _float(text)
    elif reference["answer_type"] == "list" and _LIST.fullmatch(text):
        return text
    quoted = _QUOTED.search(text)
    return quoted.group(1) if quoted else None


def normalise(extraction: str, reference: Mapping[str, Any]) -> str | None:
    """Return an extraction in the form of the reference: an option's text, a rounded number, a list; or None.

    An option that is neither a letter nor a text of the choices becomes the choice nearest in edit
    distance, so with choices nothing is ever unreadable.
    """
    if reference["question_type"] == "multi_choice":
        choices = [str(c) for c in reference["choices"]]
        extraction = extraction.strip()
        bracketed = _BRACKETED.findall(extraction)
        letter = bracketed[0].upper() if bracketed else extraction
        if len(letter) == 1 and letter in ascii_uppercase[: len(choices)]:
            return choices[ascii_uppercase.index(letter)]
        return min(choices, key=lambda c: edit_distance(letter, c))
    try:
        if reference["answer_type"] == "integer":
            return str(int(float(extraction)))
        if reference["answer_type"] == "float":
            return str(round(float(extraction), int(reference.get("precision") or 0)))
    except (ValueError, OverflowError):
        return None
    return extraction


# True: the predictions are a judge's extractions already.
PROFILES: dict[str, bool] = {"offline": False, "extracted": True}
_ANSWER_TYPES = ("text", "integer", "float", "list")


def check_mathvista(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference lacks a key, or its type of answer is unknown."""
    need(reference, ("question_type", "answer_type", "answer"), where=where)
    if reference["answer_type"] not in _ANSWER_TYPES:
        problem = f"unknown answer type {reference['answer_type']!r}"
        raise MmitError(problem, where=where, remedy=f"valid: {', '.join(_ANSWER_TYPES)}")
    if reference["question_type"] == "multi_choice":
        need(reference, ("choices",), where=where)


def mathvista(
    predictions: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    *,
    profile: str = "offline",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """MathVista accuracy.

    Profiles: offline (`extract`, and wrong where it finds nothing), extracted (each prediction is what a
    judge extracted, and is only brought into the reference's form).

    Args:
        predictions: (n,) answers.
        references: (n,) {"question_type": "multi_choice" or "free_form", "answer_type": text, integer, float or
            list, "choices": list or None, "precision": number or None, "answer": text}.
        profile: offline or extracted.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right answers; `details["parsed"]` has what was compared, None where nothing was found.

    Raises:
        MmitError: unknown profile or answer type, columns of different length, or a reference without its
            keys.
    """
    extracted = pick(PROFILES, profile, where="mathvista")
    values, parsed = [], []
    for where, prediction, reference in each("mathvista", predictions, references):
        check_mathvista(reference, where=where)
        found = prediction if extracted else extract(prediction, reference)
        said = None if found is None else normalise(found, reference)
        values.append(float(said is not None and said.strip() == str(reference["answer"]).strip()))
        parsed.append(said)
    # An empty extraction still becomes the nearest choice, as published, but nothing was read from it.
    missing = [p is None or not t.strip() for p, t in zip(parsed, predictions, strict=True)]
    return mean_score("mathvista", profile, values, parsed=parsed, unparsed=missing, groups=groups, seed=seed)
