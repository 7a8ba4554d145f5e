"""Answers about images held against what is known of them."""

from __future__ import annotations

import pytest

from mmit.build.facts import FactCheck

FACTS = [
    {"colour": "blue", "shape": "circle"},
    {"colour": "Red", "shape": "square"},
    {"colour": "blue green", "shape": "circle"},
]


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        ("What is it?", "A blue circle.", True),
        ("What is it?", "Two blue circles", True),
        ("What is it?", "A red circle.", False),
        ("What is it?", "It is not red.", True),
        ("What is it?", "It isn't a blue circle.", False),
        ("What is it?", "Not red. Blue.", True),  # the denial ends with its sentence
        ("Is it blue?", "Yes.", True),
        ("Is it blue?", "No, it is not.", False),
        ("Is it a red circle?", "no", True),  # not all of it is true
        ("Is it red?", "No, it is blue.", True),
        ("Is it not red?", "Yes", None),  # what is meant cannot be told
        ("Is it large?", "Yes", None),
        ("What is it?", "A thing.", None),
        ("What is it?", "A bluebird in a circle", True),  # words, not parts of them
    ],
)
def test_a_verdict_is_read_from_the_attributes_own_words(question: str, answer: str, right: bool | None) -> None:
    assert FactCheck(FACTS).add(question, answer, FACTS[0], image="a") is right


def test_the_longest_value_is_the_one_that_is_meant() -> None:
    check = FactCheck(FACTS)
    assert check.claims("a blue green square") == [("colour", "blue green", True), ("shape", "square", True)]
    assert check.add("", "blue green", FACTS[2], image="a") is True
    assert check.add("", "It is RED.", FACTS[1], image="b") is True  # in whatever case


def test_the_report_counts_what_was_checked_and_which_attribute_was_wrong() -> None:
    check = FactCheck(FACTS)
    assert check.report() == {"answers": 0, "checked": 0, "right": 0, "wrong by attribute": {}}
    for answer in ("a blue circle", "a red square", "a blue square", "a thing"):
        check.add("What is it?", answer, FACTS[0], image=answer)
    found = check.report()
    assert (found["answers"], found["checked"], found["right"]) == (4, 3, 1)
    assert found["wrong by attribute"] == {"colour": 1, "shape": 2}
    low, high = found["interval"]
    assert 0 <= low <= found["share"] <= high <= 1 and found["share"] == pytest.approx(1 / 3)
