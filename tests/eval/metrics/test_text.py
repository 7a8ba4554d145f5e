"""Exact match profiles, OCRBench, GSM8K."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS

bare = st.text(string.ascii_lowercase + " ", max_size=10).map(str.strip)


@given(bare, bare)
def test_exact_profiles_agree_on_bare_words(prediction, reference):
    names = ("exact", "exact:strict", "exact:vlmeval", "gqa:lmms", "gqa:llava", "ai2d:lmms")
    assert len({METRICS[name]([prediction], [reference]).value for name in names}) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("Yes.", "yes", {"exact", "gqa:lmms", "gqa:llava", "ai2d:lmms"}),
        ("YES", "yes", {"exact", "gqa:lmms", "gqa:llava", "ai2d:lmms", "exact:vlmeval"}),
        (" yes", "yes", {"exact", "gqa:lmms", "ai2d:lmms", "exact:vlmeval"}),
        ("t-shirt", "tshirt", {"gqa:lmms", "ai2d:lmms"}),
        ("B. the sun", "B", {"ai2d:lmms"}),
        ("(B)", "B", {"gqa:lmms", "ai2d:lmms"}),
        ("b", "B", {"exact", "gqa:lmms", "ai2d:lmms", "exact:vlmeval"}),
    ],
)
def test_exact_profiles_differ_where_they_should(prediction, reference, right):
    names = ("exact", "exact:strict", "exact:vlmeval", "gqa:lmms", "gqa:llava", "ai2d:lmms")
    assert {name for name in names if METRICS[name]([prediction], [reference]).value} == right


def ocr(prediction, answers, dataset="IIIT5K", profile="lmms"):
    return METRICS[f"ocrbench:{profile}"]([prediction], [{"answers": answers, "dataset": dataset}]).value


def test_ocrbench():
    assert ocr("The word is STOP a sign.", ["no", "stop sign"]) == 0.0
    assert ocr("The word is STOP\nsign.", ["no", "stop sign"]) == 1.0
    assert ocr("x ^ {2}", ["x^{2}"], "HME100k") == 1.0
    assert ocr("X^{2}", ["x^{2}"], "HME100k") == 0.0
    score = METRICS["ocrbench:lmms"](["a", "b"], [{"answers": "a", "dataset": "x"}] * 2, groups=["p", "q"])
    assert score.details["points"] == 1 and score.by_group["p"].value == 1.0


def test_only_lmms_folds_full_width_ascii_and_never_in_formulas():
    assert ocr("ＡＢＣ　１", ["abc 1"]) == 1.0
    assert ocr("ＡＢＣ　１", ["abc 1"], profile="vlmeval") == 0.0
    assert ocr("ｘ", ["x"], "HME100k") == 0.0
    # Compatibility characters other than full-width ASCII stay apart.
    assert ocr("②", ["2"]) == 0.0


@given(st.text(string.printable, max_size=10), st.text(string.printable, max_size=5))
def test_ocrbench_profiles_agree_on_ascii(prediction, answer):
    assert ocr(prediction, [answer]) == ocr(prediction, [answer], profile="vlmeval")


def test_ocrbench_names_the_missing_key():
    with pytest.raises(MmitError, match="dataset"):
        METRICS["ocrbench:lmms"](["a"], [{"answers": ["a"]}])


@pytest.mark.parametrize(
    ("prediction", "strict", "flexible"),
    [
        ("5 and 6 make\n#### 1,234", True, True),
        ("The answer is $1,234.", False, True),
        ("#### 1234 dollars, or 7 each", True, False),
        ("no number", False, False),
        ("#### 1234.", True, True),
    ],
)
def test_gsm8k(prediction, strict, flexible):
    gold = "60 * 20 + 34 = <<60*20+34=1234>>1,234\n#### 1,234"
    assert METRICS["gsm8k:strict"]([prediction], [gold]).value == strict
    assert METRICS["gsm8k:flexible"]([prediction], [gold]).value == flexible
    assert METRICS["gsm8k:flexible"]([prediction], ["1234"]).value == flexible


def test_gsm8k_counts_what_it_cannot_read():
    assert METRICS["gsm8k:strict"](["42", "#### 42"], ["42", "42"]).unparsed_rate == 0.5
