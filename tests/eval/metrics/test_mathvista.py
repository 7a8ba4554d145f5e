"""MathVista without a judge."""

import pytest

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS


def choice(answer="1/2"):
    return {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["1/3", "1/2", "0.5"],
        "precision": None,
        "answer": answer,
    }


def free(kind, answer, precision=None):
    return {
        "question_type": "free_form",
        "answer_type": kind,
        "choices": None,
        "precision": precision,
        "answer": answer,
    }


@pytest.mark.parametrize(
    ("text", "reference", "parsed"),
    [
        ("B", choice(), "1/2"),
        ("(B) 1/2", choice(), "1/2"),
        ("1/2", choice(), "1/2"),
        ("I think it is one half", choice(), None),
        ('The answer is "1/2".', choice(), "1/2"),
        ("14", free("integer", "14"), "14"),
        ("14.0", free("integer", "14"), None),
        ("fourteen", free("integer", "14"), None),
        ("1.449", free("float", "1.45", 2.0), "1.45"),
        ("2", free("float", "2.0", 1.0), "2.0"),
        ("[2007, 2008]", free("list", "[2007, 2008]"), "[2007, 2008]"),
        ("", free("integer", "0"), None),
    ],
)
def test_offline(text, reference, parsed):
    score = METRICS["mathvista:offline"]([text], [reference])
    assert score.details["parsed"] == [parsed]
    assert score.value == (parsed == reference["answer"]) and score.unparsed_rate == (parsed is None)


def test_extracted_takes_what_a_judge_said():
    said = ["b) one half, 1/2", "14.9", "n/a"]
    references = [choice(), free("integer", "14"), free("float", "1.0", 1)]
    score = METRICS["mathvista:extracted"](said, references)
    # The nearest choice, the whole part, nothing.
    assert score.details["parsed"] == ["1/2", "14", None] and score.value == pytest.approx(2 / 3)


@pytest.mark.parametrize("text", ["A", "(C)", "0.5", 'The answer is "1/3".'])
def test_profiles_agree_where_no_judge_is_needed(text):
    quoted = text.split('"')[1] if '"' in text else text
    offline = METRICS["mathvista:offline"]([text], [choice()])
    assert offline.details["parsed"] == METRICS["mathvista:extracted"]([quoted], [choice()]).details["parsed"]


def test_names_what_is_wrong_with_a_row():
    with pytest.raises(MmitError, match="lacks answer_type"):
        METRICS["mathvista:offline"](["1"], [{"question_type": "free_form", "answer": "1"}])
    with pytest.raises(MmitError, match="'poem'"):
        METRICS["mathvista:offline"](["1"], [free("poem", "1")])
