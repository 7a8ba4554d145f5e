"""Benchmark metrics as pure functions: answers and references in, a Score with its interval out.

Every function takes `(predictions, references, *, groups=None, seed=0)`. Where public scorers disagree, each
is a named profile, and `METRICS` has one entry per `metric:profile`. Knows nothing of models or prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmit.errors import MmitError, nearest
from mmit.eval.metrics import boxes, captions, choice, ifeval, mathvista, mmmu, similarity, text, vqa, yesno
from mmit.eval.metrics.intervals import (
    PairedDifference,
    bootstrap_counts,
    bootstrap_mean,
    clustered,
    mcnemar,
    paired_bootstrap,
    paired_clusters,
    wilson,
)
from mmit.eval.metrics.score import Score, by_cluster, mean_score, options_of, text_of
from mmit.plugins import FORM, calling, is_spec, own_function

__all__ = [
    "METRICS",
    "PairedDifference",
    "Score",
    "bootstrap_counts",
    "bootstrap_mean",
    "by_cluster",
    "check_installed",
    "check_reference",
    "clustered",
    "get_metric",
    "mcnemar",
    "paired_bootstrap",
    "paired_clusters",
    "together",
    "wilson",
]

Metric = Callable[..., Score]

# What a reference must be is in each function's docstring.
METRICS: dict[str, Metric] = {
    "vqa:official": partial(vqa.vqa_accuracy, profile="official"),
    "vqa:evalai": partial(vqa.vqa_accuracy, profile="evalai"),
    "vqa:lmms_vqav2": partial(vqa.vqa_accuracy, profile="lmms_vqav2"),
    "vqa:vlmeval": partial(vqa.vqa_accuracy, profile="vlmeval"),
    "exact": partial(text.exact_match, profile="plain"),
    "exact:strict": partial(text.exact_match, profile="strict"),
    "exact:vlmeval": partial(text.exact_match, profile="vlmeval"),
    "gqa:lmms": partial(text.exact_match, profile="gqa_lmms"),
    "gqa:llava": partial(text.exact_match, profile="gqa_llava"),
    "ai2d:lmms": partial(text.exact_match, profile="ai2d_lmms"),
    "anls:lmms": partial(similarity.anls, profile="lmms"),
    "anls:normalised": partial(similarity.anls, profile="normalised"),
    "relaxed:lmms": partial(similarity.relaxed_accuracy, profile="lmms"),
    "relaxed:vlmeval": partial(similarity.relaxed_accuracy, profile="vlmeval"),
    "iou": partial(boxes.iou, profile="mean"),
    "iou:50": partial(boxes.iou, profile="50"),
    "iou:75": partial(boxes.iou, profile="75"),
    "rouge_l": partial(similarity.rouge_l, profile="f1"),
    "rouge_l:coco": partial(similarity.rouge_l, profile="coco"),
    "ocrbench:lmms": partial(text.ocrbench, profile="lmms"),
    "ocrbench:vlmeval": partial(text.ocrbench, profile="vlmeval"),
    "gsm8k:strict": partial(text.gsm8k, profile="strict"),
    "gsm8k:flexible": partial(text.gsm8k, profile="flexible"),
    "pope:official": partial(yesno.pope, profile="official"),
    "pope:lmms": partial(yesno.pope, profile="lmms"),
    "pope:vlmeval": partial(yesno.pope, profile="vlmeval"),
    "mme:official": partial(yesno.mme, profile="official"),
    "mme:lmms": partial(yesno.mme, profile="lmms"),
    "nlvr:official": partial(yesno.nlvr, profile="official"),
    "nlvr:words": partial(yesno.nlvr, profile="words"),
    "nlvr2:official": partial(yesno.nlvr2, profile="official"),
    "nlvr2:words": partial(yesno.nlvr2, profile="words"),
    "choice": partial(choice.choice_accuracy, profile="extract"),
    "seed:lmms": partial(choice.choice_accuracy, profile="seed_lmms"),
    "seed:llava": partial(choice.choice_accuracy, profile="seed_llava"),
    "scienceqa:lmms": partial(choice.choice_accuracy, profile="scienceqa_lmms"),
    "scienceqa:llava": partial(choice.choice_accuracy, profile="scienceqa_llava"),
    "realworldqa:lmms": choice.realworldqa,
    "mmbench:prefetch": partial(choice.mmbench, profile="prefetch"),
    "mmbench:static": partial(choice.mmbench, profile="static"),
    "mmmu": partial(mmmu.mmmu, profile="unparsed_wrong"),
    "mmmu:random": partial(mmmu.mmmu, profile="random"),
    "mathvista:offline": partial(mathvista.mathvista, profile="offline"),
    "mathvista:extracted": partial(mathvista.mathvista, profile="extracted"),
    "captions:coco": partial(captions.captions, profile="coco"),
    "captions:simple": partial(captions.captions, profile="simple"),
    "captions:vlmeval": partial(captions.captions, profile="vlmeval"),
    "ifeval:strict": partial(ifeval.ifeval, profile="strict"),
    "ifeval:loose": partial(ifeval.ifeval, profile="loose"),
    "ifeval:strict-nltk": partial(ifeval.ifeval, profile="strict", tokeniser="nltk"),
    "ifeval:loose-nltk": partial(ifeval.ifeval, profile="loose", tokeniser="nltk"),
}


# What a reference of each must be, by the name before the colon: asked before a model is, and by the metric itself.
_REFERENCES: dict[str, Callable[..., object]] = {
    "vqa": vqa.human_answers,
    **dict.fromkeys(("exact", "gqa", "ai2d", "anls", "relaxed", "rouge_l", "captions"), options_of),
    "iou": boxes.box_meant,
    "ocrbench": text.check_ocrbench,
    "gsm8k": text_of,
    "pope": yesno.check_pope,
    "mme": yesno.check_mme,
    **dict.fromkeys(("nlvr", "nlvr2"), yesno.check_nlvr),
    **dict.fromkeys(("choice", "seed", "scienceqa"), choice.check_choice),
    "realworldqa": text_of,
    "mmbench": choice.check_mmbench,
    "mmmu": mmmu.check_mmmu,
    "mathvista": mathvista.check_mathvista,
    "ifeval": ifeval.check_ifeval,
}
# What tells questions that are scored together: a sample has all of them or none.
_TOGETHER: dict[str, Callable[[Any], Any]] = {"mme": yesno.mme_image, "mmbench": choice.mmbench_question}


def check_reference(name: str, reference: Any, *, where: str) -> None:
    """Raise MmitError if the metric `name` of METRICS cannot read a reference; a metric of the user's own reads any."""
    check = _REFERENCES.get(name.partition(":")[0]) if name in METRICS else None
    if check is not None:
        check(reference, where=where)


def together(name: str, reference: Any) -> Any:
    """Return what the metric `name` scores as one with others of the same key; None where it stands alone."""
    key = _TOGETHER.get(name.partition(":")[0]) if name in METRICS else None
    return None if key is None else key(reference)


# What tells, before any question is asked, that a package is missing.
_CHECKS: dict[str, Callable[..., None]] = {"captions": captions.check, "ifeval": ifeval.check}


def check_installed(name: str, references: Sequence[Any]) -> None:
    """Raise MmitError if the metric `name` would lack a package when it scores answers with these references."""
    check = _CHECKS.get(name.partition(":")[0])
    if check is not None:
        check(references, **METRICS[name].keywords)  # type: ignore[attr-defined]


def get_metric(name: str) -> Metric:
    """Return `METRICS[name]`, or the metric of `module:name` of the user's own (see `_own`).

    Raises:
        MmitError: unknown metric; lists the valid names with the nearest one. It cannot be imported or called so.
    """
    if name in METRICS:
        return METRICS[name]
    if not is_spec(name) or name.partition(":")[0] in {known.partition(":")[0] for known in METRICS}:
        remedy = f"{nearest(name, METRICS)}, or {FORM} of your own"
        raise MmitError(f"unknown metric '{name}'", where="metric", remedy=remedy)
    return partial(_own, name, own_function(name, positional=("predictions", "references"), gives=OWN, where="metric"))


OWN = "list[float], one number for each answer"


def _own(
    name: str,
    function: Callable[..., Any],
    predictions: Sequence[str],
    references: Sequence[Any],
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """The mean of what a function of the user's own gives for each answer, with interval and groups as any other."""
    with calling("", where=f"metric {name}", remedy=f"Return {OWN}.", kind=MmitError):
        values = [float(value) for value in function(list(predictions), list(references))]
    problem = "" if all(map(math.isfinite, values)) else "gives a number that is not finite"
    if len(values) != len(predictions):
        problem = f"gives {len(values)} numbers for {len(predictions)} answers"
    if problem:
        raise MmitError(problem, where=f"metric {name}", remedy=f"Return {OWN}.")
    return mean_score(name, "own", values, groups=groups, seed=seed)
