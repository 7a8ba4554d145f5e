"""Pairs and labels of published sets: the keys beside a conversation that say which answer is better, or how good.

In: a record whose meta still holds them. Out: the record with `rejected` or `label`. A pair is a chosen and a rejected
answer to one prompt; each may be a text, a message, or a whole conversation, whose prompt must then be the record's.
Refuses half a pair, prompts that differ, and what is no answer; equal answers are refused by the record itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmit.data.formats.keys import BAD_MARKS, FLAGS, MARKS, turn_extras, with_meaning
from mmit.data.formats.pictures import MARKER
from mmit.errors import RecordError
from mmit.records import Record, Text, Turn, short

CHOSEN = ("chosen", "chosen_response", "preferred_output", "positive_messages")
REJECTED = (
    *("rejected", "rejected_response", "rejected_messages", "rejected_answer", "rejected_output"),
    "rejected_conversations",
    *("non_preferred_output", "negative_messages", "negative_output", "negative_response"),
)
_GOOD_MARKS = ("desirable", "positive", "good", "chosen", "right", "true")
_ROLES = {
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_LAYOUT = 'Write the answer as a text, as {"role": "assistant", "content": "..."}, or as a list of messages.'
_WHOLE = 'A pair has both: {"prompt": "...", "chosen": "...", "rejected": "..."}.'


def read_keys(record: Record) -> Record:
    """Read what the importer left in the meta: preferences here, the other keys by `keys.with_meaning`."""
    if record.meta:
        record = _labelled(_paired(record))
    return with_meaning(record)


def _paired(record: Record) -> Record:
    meta = dict(record.meta)
    chosen, rejected = (_given(meta, names) for names in (CHOSEN, REJECTED))
    if not (chosen or rejected):
        return record
    answered = bool(record.turns) and record.turns[-1].role == "assistant"
    if not rejected or not (chosen or answered):
        key, other = (chosen, "rejected") if chosen else (rejected, "chosen")
        problem = f"'{key}' is half of a preference pair: the row has no '{other}' answer"
        raise RecordError(problem, remedy=_WHOLE)
    if chosen and answered:
        problem = f"the row has an answer, and another in '{chosen}'"
        raise RecordError(problem, remedy="Keep one of them.")
    # Sets with a list of messages put the better answer into it; those with a prompt keep both answers beside it.
    prompt = record.turns[:-1] if answered else record.turns
    turns = record.turns if answered else (*prompt, _answer(meta.pop(chosen), chosen, prompt))
    worse = _answer(meta.pop(rejected), rejected, prompt)
    return replace(record, turns=turns, rejected=worse, meta=meta)


def _given(meta: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The key among `names` that holds something, "" for none. Raises RecordError for two."""
    found = [name for name in names if meta.get(name) not in (None, "", [], {}, False)]
    if len(found) > 1:
        raise RecordError(f"the row has both '{found[0]}' and '{found[1]}'", remedy="Keep one of them.")
    return found[0] if found else ""


def _answer(value: Any, key: str, prompt: tuple[Turn, ...]) -> Turn:
    """Read an answer; of a whole conversation the last turn, its prompt being that of the record."""
    if isinstance(value, str):
        return Turn("assistant", (Text(value),))
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(item, Mapping) for item in messages):
        raise RecordError(f"'{key}' is '{short(value)}', not an answer", remedy=_LAYOUT)
    turns = [_message(item, key, number) for number, item in enumerate(messages, 1)]
    if turns[-1].role != "assistant":
        raise RecordError(f"'{key}' ends with the {turns[-1].role}'s turn", remedy="End it with the assistant's.")
    check_prompt(turns[:-1], prompt, key)
    return turns[-1]


def _message(item: Mapping[str, Any], key: str, number: int) -> Turn:
    speaker, content = ("from", "value") if "from" in item else ("role", "content")
    role = _ROLES.get(str(item.get(speaker)), "")
    if not role:
        problem = f"turn {number} of '{key}' is said by '{short(item.get(speaker))}'"
        raise RecordError(problem, remedy=f"valid: {', '.join(_ROLES)}.")
    text = _text(item.get(content))
    if text is None:
        raise RecordError(f"turn {number} of '{key}' holds '{short(item.get(content))}', not text", remedy=_LAYOUT)
    extras, _ = turn_extras(dict(item), role, number, used=(speaker, content))
    parts = (Text(text),) if text or not extras.get("tool_calls") else ()
    return Turn(role, parts, **extras)  # type: ignore[arg-type]


def _text(content: Any) -> str | None:
    """The text of a message: a string, or a list of text parts; pictures stand in the prompt alone."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return None
    texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def check_prompt(turns: list[Turn], prompt: tuple[Turn, ...], key: str) -> None:
    """Refuse a conversation whose turns before its answer are not the record's prompt; one of none is its answer."""
    # Without system turns, which sets often write on one side only, and without image markers and blanks at the ends.
    mine, theirs = ([(t.role, _plain(t)) for t in part if t.role != "system"] for part in (turns, prompt))
    if mine and mine != theirs:
        place = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False), 1) if a != b), None)
        where = f"turn {place} differs" if place else f"it has {len(mine)} turns and the other {len(theirs)}"
        problem = f"the prompt in '{key}' is not that of the other answer: {where}"
        raise RecordError(problem, remedy="Compare answers to one prompt, that differ in the last turn alone.")


def _plain(turn: Turn) -> str:
    return turn.text.replace(MARKER, "").strip()


def _labelled(record: Record) -> Record:
    """Read the mark of an answer: true, false, "desirable", "undesirable", ...; other values stay in the meta."""
    if not record.turns or record.turns[-1].role != "assistant" or record.rejected is not None:
        return record
    meta, found = dict(record.meta), dict[str, bool]()
    for key in MARKS:
        verdict = _verdict(key, meta.get(key))
        if verdict is not None:
            found[key] = verdict
            del meta[key]
    if not found:
        return record
    # Several marks may say the same; a verdict that nobody can tell must not be learned.
    if len(set(found.values())) > 1:
        told = " and ".join(f"{key} ({str(value).lower()})" for key, value in found.items())
        raise RecordError(f"the row has {told}, which contradict each other", remedy="Keep one of them.")
    return replace(record, meta=meta, label=next(iter(found.values())))


def _verdict(key: str, value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    # 0 and 1 are a verdict only under keys that are flags: elsewhere they may be a score or a count.
    if key in FLAGS and isinstance(value, int) and value in (0, 1):
        return value == 1
    word = value.strip().lower() if isinstance(value, str) else ""
    return True if word in _GOOD_MARKS else False if word in BAD_MARKS else None
