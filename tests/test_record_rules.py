"""Rules for what stands in a record: each says what is wrong, and nothing of what is sound."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mmit.record_rules import (
    BOX_TOKENS,
    ROLES,
    SOUND,
    JsonReader,
    json_problem,
    order_problem,
    short,
    source_problem,
    text_problem,
    token_problem,
    tool_calls_problem,
    weight_problem,
)


def sound(roles: tuple[str, ...]) -> bool:
    before = [None, *roles]
    return all(order_problem(n, role, before[n - 1]) == SOUND for n, role in enumerate(roles, 1))


def test_of_all_orders_of_four_turns_those_pass_that_alternate() -> None:
    passed = {"".join(role[0] for role in roles) for roles in itertools.product(ROLES, repeat=4) if sound(roles)}
    assert passed == {"uaua", "uatt", "uata", "suau", "suat"}


def test_a_turn_out_of_order_is_said_with_what_belongs_there() -> None:
    assert order_problem(2, "user", "user")[0] == "turn 2 is the user's where the assistant's belongs"
    assert order_problem(3, "assistant", "assistant")[0].endswith("where the user's or the tool's belongs")
    problem, remedy = order_problem(2, "tool", "user")
    assert problem.startswith("turn 2 is a tool's") and "called the tool" in remedy
    assert order_problem(2, "system", "user")[1] == "Only the first turn may be the system's: move it."


@pytest.mark.parametrize("limit", [8, 20])
@pytest.mark.parametrize("text", ["", "a" * 8, "a" * 30, "\n" * 19, "é\t" * 40, "/a/long/path/to/image.jpg"])
def test_a_value_is_shown_in_one_line_whose_end_is_kept(text: str, limit: int) -> None:
    line = short(text, limit)
    assert len(line) <= limit and "\n" not in line
    assert line.startswith("...") if len(text) > limit else True
    assert text.endswith("jpg") is line.endswith("jpg")


def test_a_key_that_comes_twice_is_noted_where_it_is_asked_for() -> None:
    text = '{"a": 1, "b": {"c": 1, "c": 2}}'
    reader = JsonReader()
    assert reader.whole(text) == ({"a": 1, "b": {"c": 2}}, "c")
    assert reader.whole('{"a": 1}') == ({"a": 1}, "")  # of the value before nothing is left
    assert reader.at(f"[{text}]", 1) == ({"a": 1, "b": {"c": 2}}, 1 + len(text), "c")
    assert JsonReader(note=False).whole(text)[1] == ""


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (text_problem("ok 😀"), ""),
        (text_problem(None), "a text part that is a NoneType"),
        (text_problem("ab\ud800"), "half of a surrogate pair at character 2"),
        (token_problem(BOX_TOKENS[0], True), ""),
        (token_problem("<s>", True), "a token that marks no box: '<s>'"),
        (token_problem("<box>", 1), "a text whose token is '1'"),
        (source_problem("a/b.jpg"), ""),
        (source_problem("C:/a.jpg"), ""),
        (source_problem(b""), "an image without a file"),
        (source_problem("https://x/a.jpg"), "an image that is a URL"),
        (source_problem("data:image/png;base64,xx"), "an image that is a URL"),
        (source_problem("a\0b"), "an image path that is not valid text"),
        (weight_problem(0), ""),
        (weight_problem(True), "a weight of 'True'"),
        (weight_problem(float("inf")), "a weight of 'inf'"),
        (weight_problem(-0.5), "a negative weight: -0.5"),
        (json_problem({"a": [1, None, "é"]}, "meta with"), ""),
        (json_problem({"a": (1,)}, "meta with"), "meta with what JSON cannot keep"),
        (json_problem({1: 2}, "meta with"), "meta with what JSON cannot keep"),
        (json_problem(float("nan"), "meta with"), "meta with what JSON cannot keep"),
        (tool_calls_problem([{"function": {"name": "f", "arguments": "{}"}}]), ""),
        (tool_calls_problem([{"function": {"name": "f"}}, {"function": {"name": ""}}]), "tool call 2 without a"),
        (tool_calls_problem([{"function": {"name": "f", "arguments": 3}}]), "tool call 1 whose arguments are '3'"),
    ],
)
def test_each_value_is_sound_or_named(found: tuple[str, str], told: str) -> None:
    assert found == SOUND if not told else found[0].startswith(told) and found[1]


def test_lists_in_lists_without_end_are_no_json() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (endless, deep):
        assert json_problem(value, "meta with")[0].startswith("meta with what JSON cannot keep")
