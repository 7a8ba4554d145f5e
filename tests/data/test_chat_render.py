"""Messages as a template reads them: contents as strings or lists, thoughts by three ways, calls as objects or JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmit.data.chat_render import (
    FIELD,
    FIELDS,
    INLINE,
    PART,
    SENTINEL,
    Extras,
    Failure,
    Outline,
    Refusal,
    Renderer,
    TooMuch,
    sentinel,
    writes_date,
)
from tests.data.small_tokenizers import family

CALLS = json.dumps([{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}])


def renderer(source: str = "", **more: Any) -> Renderer:
    return Renderer(source, family("byte_level"), args=more.pop("args", {}), date=more.pop("date", None))


def message(outline: Outline, *words: Any, **facts: Any) -> dict[str, Any]:
    one = renderer()
    for name, value in facts.items():
        setattr(one, name, value)
    (found,) = one.messages((outline,), words)
    return found


def test_sentinels_are_found_again_by_their_number() -> None:
    text = "a".join(sentinel(n) for n in (3, 0, 12))
    assert [int(match[1]) for match in SENTINEL.finditer(text)] == [3, 0, 12]
    assert sentinel(1) not in (sentinel(1).lower(), sentinel(1).upper())  # a template that changes case shows


@pytest.mark.parametrize(
    ("styles", "kinds", "content"),
    [
        ({}, "tt", "ab"),
        ({"user": "list"}, "tt", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        ({"user": "list"}, "it", [{"type": "image"}, {"type": "text", "text": "b"}]),
        ({"user": "string"}, "it", "b"),
    ],
)
def test_contents_are_of_the_style_of_their_role(styles: dict[str, Any], kinds: str, content: Any) -> None:
    words = [None if kind == "i" else word for kind, word in zip(kinds, "ab", strict=True)]
    assert message(Outline("user", kinds), *words, styles=styles)["content"] == content


def test_an_answer_with_an_image_is_a_list_where_users_write_lists() -> None:
    one = renderer()
    one.styles = {"user": "list", "assistant": "string"}
    assert one.style(Outline("assistant", "t")) == "string" and one.style(Outline("assistant", "ti")) == "list"


def test_a_thought_goes_where_the_template_reads_it() -> None:
    turn = Outline("assistant", "t", "k")
    inline = message(turn, "why", "so", thought=INLINE)
    assert inline == {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso"}
    assert message(turn, "why", "so", thought=FIELD) == {
        "role": "assistant", "content": "so", **dict.fromkeys(FIELDS, "why")
    }  # fmt: skip
    part = message(turn, "why", "so", thought=PART)["content"]
    assert part == [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "so"}]
    # A thought that was written in the text stays there, with its own marks, as one text.
    own = turn._replace(inline=("<think>", "</think>"))
    assert message(own, "why", "so", thought=FIELD)["content"] == "<think>why</think>so"
    listed = message(own, "why", "so", thought=FIELD, styles={"user": "list"})["content"]
    assert listed == [{"type": "text", "text": "<think>why</think>so"}]
    assert "<think>" not in str(message(turn._replace(thought=None), "so"))


def test_calls_are_objects_and_their_mark_stands_before_the_name() -> None:
    turn = Outline("assistant", "t", calls=CALLS, more=(("tool_call_id", "7"),))
    found = message(turn, "so", "MARK")
    assert found["tool_calls"][0]["function"] == {"name": "MARKf", "arguments": {"x": 1}}
    assert found["tool_call_id"] == "7"
    text = message(turn, "so", "", calls_as_text=True)["tool_calls"][0]["function"]
    assert text == {"name": "f", "arguments": '{"x": 1}'}
    broken = turn._replace(calls=CALLS.replace(r"{\"x\": 1}", "no json"))
    assert message(broken, "so", "")["tool_calls"][0]["function"]["arguments"] == "no json"


def test_a_rendering_has_the_tokens_tools_arguments_and_the_day() -> None:
    source = "{{ eos_token }}{{ tools[0].n }}{{ a }}{{ b }}{{ add_generation_prompt }}{{ strftime_now('%Y') }}"
    one = renderer(source, args={"a": 1, "b": 2}, date="2001-02-03")
    assert one.render([], Extras('[{"n": 5}]', '{"b": 3}'), prompt=True) == "<|eos|>513True2001"
    assert one.renders == 1 and writes_date(source) and not writes_date("x")


@pytest.mark.parametrize(
    ("source", "error", "problem"),
    [
        ("{{ raise_exception('no system') }}", Refusal, "no system"),
        ("{{ messages[0].nothing.more }}", Failure, "the template fails"),
        ("{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}", Failure, "the template fails"),
    ],
)
def test_a_refusal_is_told_from_a_failure(source: str, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem) as caught:
        renderer(source).render([{"role": "user"}], Extras())
    assert not (error is Refusal and isinstance(caught.value, (Failure, TooMuch)))
