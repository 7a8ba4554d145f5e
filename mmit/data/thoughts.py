"""Thoughts in answers: what a model thinks before it answers is no part of what is scored or learnt."""

from __future__ import annotations

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
