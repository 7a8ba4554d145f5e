"""Letter extraction, ScienceQA, SEED, RealWorldQA and MMBench's circular rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS
from mmit.eval.metrics.choice import extract_letter, infer_option, infer_text


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b ", ""),
        ("The answer is C", "C"),
        ("The correct option is (D).", "D"),
        ("The correct option is (D) because A fails.", "A"),
        ("A dog", "A"),
        ("Either (A) or (C) here", "C"),
        ("I would say 'B'", "B"),
        ("E: none of them", "E"),
        ("Banana", "B"),
        ("答案是B哦", "B"),
        ("", ""),
        ("...", ""),
        ("no idea", ""),
    ],
)
def test_extract_letter(text, letter):
    assert extract_letter(text) == letter


@given(st.text(max_size=20), st.integers(2, 6))
def test_extraction_stays_within_the_options(text, n):
    letters = "ABCDEF"[:n]
    assert extract_letter(text, letters) in ("", *letters)


@given(
    st.sampled_from("ABCD"),
    st.sampled_from(["{}", "{}.", "({})", "{})", " {} ", "The answer is {}", "{}: x"]),
)
def test_usual_forms(letter, form):
    assert extract_letter(form.format(letter), "ABCD") == letter


def test_options_limit_what_is_extracted():
    row = {"answer": "B", "options": ["cat", "dog"]}
    score = METRICS["choice"](["B.", "D", "meow"], [row] * 3)
    assert score.details["parsed"] == ["B", "", ""]
    assert score.value == pytest.approx(1 / 3) and score.unparsed_rate == pytest.approx(2 / 3)


def one(metric, text, answer="B"):
    return METRICS[metric]([text], [answer]).value


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", {"scienceqa:lmms", "scienceqa:llava", "seed:lmms", "seed:llava"}),
        ("b", {"scienceqa:lmms", "seed:lmms"}),
        ("because", {"seed:lmms"}),  # lmms-eval's own seed_aggregation_result counts it
        ("B. dog", {"scienceqa:lmms", "scienceqa:llava", "seed:lmms"}),
        ("B.", {"scienceqa:lmms", "seed:lmms"}),
        ("Because", {"seed:lmms"}),
        (" B", {"scienceqa:lmms", "seed:lmms"}),
        ("The answer is B.", {"scienceqa:llava"}),
        ("The answer is B. The answer is A.", set()),
        ("A", set()),
    ],
)
def test_scienceqa_and_seed(text, right):
    names = ("scienceqa:lmms", "scienceqa:llava", "seed:lmms", "seed:llava")
    assert {name for name in names if one(name, text)} == right


@given(st.sampled_from("ABCDE"), st.sampled_from("ABCDE"))
def test_profiles_agree_on_a_bare_letter(said, gold):
    names = ("choice", "scienceqa:lmms", "scienceqa:llava", "seed:lmms", "seed:llava")
    assert {one(name, said, gold) for name in names} == {float(said == gold)}


def test_a_reference_must_be_a_letter():
    with pytest.raises(MmitError, match="question 0.*not an option letter"):
        METRICS["choice"](["A"], ["dog"])


def test_realworldqa():
    score = METRICS["realworldqa:lmms"](["It is (B).", "Two.", " YES "], ["B", "two", "no"])
    assert score.details["values"] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("I say B", "B"),
        ("A dog sits here", ""),
        ("A dog (B).", "A"),
        ("A big dog (B).", "B"),
        ("A and B", ""),
        ("Answer :C.", "C"),
        ("(A) is wrong, (B) too", ""),
    ],
)
def test_mmbench_option(text, letter):
    assert infer_option(text) == letter


def test_mmbench_text():
    options = {"A": "Cat", "B": "dog"}
    assert infer_text("a DOG", options) == "B"
    assert infer_text("a dog and a cat", options) == ""


def row(index, answer, category="x"):
    return {
        "index": index,
        "answer": answer,
        "options": {"A": "cat", "B": "dog", "C": None},
        "category": category,
    }


def test_mmbench_needs_all_rotations():
    references = [row(7, "A"), row(8, "B", "y"), row(1_000_007, "B"), row(1_000_008, "A", "y")]
    score = METRICS["mmbench:static"](["A", "B", "the cat", "A"], references)
    assert score.details["values"] == [0.0, 1.0] and score.n == 2 and score.value == 0.5
    assert score.details["vanilla"] == 1.0 and score.details["rows"] == 4
    assert {g: s.value for g, s in score.by_group.items()} == {"x": 0.0, "y": 1.0}
    assert score.details["parsed"] == ["A", "B", "A", "A"]


def test_mmbench_static_reads_more_than_prefetch_and_never_otherwise():
    references = [row(i, "B") for i in range(3)]
    said = ["B", "Hm,B?", "neither"]
    assert METRICS["mmbench:prefetch"](said, references).details["parsed"] == ["B", "", ""]
    assert METRICS["mmbench:static"](said, references).details["parsed"] == ["B", "B", ""]


@given(st.text("ABab .()dogcat", max_size=12))
def test_mmbench_profiles_agree_where_prefetch_reads(text):
    early = METRICS["mmbench:prefetch"]([text], [row(1, "A")])
    if early.unparsed_rate == 0:
        assert METRICS["mmbench:static"]([text], [row(1, "A")]).value == early.value


def test_mmbench_refuses_rotations_without_their_question():
    with pytest.raises(MmitError, match="question 9"):
        METRICS["mmbench:static"](["A"], [row(1_000_009, "A")])
