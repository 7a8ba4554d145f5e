"""Edit distance and subsequences against slow definitions; ANLS, relaxed accuracy, ROUGE-L."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS
from mmit.eval.metrics.similarity import (
    anls,
    anls_one,
    common_subsequence,
    edit_distance,
    relaxed_one,
    rouge_l_one,
)

short = st.text("abc ", max_size=12)


def slow_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def slow_common(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for j, y in enumerate(b, 1):
            row.append(before[j - 1] + 1 if x == y else max(before[j], row[-1]))
    return row[-1]


@given(short, short)
def test_edit_distance(a, b):
    assert edit_distance(a, b) == slow_distance(a, b)


def test_edit_distance_beyond_a_machine_word():
    a, b = "abcde" * 40, "abxde" * 41
    assert edit_distance(a, b) == slow_distance(a, b)


@given(short, short)
def test_common_subsequence(a, b):
    assert common_subsequence(a, b) == slow_common(a, b)


@given(short, short)
def test_anls_profiles_agree_where_no_space_is_collapsed(a, b):
    a, b = " ".join(a.split()), " ".join(b.split())
    assert anls_one(a, [b], profile="lmms") == anls_one(a, [b], profile="normalised")


def test_anls_profiles_divide_by_other_lengths():
    assert anls_one("ab  c", ["abd c"], profile="lmms") == 1 - 1 / 5
    assert anls_one("a  b", ["abb"], profile="lmms") == 1 - 1 / 4
    assert anls_one("a  b", ["abb"], profile="normalised") == 1 - 1 / 3


def test_anls_takes_the_nearest_reference_and_cuts_below_half():
    assert anls_one("HELLO  world", ["bye", "hello world"]) == 1.0
    assert anls_one("abcd", ["abxy"]) == 0.5
    assert anls_one("abcd", ["axyz"]) == 0.0
    assert anls(["a", "b"], [["a"], "b"]).value == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("-100", "100", False),
        ("5%", "0.05", True),
        ("0.0", "0", False),
        ("0", "0", True),
        ("$5", "5", False),
        ("No", "no", True),
    ],
)
def test_relaxed(prediction, reference, right):
    assert relaxed_one(prediction, reference) is right


def test_relaxed_profiles_differ_only_in_outer_spaces():
    assert METRICS["relaxed:lmms"](["yes ", " 5 "], ["yes", "5"]).details["values"] == [0.0, 1.0]
    assert METRICS["relaxed:vlmeval"](["yes ", " 5 "], ["yes", "5"]).value == 1.0


@given(short.map(str.strip), short)
def test_relaxed_profiles_agree_without_outer_spaces(a, b):
    assert METRICS["relaxed:lmms"]([a], [b]).value == METRICS["relaxed:vlmeval"]([a], [b]).value


def test_rouge_l():
    # 4 of 5 and 4 of 6 words in order.
    p, r = 4 / 5, 4 / 6
    assert rouge_l_one("the cat sat mat now", ["The cat sat on the mat."]) == pytest.approx(2 * p * r / (p + r))
    assert rouge_l_one("x", ["a b", "x"]) == 1.0
    assert rouge_l_one("...", ["a"]) == 0.0
    coco = rouge_l_one("a b c", ["a b", "c d e"], profile="coco")
    p, r = 2 / 3, 1.0
    assert coco == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p))


def test_a_question_without_references_is_refused():
    with pytest.raises(MmitError, match="question 1.*no reference"):
        anls(["a", "b"], [["a"], []])
