"""Exact match, and the parts every Score shares."""

import json

import pytest

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS, wilson
from mmit.eval.metrics.text import exact_match


def test_plain_ignores_case_space_and_final_punctuation():
    score = exact_match([" Yes. ", "no", "", "red"], ["yes", "No!", "blue", ["blue", "Red"]])
    assert (score.value, score.n, score.unparsed_rate) == (0.75, 4, 0.25)
    assert score.ci95 == wilson(3, 4)
    assert score.details["parsed"] == ["yes", "no", "", "red"]
    assert score.details["values"] == [1.0, 1.0, 0.0, 1.0]


def test_strict_changes_nothing():
    assert METRICS["exact:strict"](["Yes", "yes"], ["yes", "yes"]).value == 0.5


def test_groups_are_scored_alone():
    score = exact_match(["a", "b", "c"], ["a", "b", "x"], groups=["u", "u", "v"])
    assert {g: (s.value, s.n) for g, s in score.by_group.items()} == {"u": (1.0, 2), "v": (0.0, 1)}


def test_json_leaves_the_answers_out_unless_asked():
    score = exact_match(["a"], ["a"], groups=["g"])
    assert json.loads(json.dumps(score.to_json()))["by_group"]["g"]["value"] == 1.0
    assert "parsed" not in score.to_json()["details"]
    assert score.to_json(per_answer=True)["details"]["parsed"] == ["a"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: exact_match([], []), "nothing to score"),
        (lambda: exact_match(["a"], []), "1 predictions but 0 references"),
        (lambda: exact_match(["a"], ["a"], groups=["x", "y"]), "2 groups"),
        (lambda: exact_match(["a"], ["a"], profile="plane"), "did you mean 'plain'"),
    ],
)
def test_errors_say_what_is_wrong(call, says):
    with pytest.raises(MmitError, match=says):
        call()
