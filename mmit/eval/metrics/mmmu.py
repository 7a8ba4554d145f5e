"""MMMU (Yue et al. 2023): multiple-choice and open answers, by the benchmark's own parsers.

In: free-text answers and {"answer", "question_type", "options"} references. Out: a Score (micro average). The
published parser guesses at random where it finds no letter; here that is a profile, with a seed, not the
default.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from mmit.errors import MmitError
from mmit.eval.metrics.score import Score, each, mean_score, need, options_of, pick


def parse_choice(text: str, options: Sequence[str]) -> str:
    """Return the option letter that a text means, or "".

    "(A)", else "A ", else "A.", else (in texts of more than five words) an option's own words; of several
    candidates the one that occurs last.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = ascii_uppercase[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [c for c in letters if form.format(c) in text]
        if found:
            # A place of -1 (such as "A." with no lone " A ") is kept: the first candidate wins a tie.
            return max(found, key=lambda c: text.rfind(place.format(c)))
    if len(text.split()) > 5:
        lowered = text.lower()
        named = [(c, str(o).lower()) for c, o in zip(letters, options, strict=True) if str(o).lower() in lowered]
        if named:
            return max(named, key=lambda item: lowered.rfind(item[1]))[0]
    return ""


_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def _normal(text: str) -> list[str | float]:
    """Return a number rounded to two places, or a lower-cased text; a lone letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def _key_phrases(text: str) -> list[str]:
    """Return per line what follows the last word that announces an answer; the whole text if nothing does."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for i, line in enumerate(lines):
        # An equation counts only in the last line.
        keys = _KEYS + ("=",) if i == len(lines) - 1 else _KEYS
        shortest = ""
        for key in keys:
            if key in line:
                tail = line.split(key)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in set(":,.!?;'"):
            phrases.append(shortest)
    return phrases or [text]


def parse_open(text: str) -> list[str | float]:
    """Return the distinct texts and numbers that an open answer may mean."""
    phrases = _key_phrases(text)
    numbers = [n for p in phrases for r in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for n in r.findall(p)]
    return list(dict.fromkeys(part for found in [*phrases, *numbers] for part in _normal(found)))


def open_correct(text: str, answer: str | Sequence[str]) -> bool:
    """Return whether an open answer contains the reference text, or one of its numbers equals it."""
    answers = [answer] if isinstance(answer, str) else list(answer)
    gold = [part for a in answers for part in _normal(a)]
    texts = [g for g in gold if isinstance(g, str)]
    return any(any(g in p for g in texts) if isinstance(p, str) else p in gold for p in parse_open(text))


# What an unreadable multiple-choice answer becomes: True for a random option.
PROFILES: dict[str, bool] = {"unparsed_wrong": False, "random": True}


_KEYS_OF_REFERENCE = ("answer", "question_type")


def check_mmmu(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference lacks a key, its kind is unknown or its answers are no texts."""
    need(reference, _KEYS_OF_REFERENCE, where=where)
    if reference["question_type"] == "multiple-choice":
        need(reference, ("options",), where=where)
    elif reference["question_type"] != "open":
        problem = f"unknown question type {reference['question_type']!r}"
        raise MmitError(problem, where=where, remedy="valid: multiple-choice, open")
    options_of(reference["answer"], where=where)


def mmmu(
    predictions: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    *,
    profile: str = "unparsed_wrong",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """MMMU accuracy, averaged over questions.

    Profiles: unparsed_wrong (an answer without a readable option is wrong), random (such an answer becomes a
    random option, drawn from `seed` in the order of the questions, as the published scorer does).

    Args:
        predictions: (n,) answers.
        references: (n,) {"answer": letter or text(s), "question_type": "multiple-choice" or "open", "options":
            list}.
        profile: unparsed_wrong or random.
        groups: (n,) subject of each question.
        seed: of the bootstrap interval, and of the options drawn in profile random.

    Returns:
        the share of right answers; `details["parsed"]` has the letter, or the texts and numbers read from an open
        one.

    Raises:
        MmitError: unknown profile, columns of different length, a reference without its keys, or an unknown
            question type.
    """
    guess = pick(PROFILES, profile, where="mmmu")
    rng = random.Random(seed)
    values: list[float] = []
    parsed: list[str | list[str | float]] = []
    missing: list[bool] = []
    for where, prediction, reference in each("mmmu", predictions, references):
        check_mmmu(reference, where=where)
        answer = reference["answer"]
        if reference["question_type"] == "open":
            values.append(float(open_correct(prediction, answer)))
            parsed.append(parse_open(prediction))
            missing.append(not prediction.strip())
        else:
            said = parse_choice(prediction, reference["options"])
            missing.append(not said)
            if not said and guess:
                said = rng.choice(ascii_uppercase[: len(reference["options"])])
            values.append(float(said == answer if isinstance(answer, str) else said in answer))
            parsed.append(said)
    return mean_score("mmmu", profile, values, parsed=parsed, unparsed=missing, groups=groups, seed=seed)
