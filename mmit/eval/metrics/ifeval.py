"""IFEval (Zhou et al. 2023): does an answer obey instructions that a program can verify.

In: answers and {"prompt", "instruction_id_list", "kwargs"} references. Out: a Score, per prompt and per
instruction, strict and loose. The checks themselves are in `ifeval_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmit.errors import MmitError, nearest
from mmit.eval.metrics.ifeval_rules import NEEDS_LANGUAGE, RULES, WORD_TOOLS, Words, language
from mmit.eval.metrics.intervals import wilson
from mmit.eval.metrics.score import Score, each, mean_score, need, pick
from mmit.sections import brief

_KEYS = ("instruction_id_list", "kwargs")
_UNCHANGED = "Take the reference from IFEval's input_data.jsonl unchanged."


def loose_variants(text: str) -> list[str]:
    """Return the eight texts of which one must obey: less the first, last or both lines; less "*"."""
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [text, *cut]
    return variants + [v.replace("*", "") for v in variants]


def _arguments(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    # The published file on the hub fills every unused argument with null.
    return {k: v for k, v in (kwargs or {}).items() if v is not None}


def follows(text: str, instruction: str, *, kwargs: Mapping[str, Any], words: Words, where: str = "") -> bool:
    """Return whether a text obeys one instruction; an empty text obeys none.

    Args:
        text: the answer.
        instruction: a key of RULES.
        kwargs: arguments of the instruction; more than it needs may be there.
        words: how sentences and words are counted, made by an entry of WORD_TOOLS.
        where: stands at the front of an error.

    Raises:
        MmitError: unknown instruction, or an argument that it needs is missing.
    """
    _check_instruction(instruction, kwargs, where=where)
    names, rule = RULES[instruction]
    try:
        return bool(text.strip()) and rule(text, {n: kwargs[n] for n in names}, words)
    except re.error as error:
        raise MmitError(
            f"a keyword of '{instruction}' is not a regular expression: {error}",
            where=where,
            remedy="IFEval reads keywords as regular expressions; escape marks such as + and (.",
        ) from error


def _check_instruction(instruction: Any, kwargs: Mapping[str, Any], *, where: str) -> None:
    if instruction not in RULES:
        raise MmitError(f"unknown instruction '{instruction}'", where=where, remedy=nearest(str(instruction), RULES))
    missing = [name for name in RULES[instruction][0] if name not in kwargs]
    if missing:
        raise MmitError(f"instruction '{instruction}' lacks {', '.join(missing)}", where=where, remedy=_UNCHANGED)


def check_ifeval(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference is no row of the benchmark: instructions, and the arguments of each."""
    need(reference, _KEYS, where=where)
    names, arguments = (reference[key] for key in _KEYS)
    for key, value in zip(_KEYS, (names, arguments), strict=True):
        if not isinstance(value, list):
            raise MmitError(f"{key} is {brief(value)}, no list", where=where, remedy=_UNCHANGED)
    if len(names) != len(arguments):
        raise MmitError(f"{len(names)} instructions but {len(arguments)} kwargs", where=where, remedy="Give one each.")
    for name, kwargs in zip(names, arguments, strict=True):
        if not isinstance(kwargs, Mapping | None):
            raise MmitError(f"kwargs has {brief(kwargs)}, no mapping", where=where, remedy=_UNCHANGED)
        _check_instruction(name, _arguments(kwargs), where=where)


def _obeyed(text: str, reference: Any, *, words: Words, where: str) -> list[tuple[str, bool, bool]]:
    """Return (instruction, obeyed strictly, obeyed loosely) for each instruction of one row."""
    check_ifeval(reference, where=where)
    names, arguments = (reference[key] for key in _KEYS)
    variants = loose_variants(text)
    found = []
    for name, raw in zip(names, arguments, strict=True):
        kwargs = _arguments(raw)
        strict = follows(text, name, kwargs=kwargs, words=words, where=where)
        loose = strict or any(follows(v, name, kwargs=kwargs, words=words, where=where) for v in variants)
        found.append((name, strict, loose))
    return found


def check(references: Sequence[Mapping[str, Any]], *, profile: str = "strict", tokeniser: str = "builtin") -> None:
    """Raise MmitError if a package is missing that the instructions of these references need."""
    pick(WORD_TOOLS, tokeniser, where="ifeval")()
    if any(NEEDS_LANGUAGE & set(reference["instruction_id_list"]) for reference in references):
        language("")


# Which of the two modes is the value; both are in the details.
PROFILES: dict[str, str] = {"strict": "strict", "loose": "loose"}


def _levels(kind: str, per_prompt: Sequence[bool], per_instruction: Sequence[bool]) -> dict[str, Any]:
    """Return the accuracies of prompts and of instructions, strict or loose."""
    right, total = sum(per_instruction), len(per_instruction)
    return {
        f"prompt_level_{kind}": sum(per_prompt) / len(per_prompt),
        f"instruction_level_{kind}": right / max(1, total),
        f"instruction_level_{kind}_ci95": list(wilson(right, total)),
    }


def ifeval(
    predictions: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    *,
    profile: str = "strict",
    tokeniser: str = "builtin",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """IFEval prompt-level accuracy; `details` has prompt and instruction level, strict and loose.

    Each reference is a row of the benchmark's file: {"prompt", "instruction_id_list", "kwargs"} (one
    mapping per instruction). `details["by_instruction"]` is the strict accuracy of each instruction.

    Profiles: strict (the answer as it is), loose (any of eight variants, see `loose_variants`).

    Args:
        predictions: (n,) answers.
        references: (n,) rows.
        profile: strict or loose.
        tokeniser: how sentences and capital words are counted: nltk (the published scorer's; needs nltk and its
            punkt data), or builtin (needs nothing, and counts nearly as that: it may differ in the instructions
            number_sentences and capital_word_frequency, and in no other).
        groups: (n,) group of each prompt.
        seed: of the interval.

    Raises:
        MmitError: unknown profile, tokeniser or instruction, columns of different length, a reference
            without its keys, or a package that an instruction needs is missing.
    """
    mode = pick(PROFILES, profile, where="ifeval")
    words = pick(WORD_TOOLS, tokeniser, where="ifeval")()
    rows = each("ifeval", predictions, references, unit="prompt")
    obeyed = [_obeyed(text, reference, words=words, where=where) for where, text, reference in rows]
    counts: dict[str, list[int]] = {}
    for name, strict, _ in (one for answer in obeyed for one in answer):
        tally = counts.setdefault(name, [0, 0])
        tally[0] += strict
        tally[1] += 1
    strictly = [[strict for _, strict, _ in answer] for answer in obeyed]
    flags = {"strict": strictly, "loose": [[loose for *_, loose in answer] for answer in obeyed]}
    details: dict[str, Any] = {
        "by_instruction": {name: right / asked for name, (right, asked) in sorted(counts.items())},
        "tokeniser": tokeniser,
        "instructions": sum(map(len, obeyed)),
    }
    for kind, answers in flags.items():
        details |= _levels(kind, [all(answer) for answer in answers], [one for answer in answers for one in answer])
    return mean_score(
        "ifeval",
        profile,
        [float(all(answer)) for answer in flags[mode]],
        parsed=flags[mode],
        unparsed=[not p.strip() for p in predictions],
        groups=groups,
        seed=seed,
    ).with_details(**details)
