"""Metrics over yes/no answers: POPE, MME, NLVR, NLVR2.

In: free-text answers and yes/no (or true/false) references. Out: a Score, with precision, recall and the
rest in `details`. How a text becomes yes or no is the whole difference between the public scorers, so each
is a profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmit.errors import MmitError
from mmit.eval.metrics.intervals import bootstrap_counts, resample_counts, wilson
from mmit.eval.metrics.score import Counted, Score, check_lengths, each, mean_score, memo, need, pick, split
from mmit.eval.metrics.vqa import vlmeval_words
from mmit.sections import brief


def _pope_official(text: str) -> str:
    # First sentence, split at single spaces; only "No", "not" and "no" are negative, anything else is yes.
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def _pope_lmms(text: str) -> str:
    answer = text.lower().strip()
    return answer if answer in ("yes", "no") else "other"


def _pope_vlmeval(text: str) -> str:
    words = vlmeval_words(text)
    if ("yes" in words) == ("no" in words):
        return "other"
    return "yes" if "yes" in words else "no"


POPE: dict[str, Callable[[str], str]] = {
    "official": _pope_official,
    "lmms": _pope_lmms,
    "vlmeval": _pope_vlmeval,
}


def _ratio(top: Any, bottom: Any) -> Any:
    """Return top / bottom, and 0 where nothing was counted."""
    return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=np.asarray(bottom) > 0)


# Cells of the table: what was asked for, then what was read.
_CELLS = tuple((gold, said) for gold in ("yes", "no") for said in ("yes", "no", "other"))


def _pope_numbers(table: np.ndarray, profile: str) -> dict[str, np.ndarray]:
    """Return accuracy, precision, recall, f1 and yes_ratio of (..., 6) counts in the order of `_CELLS`."""
    yes_yes, yes_no, yes_other, no_yes, no_no, no_other = np.moveaxis(np.asarray(table, float), -1, 0)
    total = yes_yes + yes_no + yes_other + no_yes + no_no + no_other
    # lmms-eval leaves unread answers out of recall, and reports the share of yes among the *references*.
    missed = yes_no if profile == "lmms" else yes_no + yes_other
    precision = _ratio(yes_yes, yes_yes + no_yes)
    recall = _ratio(yes_yes, yes_yes + missed)
    said_yes = _ratio(yes_yes + no_yes, total)
    asked_yes = _ratio(yes_yes + yes_no + yes_other, total)
    return {
        "accuracy": _ratio(yes_yes + no_no, total),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": asked_yes if profile == "lmms" else said_yes,
        "predicted_yes_ratio": said_yes,
    }


def _binary(text: str, *, where: str) -> str:
    answer = str(text).lower().strip().replace(".", "")
    if answer not in ("yes", "no"):
        raise MmitError(f"reference {text!r} is not yes or no", where=where, remedy="Give yes or no.")
    return answer


def pope(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    profile: str = "official",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """POPE (Li et al. 2023): `value` is accuracy (F1 in profile vlmeval), the rest in details.

    Profiles:
        official: the first sentence's "No", "no" or "not" is no, everything else is yes (also LLaVA's script).
        lmms: the answer must be exactly yes or no; recall skips unread answers; `yes_ratio` is the references'.
        vlmeval: "yes" or "no" among the words, not both; `value` is F1.

    The unparsed rate counts answers without "yes" or "no" among their words, even where the profile reads them as yes.

    Args:
        predictions: (n,) answers.
        references: (n,) yes or no each.
        profile: official, lmms or vlmeval.
        groups: (n,) split of each question: random, popular or adversarial. seed: of the bootstrap interval.

    Returns:
        the score; `details` has accuracy, precision, recall, f1, yes_ratio, predicted_yes_ratio and f1_ci95.

    Raises:
        MmitError: unknown profile, columns of different length, or a reference other than yes and no.
    """
    read = memo(pick(POPE, profile, where="pope"))
    clear = memo(_pope_vlmeval)
    check_lengths("pope", predictions, references=references, groups=groups)
    said = [read(p) for p in predictions]
    gold = [_binary(r, where=f"pope: question {i}") for i, r in enumerate(references)]
    vague = [(said[i] if profile == "lmms" else clear(p)) == "other" for i, p in enumerate(predictions)]
    cells = [_CELLS.index(pair) for pair in zip(gold, said, strict=True)]

    def f1(draws: np.ndarray) -> np.ndarray:
        return _pope_numbers(draws, profile)["f1"]

    def part(at: Sequence[int], by_group: Mapping[str, Score], more: Mapping[str, Any]) -> Score:
        table = np.bincount([cells[i] for i in at], minlength=len(_CELLS))
        numbers = {k: float(v) for k, v in _pope_numbers(table, profile).items()}
        f1_ci = bootstrap_counts(table, f1, seed=seed)
        by_f1 = profile == "vlmeval"
        return Score(
            name="pope",
            profile=profile,
            value=numbers["f1" if by_f1 else "accuracy"],
            n=len(at),
            ci95=f1_ci if by_f1 else wilson(sum(gold[i] == said[i] for i in at), len(at)),
            unparsed_rate=sum(vague[i] for i in at) / len(at),
            by_group=by_group,
            details={**numbers, "f1_ci95": list(f1_ci), **more},
            counted=Counted("f1", cells, len(_CELLS), f1),
        )

    values = [float(g == s) for g, s in zip(gold, said, strict=True)]
    by_group = {name: part(at, {}, {}) for name, at in split(groups).items()}
    return part(range(len(gold)), by_group, {"values": values, "parsed": said})


def check_pope(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference is neither yes nor no."""
    _binary(reference, where=where)


MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _mme_prefix(answer: str) -> str:
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _mme_lmms(text: str) -> str:
    answer = text.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer, "other")
    return _mme_prefix(answer)


def _mme_official(text: str) -> str:
    return _mme_prefix(text.lower())


# Both read only the first four characters: "There is no" is other, "nothing" is no.
MME: dict[str, Callable[[str], str]] = {"official": _mme_official, "lmms": _mme_lmms}


def check_mme(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference is not {"answer": yes or no, "category": name, "image": id}."""
    need(reference, ("answer", "category", "image"), where=where)
    _binary(reference["answer"], where=where)
    for key in ("category", "image"):
        if not isinstance(reference[key], (str, int)):
            raise MmitError(f"{key} is {brief(reference[key])}", where=where, remedy="Give a name or a number.")


def mme_image(reference: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return what tells an image from others: its two questions are scored together."""
    return reference["category"], reference["image"]


def _mme_points(pairs: np.ndarray) -> np.ndarray:
    """Return accuracy + accuracy+ in points of (..., 3) counts of images with 0, 1, 2 right answers."""
    pairs = np.asarray(pairs, float)
    images = pairs.sum(axis=-1)
    points: np.ndarray = 100.0 * ((pairs[..., 1] + 2 * pairs[..., 2]) / (2 * images) + pairs[..., 2] / images)
    return points


def _mme_categories(
    right: Sequence[float], references: Sequence[dict[str, Any]], *, seed: int
) -> tuple[dict[str, dict[str, float]], tuple[float, float]]:
    """Return each category's points, and the interval of their sum (images resampled per category)."""
    images: dict[str, dict[Any, list[float]]] = {}
    for value, reference in zip(right, references, strict=True):
        images.setdefault(reference["category"], {}).setdefault(reference["image"], []).append(value)
    categories, draws = {}, np.zeros(1)
    for order, (category, pairs) in enumerate(images.items()):
        odd = next((image for image, values in pairs.items() if len(values) != 2), None)
        if odd is not None:
            raise MmitError(
                f"image {odd!r} of category '{category}' has {len(pairs[odd])} questions, not 2",
                where="mme",
                remedy="Score whole images: MME asks two questions about each.",
            )
        counts = np.bincount([int(sum(v)) for v in pairs.values()], minlength=3)
        both = 100.0 * int(counts[2]) / len(pairs)
        accuracy = 100.0 * int(counts[1] + 2 * counts[2]) / (2 * len(pairs))
        categories[category] = {"accuracy": accuracy, "accuracy_plus": both, "score": accuracy + both}
        draws = draws + _mme_points(resample_counts(counts, seed=(seed, order)))
    low, high = np.quantile(draws, [0.025, 0.975])
    return categories, (float(low), float(high))


def mme(
    predictions: Sequence[str],
    references: Sequence[dict[str, Any]],
    *,
    profile: str = "lmms",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """MME (Fu et al. 2023): `value` is the sum over categories of accuracy + accuracy+, at most 200 each.

    Accuracy+ is the share of images with both questions right. An image has exactly two.

    Profiles: lmms (strips, drops periods, "y" and "n" count), official (lower-cases only).

    Args:
        predictions: (n,) answers.
        references: (n,) {"answer": yes or no, "category": name, "image": id}.
        profile: lmms or official.
        groups: (n,) group of each question, by default its category. seed: of the bootstrap interval.

    Returns:
        the score; `details` has sums of perception and cognition, missing categories, and numbers of each category.

    Raises:
        MmitError: unknown profile, columns of different length, a reference without its keys, or an image
            that does not have two questions.
    """
    read = memo(pick(MME, profile, where="mme"))
    said, right = [], []
    for where, prediction, reference in each("mme", predictions, references):
        check_mme(reference, where=where)
        said.append(read(prediction))
        right.append(float(said[-1] == _binary(reference["answer"], where=where)))
    categories, ci95 = _mme_categories(right, references, seed=seed)
    base = mean_score(
        "mme",
        profile,
        right,
        parsed=said,
        unparsed=[s == "other" for s in said],
        groups=groups or [r["category"] for r in references],
        seed=seed,
    )
    known = (*MME_PERCEPTION, *MME_COGNITION)
    return Score(
        name="mme",
        profile=profile,
        value=sum(c["score"] for c in categories.values()),
        n=base.n,
        ci95=ci95,
        unparsed_rate=base.unparsed_rate,
        by_group=base.by_group,
        details={
            "perception": sum(v["score"] for k, v in categories.items() if k in MME_PERCEPTION),
            "cognition": sum(v["score"] for k, v in categories.items() if k in MME_COGNITION),
            "accuracy": base.value,
            "categories": categories,
            "missing_categories": [c for c in known if c not in categories],
            **base.details,
        },
    )


def _nlvr_strict(text: str) -> str:
    answer = text.strip().lower()
    return answer if answer in ("true", "false") else "other"


def _nlvr_words(text: str) -> str:
    for word in text.lower().replace(".", " ").replace(",", " ").split():
        if word in ("true", "yes"):
            return "true"
        if word in ("false", "no"):
            return "false"
    return "other"


NLVR: dict[str, Callable[[str], str]] = {"official": _nlvr_strict, "words": _nlvr_words}


def check_nlvr(reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference is not {"label": true or false, "identifier": text}."""
    need(reference, ("label", "identifier"), where=where)
    if str(reference["label"]).lower() not in ("true", "false"):
        problem = f"the label is {brief(reference['label'])}, neither true nor false"
        raise MmitError(problem, where=where, remedy="Give true or false.")


def _statements(
    name: str,
    sentence_of: Callable[[str], str],
    predictions: Sequence[str],
    *,
    references: Sequence[Mapping[str, Any]],
    profile: str,
    groups: Sequence[str] | None,
    seed: int,
) -> Score:
    """Score true-or-false verdicts, and the sentences whose every picture is judged right."""
    read = memo(pick(NLVR, profile, where=name))
    said: list[str] = []
    values: list[float] = []
    sentences: dict[str, bool] = {}
    for where, prediction, reference in each(name, predictions, references):
        check_nlvr(reference, where=where)
        sentence = sentence_of(str(reference["identifier"]))
        said.append(read(prediction))
        values.append(float(said[-1] == str(reference["label"]).lower()))
        sentences[sentence] = sentences.get(sentence, True) and values[-1] == 1
    consistent = sum(sentences.values())
    return mean_score(
        name,
        profile,
        values,
        parsed=said,
        unparsed=[s == "other" for s in said],
        groups=groups,
        seed=seed,
    ).with_details(
        consistency=consistent / len(sentences),
        consistency_ci95=list(wilson(consistent, len(sentences))),
        sentences=len(sentences),
    )


def nlvr(
    predictions: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    *,
    profile: str = "official",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """NLVR accuracy and consistency (Suhr et al. 2017).

    Six pictures show
    the same boxes in another order, and up to four positions share a sentence. `details["consistency"]` is the share
    of sentences whose every picture is judged right; the sentence is the identifier's first part, as in the official
    script.

    Profiles: official (the answer must be true or false), words (the first true, false, yes or no counts).

    Args:
        predictions: (n,) answers.
        references: (n,) {"label": "true" or "false", "identifier": "sentence-position-permutation"}.
        profile: official or words.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right answers; `details["consistency"]` has that of sentences.

    Raises:
        MmitError: unknown profile, columns of different length, or a reference without its keys.
    """
    given: dict[str, Any] = {"profile": profile, "groups": groups, "seed": seed}
    return _statements("nlvr", lambda name: name.split("-")[0], predictions, references=references, **given)


def _nlvr2_sentence(name: str) -> str:
    parts = name.split("-")
    return "-".join(parts[:2] + parts[3:])


def nlvr2(
    predictions: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    *,
    profile: str = "official",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """NLVR2 accuracy and consistency (Suhr et al. 2019).

    `details["consistency"]` is the share of sentences whose every picture pair is judged right; the
    sentence is the identifier without its third part, as in the official script.

    Profiles: official (the answer must be true or false), words (the first true, false, yes or no counts).

    Args:
        predictions: (n,) answers.
        references: (n,) {"label": "True" or "False", "identifier": "split-sentence-pair-n"}.
        profile: official or words.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the share of right answers; `details["consistency"]` has that of sentences.

    Raises:
        MmitError: unknown profile, columns of different length, or a reference without its keys.
    """
    given: dict[str, Any] = {"profile": profile, "groups": groups, "seed": seed}
    return _statements("nlvr2", _nlvr2_sentence, predictions, references=references, **given)
