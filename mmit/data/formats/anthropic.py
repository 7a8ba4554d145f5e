"""Tool calls and results as blocks of a message, as Anthropic's API writes them, in the form of OpenAI's messages.

{"type": "tool_use", "id", "name", "input"} in an assistant's content becomes one of its `tool_calls`; {"type":
"tool_result", "tool_use_id", "content"} in a user's a tool message of its own, before what else the user says. Other
blocks stay for the importer of messages to read or refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmit.errors import RecordError

_BLOCKS = {"tool_use": "assistant", "tool_result": "user"}


def without_blocks(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with calls and results in the places that OpenAI gives them; others as they are.

    Raises:
        RecordError: a block in a message of the wrong role, or without its name.
    """
    plain: list[dict[str, Any]] = []
    for number, item in enumerate(items, 1):
        content = item.get("content")
        blocks = [part for part in content if _kind(part) in _BLOCKS] if isinstance(content, list) else []
        if not isinstance(content, list) or not blocks:
            plain.append(item)
            continue
        for block in blocks:
            if item.get("role") != (role := _BLOCKS[block["type"]]):
                problem = f"message {number} of {item.get('role')!r} has a {block['type']}"
                raise RecordError(problem, remedy=f"It belongs to a message of the {role}.")
        others = [part for part in content if _kind(part) not in _BLOCKS]
        if _kind(blocks[0]) == "tool_use":
            if item.get("tool_calls"):
                problem = f"message {number} has calls in its content and in 'tool_calls'"
                raise RecordError(problem, remedy="Keep one of them.")
            plain.append({**item, "content": others or None, "tool_calls": [_call(block, number) for block in blocks]})
            continue
        beside = {} if others else item  # keys of the message are those of what else the user says
        plain += [{**beside, **_result(block)} for block in blocks]
        if others:
            plain.append({**item, "content": others})
    return plain


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _call(block: Mapping[str, Any], number: int) -> dict[str, Any]:
    if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), Mapping):
        problem = f"a tool_use of message {number} has no name or no input"
        raise RecordError(problem, remedy='Write {"type": "tool_use", "id": "...", "name": "...", "input": {...}}.')
    return {"id": block.get("id"), "function": {"name": block["name"], "arguments": block["input"]}}


def _result(block: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in block.items() if key not in ("type", "tool_use_id", "content")}
    content = block.get("content")  # None: the tool returned nothing
    return {
        **kept,
        "role": "tool",
        "tool_call_id": block.get("tool_use_id"),
        "content": "" if content is None else content,
    }
