"""Options of a method: defaults filled in, and a value or name that cannot be is refused with what can."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.errors import ModelError
from mmit.models.tuning import MODES
from mmit.models.tuning.options import EXPECTED, Option, read_options

RANK = Option(8, "whole", least=1)
GIVEN: dict[str, Any] = {"whole": 2, "number": 0.5, "flag": True, "text": "a", "names": ["q"], "numbers": [1]}


def read(given: dict[str, Any], **allowed: Option) -> dict[str, Any]:
    others = {"lora": {"r": RANK}, "prefix": {"tokens": RANK}}
    return read_options(given, allowed, mode="mine", where="tune.llm.options", others=others)


def test_defaults_stand_where_nothing_or_none_is_given() -> None:
    allowed = {"r": RANK, "on": Option(False, "flag")}
    assert read({}, **allowed) == read({"r": None}, **allowed) == {"r": 8, "on": False}
    assert read({"on": True, "r": 2}, **allowed) == {"r": 2, "on": True}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_kind_takes_its_own_values_and_no_others(kind: Any) -> None:
    option = Option(None, kind)
    option.check(GIVEN[kind], where="w")
    wrong: dict[str, Any] = {"whole": [True, 1.0, "1"], "number": [True, "1"], "flag": [1, "true"], "text": [1, ["a"]],
                             "names": [1, {"a": 1}, [], "", ["q", 1], [""]],
                             "numbers": [1, "1", [], [True], ["1"], [1.0]]}  # fmt: skip
    for value in wrong[kind]:
        with pytest.raises(ModelError) as caught:
            option.check(value, where="w")
        assert EXPECTED[kind][1] in (caught.value.remedy or "") and caught.value.problem == f"is {value!r}"


@pytest.mark.parametrize(
    ("value", "limits"), [(0, ", 1 or more"), (-3, ", 1 or more"), (9, ", 1 or more and below 9"), (10, "below 9")]
)
def test_limits_are_told_with_the_value(value: int, limits: str) -> None:
    option = Option(1, "whole", least=1, below=9 if value > 8 else float("inf"))
    with pytest.raises(ModelError) as caught:
        option.check(value, where="tune.llm.options.r")
    assert limits in (caught.value.remedy or "") and caught.value.where == "tune.llm.options.r"
    Option(1, "whole", least=1, below=9).check(8, where="w")


def test_choices_are_the_only_values() -> None:
    option = Option(True, "text", choices=(True, "pissa"))
    option.check(True, where="w")
    with pytest.raises(ModelError, match="pisa") as caught:
        option.check("pisa", where="w")
    assert "did you mean 'pissa'" in (caught.value.remedy or "")


def test_an_option_of_another_mode_is_recognised() -> None:
    with pytest.raises(ModelError, match="mode 'mine' has no option 'tokens'") as caught:
        read({"tokens": 3}, r=RANK)
    assert "it is an option of prefix" in (caught.value.remedy or "")
    with pytest.raises(ModelError) as none:
        read({"x": 3})
    assert none.value.remedy == "mode 'mine' takes no options"


def test_every_default_of_every_method_is_one_it_takes() -> None:
    for modes in MODES.values():
        for name, options in modes.items():
            for key, option in options.items():
                if option.default is not None:
                    option.check(option.default, where=f"{name}.{key}")


def test_a_factor_of_nothing_is_refused() -> None:
    """LoRA with alpha 0 is trained for hours and answers as its base."""
    alpha = MODES["llm"]["lora"]["alpha"]
    alpha.check(0.5, where="w")
    with pytest.raises(ModelError, match="is 0") as caught:
        alpha.check(0, where="tune.llm.options.alpha")
    assert caught.value.remedy == "give a number, more than 0"
