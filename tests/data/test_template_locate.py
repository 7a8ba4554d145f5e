"""Sentinels in a rendered template: each content is found where it stands, and one that moved or vanished is named."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.data.chat_render import FIELD, INLINE, Extras, Outline, Renderer
from mmit.data.template_locate import (
    ANSWER,
    ASK,
    NO_EXTRAS,
    TALK,
    Item,
    Locator,
    common,
    find_styles,
    find_thought,
    gaps_of,
    items_of,
)
from mmit.errors import ConfigError, RecordError
from tests.data.small_tokenizers import family

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
STRINGS = LOOP % "<{{ m.role }}>{{ m.content }};"
PARTS = LOOP % ("<{{ m.role }}>{% for p in m.content %}{{ '[IMG]' if p.type == 'image' else p.text }}{% endfor %};")
IMAGE: Any = (Outline("user", "it"), ANSWER)


def locator(source: str, *, styles: bool = True, image_token: str | None = None) -> Locator:
    tokenizer = family("byte_level")
    found = Locator(Renderer(source, tokenizer, args={}, date=None), where="template")
    if styles:
        find_styles(found, tokenizer, image_token)
    return found


def test_items_are_thoughts_parts_and_the_first_call_in_order() -> None:
    turn = Outline("assistant", "ti", "k", calls="[{}]")
    assert items_of((ASK, turn)) == [Item(0, "t"), *(Item(1, kind) for kind in "ktic")]
    assert items_of((turn._replace(thought="", calls=""),)) == [Item(0, "t"), Item(0, "i")]


def test_each_content_is_found_and_the_rest_is_the_template_s() -> None:
    spans, rendered = locator(STRINGS).locate(TALK, items_of(TALK), NO_EXTRAS)
    assert gaps_of(spans, rendered) == [("<user>", ";<assistant>"), (";<assistant>", ";")]
    assert gaps_of([spans[0], None, spans[1]], rendered)[1] is None


def test_images_are_told_by_their_token() -> None:
    found = locator(PARTS)
    assert found.image_token == "[IMG]" and found.renderer.styles["user"] == "list"
    spans, rendered = found.locate(IMAGE, items_of(IMAGE), NO_EXTRAS)
    assert spans[0] is not None and rendered[slice(*spans[0])] == "[IMG]"
    two = (Outline("user", "iti"), ANSWER)
    assert [rendered_at(found, two, n) for n in (0, 2)] == ["[IMG]", "[IMG]"]


def rendered_at(found: Locator, shape: Any, item: int) -> str:
    spans, rendered = found.locate(shape, items_of(shape), NO_EXTRAS)
    span = spans[item]
    assert span is not None
    return rendered[slice(*span)]


def test_strings_are_taken_where_a_list_is_printed_as_code() -> None:
    found = locator(STRINGS)
    assert found.renderer.styles["user"] == "string" and found.image_token is None
    with pytest.raises(ConfigError, match=r"never writes the image token '\[IMG\]'"):
        locator(STRINGS, image_token="[IMG]")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{{ m.role }}", "drops or alters the text of turn 1"),
        ("{{ m.content }}{{ m.content }}", "writes the text of turn 1 .user. 2 times"),
        ("{{ m.content | upper }}", "drops or alters the text of turn 1"),
        ("{{ m.content[:4] }}", "drops or alters the text of turn 1"),
    ],
)
def test_a_content_that_is_not_written_once_is_the_template_s_fault(body: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        locator(LOOP % body)


def test_contents_in_another_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="drops or alters the text of turn 2"):
        locator("{% for m in messages | reverse %}{{ m.content }}{% endfor %}")


def test_what_fails_later_is_the_record_s_fault() -> None:
    found = locator(LOOP % "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}")
    system = (Outline("system", "t"), *TALK)
    with pytest.raises(RecordError, match="refuses this conversation: no") as caught:
        found.locate(system, items_of(system), NO_EXTRAS)
    assert "fold its text into the first user turn" in (caught.value.remedy or "")
    found.ready = True
    with pytest.raises(RecordError, match="template: x"):
        found.fail("x", "r")


@pytest.mark.parametrize(
    ("body", "rules"),
    [
        ("{{ m.content }}", ("", "")),
        ("{{ m.content | trim }}", (None, None)),
        ("{{ m.content.lstrip() }}", (None, "")),
        ("{{ m.content.rstrip('\\n') }}", ("", "\n")),
    ],
)
def test_what_a_template_strips_is_found_out(body: str, rules: tuple[Any, Any]) -> None:
    found = locator(LOOP % f"<{{{{ m.role }}}}>{body};")
    items = items_of(TALK)
    plain = gaps_of(*found.locate(TALK, items, NO_EXTRAS))
    assert found.strip_rules(TALK, items, NO_EXTRAS, plain, prompt=False) == [rules, rules]


def test_whitespace_inside_a_content_must_stay() -> None:
    found = locator(LOOP % "<{{ m.role }}>{{ m.content | replace(' ', '_') }};")
    items = items_of(TALK)
    plain = gaps_of(*found.locate(TALK, items, NO_EXTRAS))
    with pytest.raises(ConfigError, match="rewrites whitespace"):
        found.strip_rules(TALK, items, NO_EXTRAS, plain, prompt=False)


@pytest.mark.parametrize(
    ("body", "way"),
    [("{{ m.content }}", INLINE), ("({{ m.reasoning_content }}){{ m.content }}", FIELD)],
)
def test_a_thought_is_looked_for_in_a_field_before_the_text(body: str, way: str) -> None:
    found = locator(LOOP % body)
    find_thought(found)
    assert found.renderer.thought == way


def test_a_thought_may_be_cut_and_nothing_else() -> None:
    found = locator(LOOP % "{{ m.content }}")
    found.renderer.thought = FIELD  # a template that shows only the thought of the last answer, say
    shape = (ASK, ANSWER._replace(thought="k"))
    spans, _ = found.locate(shape, items_of(shape), Extras())
    assert [span is None for span in spans] == [False, True, False]


def test_common_beginnings() -> None:
    assert [common(a, b) for a, b in (("", "a"), ("abc", "abd"), ("ab", "abc"))] == [0, 2, 2]
