"""Metrics that ask whether a short answer equals, or contains, a reference string.

In: predictions and references, one per question. Out: a Score. Each profile follows the named reference,
quirks included; nothing is corrected silently.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from mmit.eval.metrics.score import Score, check_lengths, each, mean_score, memo, need, options_of, pick, text_of

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".,;:!?").rstrip()


def _same(text: str) -> str:
    return text


def _lower_bare(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


def _stripped_lower_bare(text: str) -> str:
    return _lower_bare(text.strip())


def _ai2d(text: str) -> str:
    letter = _LEADING_LETTER.match(text)
    return _stripped_lower_bare(letter.group(1) if letter else text)


def _stripped_lower(text: str) -> str:
    return text.strip().lower()


def _llava_gqa(text: str) -> str:
    return text.rstrip(".").lower()


# How each profile rewrites the prediction and the reference before they must be equal.
EXACT: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "plain": (_plain, _plain),
    "strict": (_same, _same),
    # lmms-eval strips every answer before its metric; the reference keeps its spaces.
    "gqa_lmms": (_stripped_lower_bare, _lower_bare),
    "gqa_llava": (_llava_gqa, _same),
    "ai2d_lmms": (_ai2d, _lower_bare),
    "vlmeval": (_stripped_lower, _stripped_lower),
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
        gqa_lmms: lower-cased, all ASCII punctuation removed (lmms-eval's gqa).
        gqa_llava: the prediction lower-cased without final periods (LLaVA's submission for GQA's own scorer).
        ai2d_lmms: a leading "B." is the letter, then as gqa_lmms.
        vlmeval: both sides stripped and lower-cased.

    Args:
        predictions: (n,) answers.
        references: (n,) a text or a list of texts each.
        profile: one of the above.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of equal answers; `details["parsed"]` has what was compared.

    Raises:
        MmitError: unknown profile, no predictions, or columns of different length.
    """
    read, expect = map(memo, pick(EXACT, profile, where="exact"))
    check_lengths("exact", predictions, references=references)
    parsed = [read(p) for p in predictions]
    values = [
        float(
            p == expect(r)
            if isinstance(r, str)
            else any(p == expect(x) for x in options_of(r, where=f"exact: question {row}"))
        )
        for row, (p, r) in enumerate(zip(parsed, references, strict=True))
    ]
    empty = [not p for p in parsed]
    return mean_score("exact", profile, values, parsed=parsed, unparsed=empty, groups=groups, seed=seed)


_WIDE_TO_ASCII = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}


def _fold(text: str) -> str:
    return text.translate(_WIDE_TO_ASCII)


# Whether full-width ASCII counts as ASCII; never for handwritten formulas.
OCRBENCH: dict[str, Callable[[str], str]] = {"lmms": _fold, "vlmeval": _same}


def _sentence(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def check_ocrbench(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference is not {"answers": text or texts, "dataset": name}."""
    need(reference, ("answers", "dataset"), where=where)
    options_of(reference["answers"], where=where)


def ocrbench(
    predictions: Sequence[str],
    references: Sequence[dict[str, Any]],
    *,
    profile: str = "lmms",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Share of answers that contain one of the reference texts (OCRBench, Liu et al. 2023).

    Case and line breaks are ignored; for dataset "HME100k" spaces are ignored and case counts. `details["points"]` is
    the number right: the published score out of 1000.

    Profiles: lmms (full-width ASCII counts as ASCII), vlmeval (it does not).

    Args:
        predictions: (n,) answers.
        references: (n,) {"answers": [...], "dataset": name}.
        profile: lmms or vlmeval.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right answers.

    Raises:
        MmitError: unknown profile, columns of different length, or a reference without its keys.
    """
    fold = pick(OCRBENCH, profile, where="ocrbench")
    values = []
    for where, prediction, reference in each("ocrbench", predictions, references, keys=("answers", "dataset")):
        formula = reference["dataset"] == "HME100k"
        said = _formula(prediction) if formula else _sentence(fold(prediction))
        answers = options_of(reference["answers"], where=where)
        values.append(float(any((_formula(a) if formula else _sentence(fold(a))) in said for a in answers)))
    return mean_score(
        "ocrbench",
        profile,
        values,
        parsed=predictions,
        unparsed=[not p.strip() for p in predictions],
        groups=groups,
        seed=seed,
    ).with_details(points=int(sum(values)))


_INVALID = "[invalid]"
_AFTER_HASHES = re.compile(r"#### (\-?[0-9.,]+)")
_NUMBERS = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def _strict_number(text: str) -> str:
    found = _AFTER_HASHES.findall(text)
    return found[0].strip() if found else _INVALID


def _last_number(text: str) -> str:
    found = _NUMBERS.findall(text)
    return (found[-1][0] or found[-1][1]).strip() if found else _INVALID


# strict: the number after the first "#### "; flexible: the last number in the text.
GSM8K: dict[str, Callable[[str], str]] = {"strict": _strict_number, "flexible": _last_number}
_WORKING = re.compile(r"(?s).*#### ")
_FINAL_PERIOD = re.compile(r"\.$")


def _bare_number(text: str) -> str:
    return _FINAL_PERIOD.sub("", _WORKING.sub("", text.replace(",", "").replace("$", ""))).lower()


def gsm8k(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    profile: str = "strict",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Share of right final numbers (GSM8K, Cobbe et al. 2021; the rules of lm-eval and lmms-eval).

    Commas, dollar signs and a final period are ignored on both sides.

    Profiles: strict (the number after "#### "), flexible (the last number of the answer).

    Args:
        predictions: (n,) answers.
        references: (n,) the worked answer of the data set ("... #### 42") or the number alone, each.
        profile: strict or flexible.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right numbers; `details["parsed"]` has the number read from each answer.

    Raises:
        MmitError: unknown profile, or columns of different length.
    """
    read, bare = memo(pick(GSM8K, profile, where="gsm8k")), memo(_bare_number)
    check_lengths("gsm8k", predictions, references=references)
    parsed = [read(p) for p in predictions]
    right = [text_of(r, where=f"gsm8k: question {row}") for row, r in enumerate(references)]
    values = [float(bare(p) == bare(r)) for p, r in zip(parsed, right, strict=True)]
    missing = [p == _INVALID for p in parsed]
    return mean_score("gsm8k", profile, values, parsed=parsed, unparsed=missing, groups=groups, seed=seed)
