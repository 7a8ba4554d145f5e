"""Turns as the chat formats read them: texts joined, a thought in the text taken for what it is, words left out.

In: records or bare turns. Out: `Said` for the formats, `Outline` and `Extras` for templates. Knows no tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from mmit.data.chat_builtin import Said, Words
from mmit.data.chat_render import Extras, Outline
from mmit.records import Image, Record, Text, Turn, is_plain

Talk = Record | Sequence[Turn]
OwnThought = Callable[[], tuple[tuple[str, str], ...]]  # pairs of marks that open and close a thought, besides <think>
_THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)", re.DOTALL)


def no_marks() -> tuple[tuple[str, str], ...]:
    """No marks but <think>."""
    return ()


def as_record(talk: Talk) -> Record:
    """A record, or bare turns as one."""
    return talk if isinstance(talk, Record) else Record(tuple(talk))


def has_thought(record: Record, marks: OwnThought = no_marks) -> bool:
    """Tell whether an answer of a record begins with a thought that says something; see `flat`."""
    answers = (turn for turn in record.turns if turn.role == "assistant")
    return any(
        (turn.thinking or (may_open(turn.text, marks) and flat(turn, 0, marks).thought) or "").strip()
        for turn in answers
    )


def may_open(text: str, marks: OwnThought) -> bool:
    """Whether a text may begin with a thought; the marks are asked for only where it may."""
    if "<think>" in text:
        return True
    first = text.lstrip()[:1]
    if not first or first.isalnum():
        return False
    return text.lstrip().startswith(tuple(opening for opening, _ in marks()))


def flat(turn: Turn, number: int, marks: OwnThought = no_marks) -> Said:
    """Join neighbouring texts, so that how a text was cut into parts makes no difference; drop empty ones.

    A thought at the beginning of an assistant's text, between <think> and </think>, is taken for what it is; so is one
    between a pair that `marks` gives.
    """
    # Most turns of most data are one plain text; they take this short way.
    only = turn.parts[0] if len(turn.parts) == 1 else None
    if (
        isinstance(only, Text)
        and only.weight is None
        and not only.token
        and is_plain(turn)
        and not (turn.role == "assistant" and may_open(only.text, marks))
    ):
        return Said(turn.role, (Words(only.text),) if only.text else (), number)
    parts: list[Words | None] = []
    for part in turn.parts:
        if isinstance(part, Image):
            parts.append(None)
        elif part.text:
            before = parts.pop() if parts and parts[-1] is not None else Words("")
            assert before is not None
            text = before.text + part.text
            # A control token is a part of its own in the record; in the joined text its place is what is left of that.
            tokens = (*before.marks, (len(before.text), len(text))) if part.token else before.marks
            parts.append(Words(text, (*before.spans, (len(text), part.weight)), tokens))
    for place, words in enumerate(parts):
        if words is not None and all(weight is None for _, weight in words.spans):
            parts[place] = words._replace(spans=())
    # A thought in the turn's own field goes before one in its text: the text then is all answer.
    thought, inline = turn.thinking, None
    first = parts[0] if parts and turn.role == "assistant" and thought is None else None
    found = _THOUGHT.match(first.text) if first is not None else None
    own = False  # between other marks than <think>, which the format replaces by its own
    if first is not None and found is None and may_open(first.text, marks):
        found = next((match for pair in marks() if (match := _between(*pair).match(first.text))), None)
        own = found is not None
    if found is not None and first is not None and not first.spans and _behind(first, found.end()):
        # The whitespace around <think> is kept: a template that shows thoughts inline writes them as they were.
        thought, inline = found[2], None if own else (found[1], found[3])
        rest = first.text[found.end() :]
        # Marks of boxes count from the text's beginning, which has moved.
        parts[:1] = [Words(rest, marks=first.marks_from(found.end()))] if rest else []
    more = tuple((key, value) for key in ("name", "tool_call_id") if (value := getattr(turn, key)) is not None)
    return Said(turn.role, tuple(parts), number, thought, inline, tuple(turn.tool_calls), more)


@lru_cache(maxsize=16)
def _between(opening: str, closing: str) -> re.Pattern[str]:
    return re.compile(rf"(\s*{re.escape(opening)}\s*)(.*?)(\s*{re.escape(closing)}\s*)", re.DOTALL)


def _behind(words: Words, end: int) -> bool:
    return not words.marks or words.marks[0][0] >= end


def outline_of(said: Said) -> Outline:
    """What of a turn a template is shown; a thought of nothing but whitespace is shown as it is."""
    thought = said.thought if said.thought is None or not said.thought.strip() else "k"
    kinds = "".join("i" if part is None else "t" for part in said.parts)
    calls = json.dumps([dict(call) for call in said.calls], ensure_ascii=False) if said.calls else ""
    return Outline(said.role, kinds, thought, said.inline, calls, said.more)


def extras_of(record: Record) -> Extras:
    """What a record has besides turns, as a template is given it."""
    tools = json.dumps([dict(tool) for tool in record.tools], ensure_ascii=False) if record.tools else ""
    return Extras(tools, json.dumps(dict(record.template_args)) if record.template_args else "")
