"""MMMU's two parsers, and that guessing is opt-in and seeded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS
from mmit.eval.metrics.mmmu import open_correct, parse_choice, parse_open

OPTIONS = ["cat", "dog", "bird", "fish"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A or B", "B"),
        ("(A) rather than (B), so (A)", "A"),
        ("C.", "C"),
        ("It is C.x", "C"),
        ("It is C.D", "D"),
        ("dog", ""),
        ("the animal here must be a dog", "B"),
        ("a cat sits beside a very big dog", "B"),
        ("'D'!", "D"),
        ("", ""),
    ],
)
def test_parse_choice(text, letter):
    assert parse_choice(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("x = 1,234.567", "1234.57", True),
        ("12.5 is not it", "12.5", False),
        ("The result is 3 apples", "3", True),
        ("It is blue", ["red", "blue"], True),
        ("abc", "b", False),
        ("is b or c", "b", True),
        ("1.2e3", "1200", True),
        ("red\nso blue", "red", False),
    ],
)
def test_open(text, answer, right):
    assert open_correct(text, answer) is right


@given(st.text(max_size=30))
def test_open_parsing_is_total(text):
    assert parse_open(text)


def rows(n):
    return [{"answer": "A", "question_type": "multiple-choice", "options": OPTIONS}] * n


def test_unparsed_is_wrong_unless_asked_to_guess():
    said = ["no idea"] * 400
    assert METRICS["mmmu"](said, rows(400)).value == 0.0
    guess = METRICS["mmmu:random"](said, rows(400), seed=1)
    assert guess == METRICS["mmmu:random"](said, rows(400), seed=1)
    assert guess.details["parsed"] != METRICS["mmmu:random"](said, rows(400), seed=2).details["parsed"]
    assert 0.15 < guess.value < 0.35
    assert guess.unparsed_rate == METRICS["mmmu"](said, rows(400)).unparsed_rate == 1.0


@given(st.lists(st.sampled_from(["A", "(B)", "so C it is", "a dog"]), min_size=1))
def test_profiles_agree_where_a_letter_is_read(said):
    plain, guess = METRICS["mmmu"](said, rows(len(said))), METRICS["mmmu:random"](said, rows(len(said)))
    for a, b in zip(plain.details["parsed"], guess.details["parsed"], strict=True):
        assert a == b or a == ""


def test_types_mix_and_unknown_ones_are_refused():
    references = [*rows(1), {"answer": "blue", "question_type": "open"}]
    assert METRICS["mmmu"](["A", "It is blue."], references, groups=["Art", "Art"]).by_group["Art"].value == 1.0
    with pytest.raises(MmitError, match="question type 'essay'"):
        METRICS["mmmu"](["A"], [{"answer": "A", "question_type": "essay"}])
