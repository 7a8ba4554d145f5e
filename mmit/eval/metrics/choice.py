"""Multiple choice: which option does a text mean, and is it the right one.

In: free-text answers and the right letter. Out: a Score. The extractors are the public scorers' own rules;
none asks a judge, and an answer that none can read is wrong, never a guess. Does not compare likelihoods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from mmit.errors import MmitError
from mmit.eval.metrics.score import Score, each, mean_score, memo, need, pick, text_of
from mmit.sections import brief

_ANSWER_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select"),
    *(
        "i pick",
        "my answer is",
        "my choice is",
        "옵션",
        "정답은",
        "답은",
        "답:",
        "答案是",
        "答案为",
        "选",
        "答えは",
    ),
)
# How sure each form is that its letter is the answer: (rank, before, after).
_FORMS = ((6, "(", ")"), (5, "", "."), (4, "", ":"), (3, "", ")"), (2, "", " "))
_RANK_START, _RANK_END, _RANK_PHRASE = 10, 9, 7


def extract_letter(text: str, letters: str = "ABCDEFGH") -> str:
    """Return the option letter that a text means, or "" (lmms-eval 0.7.3's `extract_mcq_answer`).

    The best-ranked form wins, then the last place: a text that starts with a letter, ends with one, has one
    after "the answer is", "(A)", "A.", "A:", "A)", "A "; without any, any capital letter of the options. So
    "A dog" means A, and so does "I think B because A is wrong".
    """
    body = text.strip()
    for mark in ",.!?;:'\"":
        body = body.strip(mark)
    padded, core = f" {body} ", body.strip()
    best, found = (-1, -1), ""
    for rank, place, letter in _candidates(padded, core, letters):
        if (rank, place) > best:
            best, found = (rank, place), letter
    if found:
        return found
    places = [(padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(places, key=lambda item: item[0])[1] if places else ""


def _candidates(padded: str, core: str, letters: str) -> list[tuple[int, int, str]]:
    """Return (rank, place, letter) for every form in which a letter occurs."""
    found = []
    for rank, before, after in _FORMS:
        for letter in letters:
            place = padded.rfind(before + letter + after)
            if place >= 0:
                found.append((rank, place, letter))
    lowered = padded.lower()
    for phrase in _ANSWER_PHRASES:
        start = lowered.find(phrase)
        if start >= 0:
            # The first place of each letter after the phrase; the last of these wins.
            places = ((padded.find(letter, start + len(phrase)), letter) for letter in letters)
            found.extend((_RANK_PHRASE, place, letter) for place, letter in places if place >= 0)
    for letter in letters:
        if core.startswith(letter) and (len(core) == 1 or not core[1].isalpha()):
            found.append((_RANK_START, 0, letter))
        if core.endswith(letter) and (len(core) == 1 or not core[-2].isalpha()):
            found.append((_RANK_END, len(padded) - 1, letter))
    return found


def _option_texts(options: Any) -> dict[str, str]:
    """Return {letter: text} of a list of options or of a mapping that may have empty places."""
    if isinstance(options, Mapping):
        return {str(k): str(v) for k, v in options.items() if v is not None and v == v and str(v) != ""}
    return dict(zip(ascii_uppercase, map(str, options), strict=False))


def _letter(reference: Any, *, where: str) -> tuple[str, dict[str, str]]:
    """Return the right letter and the option texts ({} if not given) of one reference."""
    options: dict[str, str] = {}
    if isinstance(reference, Mapping):
        need(reference, ("answer",), where=where)
        options = _option_texts(reference.get("options") or {})
        reference = reference["answer"]
    if not (isinstance(reference, str) and len(reference.strip()) == 1 and reference.strip().isalpha()):
        raise MmitError(
            f"the right answer is {reference!r}, not an option letter",
            where=where,
            remedy="Give A, B, C, ...",
        )
    answer = reference.strip().upper()
    if options and answer not in options:
        problem = f"the right answer is {answer}, and the options are {', '.join(options)}"
        raise MmitError(problem, where=where, remedy="Name the letter of one of the options.")
    return answer, options


def check_choice(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference has no right letter, or one that is none of its options."""
    _letter(reference, where=where)


def _by_rank(text: str, options: Mapping[str, str]) -> str:
    return extract_letter(text, "".join(options) or "ABCDEFGH")


def _first_character(text: str, options: Mapping[str, str]) -> str:
    return text.strip()[:1].upper()  # lmms-eval lowers both sides, so "because" is B


def _whole(text: str, options: Mapping[str, str]) -> str:
    return text


def _scienceqa_lmms(text: str, options: Mapping[str, str]) -> str:
    answer = text.strip()
    if len(answer) == 1:
        return answer.upper()
    return answer[0] if len(answer) >= 2 and answer[0].isupper() and answer[1] == "." else ""


_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def _scienceqa_llava(text: str, options: Mapping[str, str]) -> str:
    letters = "ABCDE"
    if len(text) == 1 and text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    found = _THE_ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else ""


# Each reads (text, {letter: option text}) and returns a letter, or "" if it cannot.
CHOICE: dict[str, Callable[[str, Mapping[str, str]], str]] = {
    "extract": _by_rank,
    "seed_lmms": _first_character,
    "seed_llava": _whole,
    "scienceqa_lmms": _scienceqa_lmms,
    "scienceqa_llava": _scienceqa_llava,
}


def choice_accuracy(
    predictions: Sequence[str],
    references: Sequence[str | Mapping[str, Any]],
    *,
    profile: str = "extract",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Share of right options.

    Profiles:
        extract: `extract_letter`.
        seed_lmms: the first character of the stripped answer, in either case (SEED-Bench in lmms-eval).
        seed_llava: the whole answer must be the letter (LLaVA's conversion for SEED-Bench).
        scienceqa_lmms: the letter in either case, or a capital and a period at the start.
        scienceqa_llava: a letter A-E, "A. " at the start, or exactly one "The answer is A."

    Args:
        predictions: (n,) answers.
        references: (n,) letters, or {"answer": letter, "options": [...] or {letter: text}}; with options, only
            their letters can be extracted.
        profile: one of the above.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right answers; `details["parsed"]` has the letter read from each.

    Raises:
        MmitError: unknown profile, columns of different length, or a reference that is no letter.
    """
    read = pick(CHOICE, profile, where="choice")
    seen: dict[tuple[str, str], str] = {}
    values, parsed, missing = [], [], []
    anything = set(ascii_uppercase)
    for where, prediction, reference in each("choice", predictions, references):
        answer, options = _letter(reference, where=where)
        key = (prediction, "".join(options))
        if key not in seen:
            seen[key] = read(prediction, options)
        said = seen[key]
        values.append(float(said == answer))
        parsed.append(said)
        missing.append(said not in (options or anything))
    return mean_score("choice", profile, values, parsed=parsed, unparsed=missing, groups=groups, seed=seed)


def realworldqa(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """RealWorldQA: an option letter A-D is extracted, any other answer must be equal (lmms-eval's rule).

    Equality ignores case, outer spaces and final periods.

    Args:
        predictions: (n,) answers.
        references: (n,) a letter A-D or a text each.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right answers; `details["parsed"]` has what was compared.

    Raises:
        MmitError: columns of different length.
    """
    letter = memo(lambda text: extract_letter(text, "ABCD"))
    values, parsed = [], []
    for where, prediction, reference in each("realworldqa", predictions, references):
        gold = text_of(reference, where=where).strip()
        is_letter = gold.upper() in set("ABCD")
        said = letter(prediction) if is_letter else prediction.lower().strip().rstrip(".")
        values.append(float(said == (gold.upper() if is_letter else gold.lower())))
        parsed.append(said)
    empty = [not p for p in parsed]
    return mean_score("realworldqa", "lmms", values, parsed=parsed, unparsed=empty, groups=groups, seed=seed)


_WRAPPINGS = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


def infer_option(text: str) -> str:
    """Return the only letter A-E that stands alone as a word, bare or in one of 12 wrappings; else "".

    MMBench's `can_infer_option`. A lone "A" in a text of more than three words may be an article, so only the
    wrapped forms count there.
    """
    if "Failed to obtain answer via API" in text:
        return ""
    words = set(text.split())
    bare = [c for c in "ABCDE" if c in words]
    if len(bare) == 1 and not ("A" in words and len(text.split()) > 3):
        return bare[0]
    for before, after in _WRAPPINGS:
        wrapped = [c for c in "ABCDE" if before + c + after in words]
        if len(wrapped) == 1:
            return wrapped[0]
    return ""


def infer_text(text: str, options: Mapping[str, str]) -> str:
    """Return the letter of the only option whose text occurs in the answer (case ignored), else ""."""
    lowered = text.lower()
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    return named[0] if len(named) == 1 else ""


def _infer(text: str, options: Mapping[str, str]) -> str:
    return infer_option(text) or infer_text(text, options)


def _infer_or_extract(text: str, options: Mapping[str, str]) -> str:
    return _infer(text, options) or extract_letter(text, "".join(options) or "ABCD")


# prefetch: what the scorer reads before it would ask a judge. static: then `extract_letter` instead of a
# judge.
MMBENCH: dict[str, Callable[[str, Mapping[str, str]], str]] = {
    "prefetch": _infer,
    "static": _infer_or_extract,
}
_ROTATION = 1_000_000


def check_mmbench(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference lacks its keys, its index is no number, or its answer none of the options."""
    need(reference, ("index", "answer", "options"), where=where)
    check_choice(reference, where=where)
    try:
        int(reference["index"])
    except (TypeError, ValueError):
        problem = f"the index is {brief(reference['index'])}, no number"
        raise MmitError(problem, where=where, remedy="Give the number of the row in the benchmark's file.") from None


def mmbench_question(reference: Mapping[str, Any]) -> int:
    """Return the index of the question that a row is a rotation of: all of them are scored together."""
    return int(reference["index"]) % _ROTATION


def mmbench(
    predictions: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    *,
    profile: str = "static",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """MMBench with circular evaluation (Liu et al. 2023): a question counts if all its rotations are right.

    Rows whose index is equal modulo 1,000,000 are rotations of one question. `n` and
    `details["values"]` are questions, in order of appearance; `details["parsed"]` are rows;
    `details["vanilla"]` is the share of right unrotated rows.

    Profiles: prefetch (letters and option texts; what would need a judge is wrong), static (then the general
    extractor, as lmms-eval's `_static` tasks).

    Args:
        predictions: (n,) answers.
        references: (n,) rows {"index": int, "answer": letter, "options": {letter: text} or list}, and "category" if
            there is one.
        profile: prefetch or static.
        groups: (n,) group of each row, by default the categories. seed: of the bootstrap interval.

    Returns:
        the share of questions whose rotations are all right.

    Raises:
        MmitError: unknown profile, columns of different length, a reference without its keys, or a rotation
            without its question.
    """
    read = pick(MMBENCH, profile, where="mmbench")
    questions: dict[int, list[int]] = {}
    right, parsed = [], []
    rows = each("mmbench", predictions, references, groups=groups, unit="row")
    for row, (where, prediction, reference) in enumerate(rows):
        check_mmbench(reference, where=where)
        answer, options = _letter(reference, where=where)
        parsed.append(read(prediction, options))
        right.append(parsed[-1] == answer)
        questions.setdefault(mmbench_question(reference), []).append(row)
    first = {int(r["index"]): row for row, r in enumerate(references) if int(r["index"]) < _ROTATION}
    lost = sorted(set(questions) - set(first))
    if lost:
        raise MmitError(
            f"rotations of question {lost[0]} but not the question itself ({len(lost)} such)",
            where="mmbench",
            remedy="Score whole files: the unrotated row has the index below 1,000,000.",
        )
    order = list(questions)
    if groups is None and all("category" in references[first[q]] for q in order):
        groups = [str(r.get("category", "")) for r in references]
    return mean_score(
        "mmbench",
        profile,
        [float(all(right[row] for row in questions[q])) for q in order],
        unparsed=[not all(parsed[row] for row in questions[q]) for q in order],
        groups=[groups[first[q]] for q in order] if groups else None,
        seed=seed,
    ).with_details(parsed=parsed, rows=len(parsed), vanilla=sum(right[first[q]] for q in order) / len(order))
