"""Sections of a config: help from the annotations, and what is wrong said in words with its place."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ValidationError

from mmit.sections import Section, brief, config_error, describe, without_old_options


class Inner(Section):
    """Some numbers."""

    size: Annotated[int, Gt(0)] = 3
    """how large
    it is"""
    share: Annotated[float, Ge(0), Le(1)] | None = None
    """of all"""


class Outer(Section):
    """A section of every kind of key."""

    name: str
    """what it is called"""
    kind: Literal["one", "two"] = "one"
    """which"""
    inner: Inner = Inner(size=5)
    """numbers"""
    more: Inner | None = None
    """further ones"""
    parts: Annotated[list[Inner], MinLen(1)] = []
    """a list"""


def test_help_has_a_line_a_key_with_its_type_and_default() -> None:
    found = {entry.key: (entry.type, entry.default, entry.help) for entry in describe(Outer)}
    assert found["name"] == ("text", "required", "what it is called")
    assert found["kind"] == ("one | two", "one", "which")
    assert found["inner.size"] == ("whole number > 0", "5", "how large it is")  # the default of where it stands
    assert found["inner.share"] == ("number >= 0, <= 1 or null", "null", "of all")
    assert found["more"] == ("section or null", "null", "further ones") and found["more.size"][1] == "3"
    assert found["parts"][0] == "non-empty list of sections" and "parts.0.size" in found
    assert "inner" not in found  # told by its keys


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({}, "name: required (text) but missing"),
        ({"name": 8}, "name: expected text, got 8; put it in quotes to make it text"),
        ({"name": "a", "kind": "tow"}, "kind: unknown value 'tow'; did you mean 'two'? valid: one, two"),
        ({"name": "a", "iner": {}}, "iner: unknown key (value {}); did you mean 'inner'? "),
        ({"name": "a", "inner": {"size": 0}}, "inner.size: expected whole number > 0, got 0"),
        ({"name": "a", "parts": [{"size": "4"}]}, "parts.0.size: expected whole number > 0, got '4'"),
        ({"name": "a", "more": {"sise": 1}}, "more.sise: unknown key (value 1); did you mean 'size'?"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(raw: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(raw)
    found = config_error(caught.value, Outer, raw, where="c.yaml")
    assert found.problem.startswith(told) and found.where == "c.yaml"


def test_several_problems_are_listed_each_with_its_line() -> None:
    raw = {"kind": "no", "inner": {"size": -1}}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(raw)
    origins: dict[Any, str] = {("inner",): "c.yaml:4", ("kind",): "c.yaml:2"}
    lines = config_error(caught.value, Outer, raw, where="c.yaml", origins=origins).problem.splitlines()
    assert lines[0] == "3 problems"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == ["c.yaml", "c.yaml:2", "c.yaml:4"]  # nearest known


def test_options_of_another_mode_fall_away_and_are_named() -> None:
    below = {"tune": {"llm": {"mode": "lora", "options": {"r": 8, "alpha": 4}}}}
    raw = {"tune": {"llm": {"mode": "prefix", "options": {"r": 8, "alpha": 4, "tokens": 2}}}}
    modes: dict[Any, str] = {("tune", "llm"): "frozen"}
    found, notes = without_old_options(raw, below, lambda keys: keys[-1] == "tokens", modes)
    assert found["tune"]["llm"]["options"] == {"tokens": 2} and "the options r, alpha are left out" in notes[0]
    assert raw["tune"]["llm"]["options"]["r"] == 8  # what was given stays as it was
    same = {"tune": {"llm": {"mode": "lora", "options": {"r": 16}}}}
    assert without_old_options(same, below, lambda keys: False, modes) == (same, [])


def test_a_long_value_is_cut_and_an_object_is_shown() -> None:
    assert len(brief(["word"] * 50)) == 80 and brief(["word"] * 50).endswith("...")
    assert brief({"a": None}) == "{a: null}" and "object" in brief(object())
