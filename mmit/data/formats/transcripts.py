"""Dialogues written as one text, the speakers' names in it: hh-rlhf, openassistant-guanaco, Glaive's function calls.

A name counts only as its set writes it, with the blank lines or marks before it, so that a name inside a sentence stays
text. Known limit: an answer that quotes a transcript in that very form is cut there, as in every reader of these sets.
Refuses a text that does not begin with a speaker, and a call that is not JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mmit.data.formats.chat import Dialogue, messages, said
from mmit.data.formats.common import Format, Row, id_of, rest, text_of
from mmit.errors import RecordError
from mmit.records import Record, short

_HH = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GUANACO = re.compile(r"\s*### (Human|Assistant):")
_GLAIVE = re.compile(r"(?:^|\n\n\n)(USER|ASSISTANT|FUNCTION RESPONSE):")
_ROLES = {"Human": "user", "Assistant": "assistant", "USER": "user", "ASSISTANT": "assistant"}
_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*$", re.DOTALL)
# Glaive writes the arguments as JSON in single quotes, which is no JSON.
_QUOTED = re.compile(r'^\{\s*"name":\s*("[^"]*"),\s*"arguments":\s*\'(.*)\'\s*\}$', re.DOTALL)
_END = "<|endoftext|>"


def is_guanaco(row: Mapping[str, Any]) -> bool:
    """Tell openassistant-guanaco's rows from text for pre-training by how the text begins."""
    return isinstance(row.get("text"), str) and row["text"].startswith("### Human:")


def is_hh(value: Any) -> bool:
    """Tell a dialogue of hh-rlhf from the text of an answer by its first speaker."""
    return isinstance(value, str) and value.startswith(("\n\nHuman:", "\n\nAssistant:"))


def hh_messages(value: str, key: str) -> list[Row]:
    """The messages of one of hh-rlhf's dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    return [{"role": _ROLES[name], "content": text} for name, text in _speakers(value, _HH, key)]


def guanaco(row: Row, *, image_root: str = "") -> Record:
    """openassistant-guanaco: {"text": "### Human: ...### Assistant: ..."}.

    Many rows end with a question that nobody answers. It goes to meta["dropped_last_turn"], so that drops can be
    counted.
    """
    turns: Dialogue = [said(_ROLES[name], text) for name, text in _speakers(text_of(row.get("text"), "text"), _GUANACO)]
    meta = rest(row, "text")
    if len(turns) > 1 and turns[-1].role == "user":
        meta["dropped_last_turn"] = turns.pop().text
    return Record(tuple(turns), id=id_of(row), meta=meta)


def glaive(row: Row, *, image_root: str = "") -> Record:
    """glaive-function-calling-v2: {"system": "SYSTEM: ... {schema} {schema}", "chat": "USER: ... ASSISTANT: ..."}.

    The schemas in the system text become the record's tools, `<functioncall>` a tool call, FUNCTION RESPONSE a tool
    turn.
    """
    told = text_of(row.get("system") or "", "system").removeprefix("SYSTEM:")
    told, brace, listed = told.partition("{")
    turns: list[Row] = [{"role": "system", "content": told.strip().removesuffix("-").strip()}] if told.strip() else []
    for name, text in _speakers(text_of(row.get("chat"), "chat"), _GLAIVE, "chat"):
        text = text.removesuffix(_END).strip()
        if name == "FUNCTION RESPONSE":
            turns.append({"role": "tool", "content": text})
            continue
        turn: Row = {"role": _ROLES[name], "content": text}
        if name == "ASSISTANT" and (found := _CALL.search(text)):
            turn = {**turn, "content": text[: found.start()].strip() or None, "tool_calls": [_call(found[1])]}
        turns.append(turn)
    return messages({**rest(row, "system", "chat"), "messages": turns, "tools": _schemas(brace + listed)})


def _speakers(text: str, pattern: re.Pattern[str], key: str = "text") -> list[tuple[str, str]]:
    """(speaker, what is said, stripped) in order; RecordError for a text that begins with none."""
    before, *found = pattern.split(text.strip())
    if before or not found:
        problem = f"'{key}' begins with '{short(text.strip())}', not with a speaker"
        raise RecordError(problem, remedy="Its turns begin with the names of speakers; import other texts as json.")
    return [(name, words.strip()) for name, words in zip(found[::2], found[1::2], strict=True)]


def _call(text: str) -> Row:
    quoted = _QUOTED.match(text)
    try:
        if quoted:
            return {"name": json.loads(quoted[1]), "arguments": json.loads(quoted[2])}
        return dict(json.loads(text))
    except (ValueError, TypeError):
        problem = f"a <functioncall> is '{short(text)}', not JSON"
        raise RecordError(problem, remedy='Write {"name": "...", "arguments": {...}}, or leave the row out.') from None


def _schemas(text: str) -> list[Any]:
    """The JSON objects that stand one after another in a text."""
    found, decode, text = [], json.JSONDecoder().raw_decode, text.strip()
    while text:
        try:
            value, end = decode(text)
        except ValueError as error:
            problem = f"a schema in 'system' is '{short(text)}', not JSON: {error}"
            raise RecordError(problem, remedy="Correct it, or leave the row out.") from None
        found.append(value)
        text = text[end:].strip()
    return found


FORMATS = {
    "guanaco": Format('openassistant-guanaco: "### Human: ...### Assistant: ..." in one text', guanaco),
    "glaive": Format("glaive-function-calling-v2: system and chat, each one text", glaive, detect=("system", "chat")),
}
