"""Records whose answer is one of a few choices, for a loss over the choices in place of the vocabulary.

Reads `meta["choices"]` of a record, the answers it chooses from (builds from templates write them), and
`meta["shares"]`, numbers that add up to 1. In: a record. Out: one record for each choice, which differ in their last
answer alone, and one whose loss is on its question. All are samples of one unit, so that they lie in one row and share
all tokens before the answer; `models.head` joins their losses. Without shares the record's own answer has all.
Refuses fewer than two choices, one that occurs twice or is empty, and an answer that is not among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmit.errors import RecordError
from mmit.records import Record, Text, Turn, weighed

CHOICES, SHARES = "choices", "shares"  # keys of a record's meta
_LAYOUT = 'Write meta: {"choices": ["red", "blue"], "shares": [0.9, 0.1]}; shares can be left out.'


def choices_of(record: Record) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the answers a record chooses from and the share of each. Raises RecordError."""
    answers: Any = record.meta.get(CHOICES)
    if answers is None:
        raise RecordError("names no choices for its answer", where=record.where, remedy=_LAYOUT)
    if not _is_list(answers, str) or len(answers) < 2:
        raise RecordError("'choices' holds no list of two answers or more", where=record.where, remedy=_LAYOUT)
    for number, answer in enumerate(answers):
        if not answer.strip() or answer in answers[:number]:
            problem = f"choice {number + 1} is empty" if not answer.strip() else f"the choice '{answer}' occurs twice"
            raise RecordError(problem, where=record.where, remedy="Give each choice a text of its own.")
    shares: Any = record.meta.get(SHARES)
    if shares is None:
        own = record.turns[-1].text
        if own not in answers:
            problem = f"the answer '{own[:80]}' is not among the choices {', '.join(answers)[:200]}"
            raise RecordError(problem, where=record.where, remedy="Fix the answer, or give the choices shares.")
        shares = [float(answer == own) for answer in answers]
    if not _is_list(shares, (int, float)) or len(shares) != len(answers):
        problem = f"'shares' is no list of {len(answers)} numbers, one for each choice"
        raise RecordError(problem, where=record.where, remedy=_LAYOUT)
    if not all(share >= 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-3):
        problem = f"the shares of its choices add up to {sum(shares):g}, or one is below 0"
        raise RecordError(problem, where=record.where, remedy="Give shares of 0 or more that add up to 1.")
    return tuple(answers), tuple(float(share) for share in shares)


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is(item, kind) for item in value)


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def branches(record: Record, *, question: bool) -> list[tuple[Record, float | None]]:
    """Return the record once for each choice, with its share, loss on the last answer alone.

    Args:
        question: add the record with loss on the text before the answer alone; it has no share.
    """
    answers, shares = choices_of(record)
    before = tuple(weighed(turn, 0.0) for turn in record.turns[:-1])
    found: list[tuple[Record, float | None]] = []
    for answer, share in zip(answers, shares, strict=True):
        found.append((replace(record, turns=(*before, Turn("assistant", (Text(answer),), weight=1.0))), share))
    if question:
        asked = tuple(weighed(turn, 1.0) for turn in record.turns[:-1])
        found.append((replace(record, turns=(*asked, replace(found[0][0].turns[-1], weight=0.0))), None))
    return found
