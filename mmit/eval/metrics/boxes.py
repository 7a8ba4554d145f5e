"""Intersection over union of a box in the answer with the box that is meant.

In: predictions and references as texts, one per question. Out: a Score. A box is the first four numbers of a text in
any of the ways that `mmit.data.formats.boxes` writes: "[125, 203, 500, 734]" of 0 to 1000, "[0.125, 0.203, 0.500,
0.734]" of 0 to 1, "(125,203),(500,734)" with a family's tokens around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmit.errors import MmitError
from mmit.eval.metrics.score import Score, check_lengths, mean_score, pick
from mmit.sections import brief

Box = tuple[float, float, float, float]
# Nothing but brackets, commas and spaces lies between the numbers of one box.
_BOX = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)" + r"[\s,()\[\]]+(\d+(?:\.\d+)?)" * 3 + r"(?![\d.]*\d)")
# The IoU from which an answer is right, None for the IoU itself. 0.5 is RefCOCO's rule.
IOU: dict[str, float | None] = {"mean": None, "50": 0.5, "75": 0.75}


def box_of(text: str) -> Box | None:
    """Return the first box of a text in shares of the picture, None where there is none or its corners are swapped.

    Numbers that are all written with a point, or are 0 and 1, are shares; all others are of 0 to 1000.
    """
    found = _BOX.search(text)
    if found is None:
        return None
    texts = found.groups()
    shares = all("." in number or number in ("0", "1") for number in texts)
    left, top, right, bottom = (float(number) / (1 if shares else 1000) for number in texts)
    return (left, top, right, bottom) if left <= right <= 1 and top <= bottom <= 1 else None


def box_meant(reference: Any, *, where: str) -> Box:
    """Return the box of a reference. Raises MmitError if it has none."""
    box = box_of(reference) if isinstance(reference, str) else None
    if box is None:
        remedy = "Write [left, top, right, bottom] of 0 to 1000, or of 0 to 1 with points."
        raise MmitError(f"the reference has no box: {brief(reference)}", where=where, remedy=remedy)
    return box


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over the union of two boxes; 1 for two that are the same, also without an area."""
    if one == other:
        return 1.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union > 0 else 0.0


def iou(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    profile: str = "mean",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Intersection over union of the first box of each answer with that of its reference; 0 for an answer without one.

    Profiles: mean (the IoU itself), 50 (the share of at least 0.5, as RefCOCO counts), 75 (of at least 0.75).

    Args:
        predictions: (n,) answers.
        references: (n,) texts with a box, [left, top, right, bottom] of 0 to 1000, or of 0 to 1 with points.
        profile: mean, 50 or 75.
        groups: (n,) group of each answer; each group gets a Score of its own. seed: of the bootstrap interval.

    Returns:
        the mean over answers; `details["parsed"]` has the box (4,) of each answer, None where it has none.

    Raises:
        MmitError: unknown profile, columns of different length, or a reference without a box.
    """
    least = pick(IOU, profile, where="iou")
    check_lengths("iou", predictions, references=references)
    parsed = [box_of(text) for text in predictions]
    values = []
    for row, (box, reference) in enumerate(zip(parsed, references, strict=True)):
        meant = box_meant(reference, where=f"iou: question {row}")
        value = 0.0 if box is None else overlap(box, meant)
        values.append(value if least is None else float(value >= least))
    missing = [box is None for box in parsed]
    return mean_score("iou", profile, values, parsed=parsed, unparsed=missing, groups=groups, seed=seed)
