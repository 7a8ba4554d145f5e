"""Errors say where, what and what to do, and come back the same from plain facts."""

from __future__ import annotations

import pytest

from mmit.errors import ConfigError, ImageError, MmitError, RecordError, TooLong, from_facts, located, nearest


def test_the_message_is_the_place_the_problem_and_the_remedy() -> None:
    assert str(MmitError("is odd", where="a.yaml", remedy="Make it even.")) == "a.yaml: is odd\nMake it even."
    assert str(MmitError("is odd")) == "is odd"


@pytest.mark.parametrize("kind", [RecordError, TooLong, ImageError, ConfigError, MmitError])
def test_an_error_is_made_again_of_its_facts(kind: type[MmitError]) -> None:
    error = kind("is odd", where="row 3", remedy="Fix it.")
    again = from_facts(error.facts)
    assert type(again) is kind and again.facts == error.facts and str(again) == str(error)


@pytest.mark.parametrize("name", ["Gone", "nearest", "Any", "KeyError"])
def test_facts_of_another_class_make_the_general_error(name: str) -> None:
    assert type(from_facts([name, "p", "", ""])) is MmitError  # never something else that is called so


def test_the_nearest_word_is_offered_and_all_are_listed() -> None:
    assert nearest("colour", ["size", "color"]) == "did you mean 'color'? valid: color, size"
    assert nearest("zzz", ["size", "color"]) == "valid: color, size"


def test_the_key_at_work_stands_in_front_and_the_kind_stays() -> None:
    with pytest.raises(RecordError) as caught, located("data"), located("train"):
        raise RecordError("is odd", remedy="Fix it.")
    assert caught.value.facts == ["RecordError", "is odd", "data: train", "Fix it."]
    with pytest.raises(KeyError), located("data"):
        raise KeyError("x")
