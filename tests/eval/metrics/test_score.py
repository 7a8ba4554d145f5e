"""The steps that every metric shares: columns, groups, intervals, and what is asked of a reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmit.errors import MmitError
from mmit.eval.metrics.intervals import bootstrap_mean, wilson
from mmit.eval.metrics.score import by_cluster, check_lengths, each, interval, mean_score, memo, need, options_of, pick


def test_groups_are_scores_of_their_own_in_the_order_they_come() -> None:
    values, groups = [1, 0, 1, 1, 0.5], ["b", "a", "b", "a", "a"]
    score = mean_score("m", "p", values, unparsed=[0, 1, 0, 0, 0], groups=groups)
    assert list(score.by_group) == ["b", "a"] and score.n == 5 and score.value == pytest.approx(0.7)
    assert (score.by_group["a"].value, score.by_group["a"].n) == (0.5, 3)
    assert score.by_group["a"].unparsed_rate == pytest.approx(1 / 3) and score.by_group["b"].unparsed_rate == 0
    parts = [one.value * one.n for one in score.by_group.values()]
    assert sum(parts) == pytest.approx(score.value * score.n)


def test_right_or_wrong_has_wilsons_interval_and_partial_credit_a_seeded_one() -> None:
    assert interval([1, 0, 1, 1]) == wilson(3, 4)
    partial = [0.2, 0.9, 0.4, 0.5]
    assert interval(partial, seed=5) == bootstrap_mean(np.array(partial), seed=5) != interval(partial, seed=6)


def test_json_leaves_lists_of_answers_out_unless_they_are_asked_for() -> None:
    score = mean_score("m", "p", [1, 0], parsed=["x", ""], groups=["a", "b"]).with_details(points=1)
    assert score.to_json()["details"] == {"points": 1}
    whole = score.to_json(per_answer=True)
    assert whole["details"] == {"points": 1, "values": [1.0, 0.0], "parsed": ["x", ""]}
    assert whole["by_group"]["a"]["value"] == 1.0 and whole["ci95"] == list(score.ci95)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: check_lengths("m", []), "nothing to score"),
        (lambda: check_lengths("m", ["a"], references=[]), "1 predictions but 0 references"),
        (lambda: mean_score("m", "p", [1.0], groups=["a", "b"]), "1 predictions but 2 groups"),
        (lambda: need({"a": 1}, ("a", "b", "c"), where="row"), "a reference lacks b, c"),
        (lambda: need("text", ("a",), where="row"), "a reference lacks a; got 'text'"),
        (lambda: list(each("m", ["x", "y"], [{"a": 1}, {}], keys=("a",), unit="row")), "m: row 1"),
        (lambda: options_of([], where="q"), "no reference answer"),
        (lambda: pick({"strict": 1}, "strikt", where="m"), "did you mean 'strict'"),
    ],
)
def test_what_cannot_be_scored_is_named(call: Any, told: str) -> None:
    with pytest.raises(MmitError, match=told):
        call()


def test_an_interval_over_clusters_is_wider_where_answers_hang_together() -> None:
    values = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 4
    alone = by_cluster(mean_score("m", "p", values), [str(n) for n in range(32)])
    together = by_cluster(mean_score("m", "p", values), [str(n // 4) for n in range(32)])
    assert together.value == alone.value == 0.5
    width = lambda score: score.ci95[1] - score.ci95[0]  # noqa: E731
    assert width(together) > 1.5 * width(alone)
    assert (together.details["interval_by_image"], alone.details["interval_by_image"]) == (8, 32)


def test_a_score_that_is_no_mean_of_answers_keeps_its_interval() -> None:
    score = mean_score("m", "p", [1.0, 0.0])
    other = type(score)(name="m", profile="p", value=7.0, n=2, ci95=(6.0, 8.0), details=score.details)
    assert by_cluster(other, ["a", "b"]) is other
    assert by_cluster(score, ["a"]) is score  # clusters of other answers


def test_a_pure_function_runs_once_a_text() -> None:
    seen: list[str] = []
    once = memo(lambda text: seen.append(text) or len(text))
    assert [once(text) for text in ("ab", "c", "ab")] == [2, 1, 2] and seen == ["ab", "c"]
