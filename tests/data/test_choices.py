"""Records that choose among answers: what they hold, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.data.choices import branches, choices_of
from mmit.errors import RecordError
from mmit.records import Image, Record, Text, Turn


def chosen(choices: Any, shares: Any = None, answer: str = "red") -> Record:
    turns = (
        Turn("user", (Image("a.png"), Text("What colour?", 0.5)), weight=2.0),
        Turn("assistant", (Text(answer),)),
    )
    return Record(turns, id="a", meta={"choices": choices, "shares": shares})


def test_without_shares_the_answer_of_the_record_has_all() -> None:
    assert choices_of(chosen(["blue", "red"])) == (("blue", "red"), (0.0, 1.0))
    soft = chosen(["blue", "red"], [0.25, 0.75], answer="green")
    assert choices_of(soft) == (("blue", "red"), (0.25, 0.75))


def test_branches_differ_in_the_answer_and_its_share_alone() -> None:
    blue, red, question = branches(chosen(["blue", "red"]), question=True)
    assert [(r.turns[-1].text, share) for r, share in (blue, red)] == [("blue", 0.0), ("red", 1.0)]
    assert [[turn.weight for turn in r.turns] for r, _ in (blue, red)] == [[0.0, 1.0]] * 2
    assert [turn.weight for turn in question[0].turns] == [1.0, 0.0] and question[1] is None
    assert len(branches(chosen(["blue", "red"]), question=False)) == 2


@pytest.mark.parametrize(
    ("choices", "shares", "problem"),
    [
        (None, None, "names no choices"),
        (["red"], None, "no list of two answers"),
        ("red blue", None, "no list of two answers"),
        ({"answers": ["red", "blue"]}, None, "no list of two answers"),
        (["red", " "], None, "choice 2 is empty"),
        (["red", "red"], None, "'red' occurs twice"),
        (["blue", "green"], None, "'red' is not among the choices blue, green"),
        (["red", "blue"], [1.0], "no list of 2 numbers"),
        (["red", "blue"], [True, False], "no list of 2 numbers"),
        (["red", "blue"], [0.4, 0.4], "add up to 0.8"),
        (["red", "blue"], [1.5, -0.5], "below 0"),
    ],
)
def test_choices_that_are_none(choices: Any, shares: Any, problem: str) -> None:
    with pytest.raises(RecordError, match=problem) as refused:
        choices_of(chosen(choices, shares))
    assert "(a)" in refused.value.where and refused.value.remedy


def test_an_earlier_text_with_a_weight_of_its_own_carries_no_loss() -> None:
    """The score of a choice is that of its last answer, whatever the texts before it say."""
    turns = (Turn("user", (Text("q", weight=0.5),)), Turn("assistant", (Text("red"),)))
    for part, _ in branches(Record(turns, meta={"choices": ["red", "blue"]}), question=False):
        assert part.turns[0].weight == 0 and part.turns[0].parts == (Text("q"),)
