"""Calls and results in blocks: read as the same conversation in OpenAI's messages is."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.data.formats import find_format
from mmit.errors import RecordError

USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
CALL = {"id": "t1", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOLD = {"role": "tool", "tool_call_id": "t1", "content": "sunny"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def read(*messages: dict[str, Any], **keys: Any) -> Any:
    return find_format("messages")({"messages": list(messages), **keys})


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_blocks_are_the_calls_and_results_of_openai() -> None:
    asked, ends = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Sun."}
    other = {**USE, "id": "t2", "input": {}}
    ours = read(
        asked,
        {"role": "assistant", "content": [text("I look."), USE, other]},
        {"role": "user", "content": [RESULT, {**RESULT, "tool_use_id": "t2", "content": [text("rain")]}, text("So?")]},
        ends,
        tools=[{"name": "weather", "description": "d", "input_schema": SCHEMA}],
    )
    theirs = read(
        asked,
        {
            "role": "assistant",
            "content": [text("I look.")],
            "tool_calls": [CALL, {"id": "t2", "function": {"name": "weather", "arguments": {}}}],
        },
        TOLD,
        {**TOLD, "tool_call_id": "t2", "content": [text("rain")]},
        {"role": "user", "content": [text("So?")]},
        ends,
        tools=[{"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}],
    )
    assert ours == theirs and [turn.role for turn in ours.turns] == "user assistant tool tool user assistant".split()


def test_a_call_alone_an_empty_result_and_keys_beside_it() -> None:
    record = read(
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "is_error": True}]},
        {"role": "assistant", "content": "I cannot say."},
    )
    record.validate()
    assert record.turns[1].parts == () and record.turns[2].role == "tool" and record.turns[2].text == ""
    assert {"is_error": True} in record.meta["turn_keys"]


def test_keys_of_a_message_of_results_alone_are_kept() -> None:
    asked, used = {"role": "user", "content": "q"}, {"role": "assistant", "content": [USE]}
    told = {"role": "user", "content": [RESULT], "source": "log"}
    assert {"source": "log"} in read(asked, used, told, {"role": "assistant", "content": "a"}).meta["turn_keys"]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "assistant", "content": [USE], "tool_calls": [CALL]}, "in its content and in 'tool_calls'"),
        ({"role": "user", "content": [USE]}, "message 1 of 'user' has a tool_use"),
        ({"role": "assistant", "content": [RESULT]}, "message 1 of 'assistant' has a tool_result"),
        ({"role": "assistant", "content": [{**USE, "input": "Rome"}]}, "a tool_use of message 1 has no name"),
        ({"role": "assistant", "content": [{**USE, "name": None}]}, "a tool_use of message 1 has no name"),
        ({"role": "assistant", "content": [{"type": "server_tool_use"}]}, "has a part of type 'server_tool_use'"),
    ],
)
def test_blocks_in_a_wrong_place(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(message)
    assert problem in caught.value.problem and caught.value.remedy


def test_a_schema_with_parameters_of_its_own_stays() -> None:
    tool = {"name": "weather", "parameters": SCHEMA, "input_schema": SCHEMA}
    record = read({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, tools=[tool])
    assert record.tools == (tool,)
