"""Thoughts in answers: what a model thinks before it answers is no part of what is scored or learnt."""

from __future__ import annotations

from functools import lru_cache

from mmit.errors import ConfigError, located
from mmit.records import short

OPEN, CLOSE = "<think>", "</think>"


def split_thought(answer: str) -> tuple[str, str]:
    """Split an answer into (thought, the answer proper).

    A prompt may end in <think>, so the answer then begins inside the thought. One that does not end before the last
    token leaves no answer.
    """
    before, found, after = answer.rpartition(CLOSE)
    if found:
        return before.replace(OPEN, "", 1).strip(), after.strip()
    if answer.lstrip().startswith(OPEN):
        return answer.lstrip()[len(OPEN) :].strip(), ""
    return "", answer


@lru_cache(maxsize=16)
def marks_of(thoughts: str, name: str = "option thoughts") -> tuple[str, str]:
    """Read "<thinking>...</thinking>" as (opening, closing). Raises ConfigError, which calls it `name`."""
    opening, dots, closing = thoughts.partition("...") if isinstance(thoughts, str) else ("", "", "")
    if not (opening.strip() and dots and closing.strip()) or "..." in closing:
        remedy = "Write both marks with three dots between: <thinking>...</thinking>."
        raise ConfigError(f"{name} is '{short(thoughts)}'", remedy=remedy)
    return opening.strip(), closing.strip()


def checked_marks(thoughts: str | None) -> str | None:
    """Check the marks of thoughts; raises ConfigError."""
    if thoughts is not None:
        with located("model.chat.thoughts"):
            marks_of(thoughts, "thoughts")
    return thoughts
