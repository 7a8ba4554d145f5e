"""VQA accuracy: an answer against ten human answers, by the rules of each public scorer.

In: one answer and a list of human answers per question. Out: a Score. The tables below are part of the
metric's definition; the profiles differ only in when and how strings are normalised. Does not repair any of
their quirks.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmit.errors import MmitError
from mmit.eval.metrics.score import Score, check_lengths, mean_score, memo, options_of, pick

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_HAS_PUNCTUATION = re.compile("[" + re.escape("".join(_PUNCTUATION)) + "]")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(max(0, i - 1))
    for i, word in enumerate("none zero one two three four five six seven eight nine ten".split())
}
# Words are lower-cased before the look-up, so the capitalised entries of the published table can never
# match and are left out. "somebody'd" really maps to "somebodyd".
_CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
    hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd
    howll=how'll hows=how's isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll let's=let's
    maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
    mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
    ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've
    she's=she's shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've
    somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
    somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
    someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
    something'dve=something'd've somethingll=something'll thats=that's thered=there'd thered've=there'd've
    there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've
    theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've
    weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's
    whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll
    whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've
    wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
    y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd
    youd've=you'd've you'dve=you'd've youll=you'll youre=you're youve=you've """.split()
)

_ONE_COMMA = re.compile(r"\d,\d")
_COMMAS = re.compile(r"\d,+\d")
# The official pattern means "not after a digit" but says something else, so it also strips the period of
# "3.".
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_NOT_AFTER_DIGIT = re.compile(r"(?<!\d)\.(?!\d)")
# The scorers pass re.UNICODE (32) where `count` is meant: a 33rd period stays.
_MAX_PERIODS = 32


def _punctuation(text: str, *, comma: re.Pattern[str], period: re.Pattern[str]) -> str:
    """Drop marks that touch a space (or all, if a number has a comma); the others become a space."""
    out = text
    if _HAS_PUNCTUATION.search(text):
        in_number = comma.search(text) is not None
        for mark in _PUNCTUATION:
            if mark in text:
                drop = in_number or mark + " " in text or " " + mark in text
                out = out.replace(mark, "" if drop else " ")
    return period.sub("", out, count=_MAX_PERIODS)


def _words(text: str) -> str:
    """Lower-case, number words to digits, articles away, apostrophes into contractions."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _official(text: str) -> str:
    return _words(_punctuation(_one_line(text), comma=_ONE_COMMA, period=_PERIOD))


def _vlmeval(text: str) -> str:
    return _words(_punctuation(_one_line(text), comma=_ONE_COMMA, period=_PERIOD_NOT_AFTER_DIGIT))


def _evalai_words(text: str) -> str:
    return _words(_punctuation(_one_line(text), comma=_COMMAS, period=_PERIOD))


def _evalai(text: str) -> str:
    return _evalai_words(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def vlmeval_words(text: str) -> list[str]:
    """Return the lower-cased words of a text after VLMEvalKit's punctuation rule."""
    return _punctuation(text.lower(), comma=_ONE_COMMA, period=_PERIOD_NOT_AFTER_DIGIT).split()


def _average(accuracies: list[float]) -> float:
    return float(sum(accuracies)) / len(accuracies)


@dataclass(frozen=True, slots=True)
class _Profile:
    """How one scorer prepares strings: `always` rewrites the prediction first, `answers` rewrites both sides.

    With `skip_unanimous`, `answers` is applied only where the human answers differ from each other.
    """

    answers: Callable[[str], str]
    average: Callable[[list[float]], float] = _average
    skip_unanimous: bool = False
    always: Callable[[str], str] = _one_line


def _mean(accuracies: list[float]) -> float:
    return float(statistics.mean(accuracies))


def _numpy_mean(accuracies: list[float]) -> float:
    return float(np.mean(accuracies))


PROFILES: dict[str, _Profile] = {
    # GT-Vision-Lab/VQA: ten equal human answers are compared as they are, so "Yes." against ten "yes" is
    # wrong.
    "official": _Profile(_official, skip_unanimous=True),
    # EvalAI, LLaVA's TextVQA scorer, lmms-eval's textvqa and vizwiz_vqa: everything is always normalised.
    "evalai": _Profile(_evalai),
    # lmms-eval's vqav2: the prediction as EvalAI, the human answers only if they differ, without splitting
    # "'s".
    "lmms_vqav2": _Profile(_evalai_words, average=_mean, skip_unanimous=True, always=_evalai),
    # VLMEvalKit: everything is always normalised, and the period of "3." stays.
    "vlmeval": _Profile(_vlmeval, average=_numpy_mean),
}


def normalise(text: str, *, profile: str = "official") -> str:
    """Return `text` as the profile compares it where the human answers differ.

    Raises:
        MmitError: unknown profile.
    """
    return str(pick(PROFILES, profile, where="vqa").answers(text))


def _leave_one_out(matches: tuple[bool, ...], average: Callable[[list[float]], float]) -> float:
    """Average over the humans of min(1, how many of the *other* humans gave the answer / 3)."""
    hits = sum(matches)
    return average([min(1, float(hits - match) / 3) for match in matches])


def human_answers(reference: Any, *, where: str) -> tuple[str, ...]:
    """Return the human answers of a reference. Raises MmitError if there are fewer than two, or one is no text."""
    if isinstance(reference, str) or len(answers := options_of(reference, where=where)) < 2:
        remedy = "Use the metric 'exact' where a question has one answer."
        raise MmitError("VQA accuracy needs a list of at least two human answers", where=where, remedy=remedy)
    return answers


def vqa_accuracy(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    profile: str = "official",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """VQA accuracy (Antol et al. 2015): VQAv2, VizWiz, TextVQA, OK-VQA.

    Args:
        predictions: (n,) answers.
        references: (n,) lists of human answers, ten in the benchmarks.
        profile: official, evalai, lmms_vqav2 or vlmeval.
        groups: (n,) for instance the answer type.
        seed: of the bootstrap interval.

    Raises:
        MmitError: unknown profile, columns of different length, or a question with fewer than two human
            answers.
    """
    rule = pick(PROFILES, profile, where="vqa")
    check_lengths("vqa", predictions, references=references)
    always, rewrite, plain = memo(rule.always), memo(rule.answers), memo(_one_line)
    scores: dict[tuple[bool, ...], float] = {}
    values: list[float] = []
    parsed: list[str] = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        answers = human_answers(reference, where=f"vqa: question {row}")
        answer = always(prediction)
        human = [plain(a) for a in answers]
        if not rule.skip_unanimous or human.count(human[0]) < len(human):
            # Raw strings, not the stripped ones: each rewriting strips for itself, at its own step.
            human = [rewrite(a) for a in answers]
            answer = rewrite(answer)
        parsed.append(answer)
        if answer not in human:
            values.append(0.0)
            continue
        matches = tuple([a == answer for a in human])
        if matches not in scores:
            scores[matches] = _leave_one_out(matches, rule.average)
        values.append(scores[matches])
    empty = [not p for p in parsed]
    return mean_score("vqa", profile, values, parsed=parsed, unparsed=empty, groups=groups, seed=seed)
