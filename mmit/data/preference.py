"""Preference data: a record with two answers, or with a verdict on its one, as the conversations that are compared.

Owns which records a method learns from, how they become plain conversations in which the compared answer alone carries
loss, and `Compared`: which targets of a row belong to which answer. The two answers of a pair share image and prompt in
a row, as branches of one tree (`packing.py`). Knows no loss formula and no model.

Letters: B comparisons in a micro-batch, S supervised targets, U units of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text, weighed

if TYPE_CHECKING:
    from mmit.data.loader import MicroBatch
    from mmit.data.packing import Sample

Compares = Literal["", "pairs", "labels"]  # what a method learns from: plain answers, pairs, answers with a verdict
METHODS: dict[str, Compares] = {"sft": "", "choices": "", "dpo": "pairs", "orpo": "pairs", "kto": "labels"}


def conversations(record: Record, compares: Compares) -> list[Record]:
    """Return the plain records to tokenise: of a pair chosen and rejected, else the one answer.

    In what is compared, the last turn alone carries loss. Raises RecordError, placed at the record, for one of another
    kind than the method learns from, for an image in a compared answer, and for weights of its parts, which no method
    has.
    """
    kind, where = kind_of(record), record.where
    if not compares:
        if kind == "pairs":
            remedy = "Set train.objective.kind=dpo or orpo, or take the rejected answer off."
            raise RecordError(
                "is a preference pair, of which plain tuning would learn one half", where=where, remedy=remedy
            )
        if record.label is False:
            remedy = "Set train.objective.kind=kto, or leave these rows out."
            problem = "has an answer that is labelled bad, and plain tuning would learn it"
            raise RecordError(problem, where=where, remedy=remedy)
        # A good label says no more than that the answer may be learned, which plain tuning does anyway.
        return [record if kind == "" else replace(record, label=None)]
    if kind != compares:
        problem, remedy = _other(kind, compares)
        raise RecordError(problem, where=where, remedy=remedy)
    # Only the last answer is compared: earlier ones are the same in both, and their losses would cancel.
    prompt = tuple(weighed(turn, 0.0) for turn in record.turns[:-1])
    answers = [record.turns[-1], *([record.rejected] if record.rejected is not None else [])]
    for answer in answers:
        if any(isinstance(part, Image) for part in answer.parts):
            remedy = "Answers that are compared are text."
            raise RecordError("a compared answer has an image", where=where, remedy=remedy)
        # A weight of 1 is what they have without one. Any other would weigh tokens within a sum whose difference is
        # compared.
        given = {answer.weight, *(part.weight for part in answer.parts if isinstance(part, Text))} - {None, 1}
        if given:
            remedy = "Weigh the whole record: its weight multiplies the loss of the comparison."
            raise RecordError("a compared answer has loss weights of its own", where=where, remedy=remedy)
    return [replace(record, turns=(*prompt, answer), rejected=None, label=None) for answer in answers]


def kind_of(record: Record) -> Compares:
    """What a record can be compared by."""
    return "pairs" if record.rejected is not None else "labels" if record.label is not None else ""


def _other(kind: Compares, compares: Compares) -> tuple[str, str]:
    """Problem and remedy of a record of one kind under a method that learns from another."""
    have = {"": "has one answer and no verdict on it", "pairs": "is a preference pair", "labels": "has a label"}[kind]
    wants = {"pairs": "pairs (chosen and rejected)", "labels": "answers with a label (true, false)"}[compares]
    use = {"": "sft", "pairs": "dpo or orpo", "labels": "kto"}[kind]
    return f"{have}, and this method learns from {wants}", f"Set train.objective.kind={use}, or remove such rows."


@dataclass
class Compared:
    """What the losses of a micro-batch are compared by; plain values, so that it travels between processes.

    Attributes:
        units: (B,) of the data; -1 in a row that only keeps ranks in step.
        records: (B,) their numbers. weights: (B,) of their losses. good: (B,) verdicts; True of pairs.
        lengths: targets of each answer, in the order of the row's losses: B of labels, 2 B of pairs (chosen, rejected).
        mismatched: prompts of these units with answers of others, from which KTO estimates how far the model has moved;
            its `compared` has the same units.
    """

    units: list[int]
    records: list[int]
    weights: list[float]
    good: list[bool]
    lengths: list[int]
    mismatched: MicroBatch | None = None


IDLE = Compared([-1], [0], [0.0], [True], [1])


def compared(samples: Sequence[Sequence[Sample]], units: Sequence[int], good: Sequence[bool]) -> Compared:
    """Say which targets of a row belong to which answer, given the answers of each unit in the order of the row."""
    # Contract: the answers of a unit are neighbours, chosen before rejected, in the order in which the row has them.
    flat = [sample for answers in samples for sample in answers]
    return Compared(
        list(units),
        [answers[0].record for answers in samples],
        [max(answers[0].weights) for answers in samples],
        list(good),
        # From the second token on: nothing predicts the first, so it has no loss in the row.
        [sum(weight > 0 for weight in sample.weights[1:]) for sample in flat],
    )


def mates(count: int) -> np.ndarray:
    """(U,) for each unit another one, whose answer is put after its prompt: one cycle through all in a mixed order.

    TRL takes the row before in the batch; a fixed cycle over the data means the same, and lets the reference be
    computed once. Mixed, because neighbours in a file often are answers to one prompt. Raises ConfigError for one unit.
    """
    if count < 2:
        problem = "kto compares the answers of different records, and there is only one"
        raise ConfigError(problem, where="data", remedy="add records, or set train.objective.kind to another method")
    order = np.random.default_rng(0).permutation(count)
    found = np.empty(count, dtype=np.int64)
    # One cycle, so that nobody is paired with itself and every answer is used once.
    found[order] = np.roll(order, 1)
    return found


def mismatch(sample: Sample, other: Sample, *, max_length: int) -> Sample:
    """The prompt of one sample with the answer of another; cut at `max_length` tokens, as TRL does."""
    begin, theirs = _answer(sample), _answer(other)
    ids = (*sample.ids[:begin], *other.ids[theirs:])
    weights = (*([0.0] * begin), *(float(weight > 0) for weight in other.weights[theirs:]))
    most = max_length - sum(sample.widths) + len(sample.widths)
    return replace(sample, ids=ids[:most], weights=weights[:most])


def _answer(sample: Sample) -> int:
    """Where the compared answer begins: its first supervised token."""
    return next(place for place, weight in enumerate(sample.weights) if weight > 0)
