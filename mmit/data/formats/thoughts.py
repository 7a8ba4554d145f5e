"""Thoughts in the text of an answer, between marks that the user names: "<thinking>...</thinking>".

What stands between <think> and </think> is a thought without being asked for. Sets of other models mark theirs
otherwise, and no list of marks is complete, so the option names them. A thought read here is the turn's `thinking`: the
model's chat template writes it with its own marks, cuts it where it cuts thoughts, and the loss weighs it as one.
Marks that nobody named stay text, and `mmit data check` warns of the common ones.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mmit.data.thoughts import marks_of
from mmit.errors import RecordError
from mmit.records import Part, Record, Text, Turn

OPTIONS = {"thoughts": "marks around the thought that opens an answer, as <thinking>...</thinking>"}
# How answers of published sets open a thought; for the warning alone.
COMMON = re.compile(
    r"\s*(<(?:thinking|thought|thoughts|reasoning|seed:think)>|\[THINK\]|<\|begin_of_thought\|>|<\|START_THINKING\|>"
    r"|<\|channel\|>(?:analysis|thought)\b|\u25c1think\u25b7)"
)


def with_thoughts(record: Record, thoughts: str | None) -> Record:
    """Take the thoughts that open answers out of their text.

    Args:
        thoughts: see OPTIONS; None leaves the record as it is.

    Raises:
        ConfigError: no pair of marks. RecordError: a thought that does not end, a second one, or one in weighted spans.
    """
    if thoughts is None:
        return record
    opening, closing = marks_of(thoughts)
    turns = [
        _split(turn, number, opening, closing) if turn.role == "assistant" else turn
        for number, turn in enumerate(record.turns, 1)
    ]
    worse = record.rejected and _split(record.rejected, len(turns), opening, closing)
    return replace(record, turns=tuple(turns), rejected=worse)


def check_option(thoughts: str | None) -> None:
    """Raise ConfigError for a value that is none of OPTIONS."""
    if thoughts is not None:
        marks_of(thoughts)


def _split(turn: Turn, number: int, opening: str, closing: str) -> Turn:
    first = turn.parts[0] if turn.parts else None
    if not isinstance(first, Text) or not first.text.lstrip().startswith(opening):
        return turn
    if turn.thinking is not None:
        problem = f"turn {number} (assistant) has a thought beside its text and one in it, after {opening}"
        raise RecordError(problem, remedy="Keep one of them.")
    # Spans are counted in the whole text: taking a part of it out would move the weights of the rest.
    if first.weight is not None:
        problem = f"turn {number} (assistant) has a thought after {opening} in spans of their own weight"
        raise RecordError(problem, remedy="Write it as reasoning_content, and weigh it by data.loss.think.")
    # The first closing mark ends it, as a model's own template would have it; a second thought stays text.
    thought, end, answer = first.text.lstrip()[len(opening) :].partition(closing)
    if not end:
        problem = f"turn {number} (assistant) opens a thought with {opening}, and no {closing} ends it"
        raise RecordError(problem, remedy="Complete the answer, or leave the row out.")
    rest: tuple[Part, ...] = (Text(answer.lstrip()), *turn.parts[1:])
    return replace(turn, thinking=thought.strip(), parts=rest)
