"""Intervals against closed forms, and the paired tests against brute force."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import (
    bootstrap_counts,
    bootstrap_mean,
    clustered,
    mcnemar,
    paired_bootstrap,
    paired_clusters,
    wilson,
)
from mmit.eval.metrics.intervals import cluster_error, t_quantile


def test_wilson_known_values():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20 and 1/29.
    for (k, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_mirrors(kn):
    k, n = kn
    low, high = wilson(k, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= k / n <= high
        assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_refuses_impossible_counts():
    with pytest.raises(MmitError):
        wilson(3, 2)


def test_bootstrap_is_seeded_and_agrees_between_its_two_ways():
    rng = np.random.default_rng(0)
    few = rng.choice([0, 0.3, 0.6, 0.9, 1.0], size=3000)
    assert bootstrap_mean(few, seed=1) == bootstrap_mean(few, seed=1)
    assert bootstrap_mean(few, seed=1) != bootstrap_mean(few, seed=2)
    # A jitter makes every value distinct, which takes the positions' path.
    many = few + rng.normal(scale=1e-9, size=len(few))
    assert bootstrap_mean(few) == pytest.approx(bootstrap_mean(many), abs=3e-3)
    half = 1.96 * few.std() / len(few) ** 0.5
    assert bootstrap_mean(few) == pytest.approx((few.mean() - half, few.mean() + half), abs=2e-3)


def test_bootstrap_counts_of_a_share_is_near_wilson():
    low, high = bootstrap_counts([300, 700], lambda table: table[:, 0] / table.sum(axis=1))
    assert (low, high) == pytest.approx(wilson(300, 1000), abs=5e-3)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_p_is_the_exact_binomial(pairs):
    a, b = zip(*pairs, strict=True)
    result = mcnemar(a, b)
    only_a, only_b = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    n = only_a + only_b
    tail = sum(comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    assert result.p == pytest.approx(min(1.0, 2 * tail))
    assert result.difference == pytest.approx((only_a - only_b) / len(pairs))
    assert -1 <= result.ci95[0] <= result.ci95[1] <= 1


def test_mcnemar_handles_a_million_questions():
    a = np.zeros(1_000_000)
    b = a.copy()
    a[:3000], b[3000:6200] = 1, 1
    assert 0.005 < mcnemar(a, b).p < 0.02


def test_paired_bootstrap_sees_a_difference_and_no_difference():
    rng = np.random.default_rng(0)
    a = rng.random(500)
    better = paired_bootstrap(a + 0.05 + rng.normal(scale=0.05, size=500), a)
    assert better.p < 0.01 and better.ci95[0] > 0
    same = paired_bootstrap(a, a)
    assert same.p == 1.0 and same.difference == 0
    with pytest.raises(MmitError):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_t_quantiles_of_the_table():
    # Student's t, two-sided 95 %: Fisher and Yates.
    for df, t in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}.items():
        assert t_quantile(df) == pytest.approx(t, rel=1.2e-3)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_questions_about_images_of_their_own_are_independent(right):
    alone = [str(i) for i in range(len(right))]
    assert clustered(right, alone) == wilson(sum(right), len(right))
    partial = [0.5 * r for r in right]
    assert not any(partial) or clustered(partial, alone, seed=3) == bootstrap_mean(partial, seed=3)


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.integers(2, 10))
def test_asking_the_same_again_says_nothing_new(right, times):
    """n questions on each image with the same verdict are worth one question on each."""
    images = [str(i) for i in range(len(right))]
    low, high = clustered(right * times, images * times)
    assert high - low >= (lambda ends: ends[1] - ends[0])(wilson(sum(right), len(right))) - 1e-9
    assert low <= sum(right) / len(right) <= high
    again = clustered(right * (times + 3), images * (times + 3))
    assert again == pytest.approx((low, high))


def test_intervals_by_image_hold_what_they_promise_where_those_by_question_do_not():
    """Simulated models: an image is easy or hard (sd 1 logit), ten questions on each of 60 images."""
    rng = np.random.default_rng(7)
    images = np.repeat(np.arange(60), 10).astype(str)
    grid = rng.normal(size=200_000)
    truth = float((1 / (1 + np.exp(-(1.5 + grid)))).mean())
    hits = {"image": 0, "question": 0}
    for _ in range(400):
        chance = 1 / (1 + np.exp(-(1.5 + rng.normal(size=60))))
        right = rng.random(600) < np.repeat(chance, 10)
        low, high = clustered(right, images)
        hits["image"] += low <= truth <= high
        low, high = wilson(int(right.sum()), 600)
        hits["question"] += low <= truth <= high
    assert 0.92 <= hits["image"] / 400 <= 0.98
    assert hits["question"] / 400 < 0.88


def test_a_bootstrap_of_clusters_is_wider_by_what_they_share():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random(50), 8)
    images = np.repeat(np.arange(50), 8).astype(str)
    low, high = clustered(values, images, seed=1)
    half = t_quantile(49) * cluster_error(values, images)[0]
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.015)
    narrow = bootstrap_mean(values, seed=1)
    assert high - low > 2 * (narrow[1] - narrow[0])


def test_paired_clusters_keep_their_level_where_mcnemar_does_not():
    """Two models equal on average whose luck is shared by the questions of an image."""
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(40), 10).astype(str)
    wrong = {"clusters": 0, "mcnemar": 0, "covers": 0}
    for number in range(200):
        luck = np.repeat(rng.normal(size=(2, 40)), 10, axis=1)
        a, b = rng.random((2, 400)) < 1 / (1 + np.exp(-(1 + luck)))
        found = paired_clusters(a, b, images, seed=number, resamples=500)
        wrong["clusters"] += found.p < 0.05
        wrong["covers"] += found.ci95[0] <= 0 <= found.ci95[1]
        wrong["mcnemar"] += mcnemar(a, b).p < 0.05
    assert wrong["clusters"] / 200 <= 0.08 and wrong["covers"] / 200 >= 0.92
    assert wrong["mcnemar"] / 200 > 0.1


@pytest.mark.parametrize("call", [lambda: clustered([1, 0], ["a"]), lambda: paired_clusters([1], [0], [])])
def test_each_value_needs_its_cluster(call):
    with pytest.raises(MmitError, match="clusters"):
        call()


@pytest.mark.parametrize("values", [[1, 1, 0], [0.5, 0.2, 0.9]])
def test_one_image_says_nothing_about_others(values):
    assert clustered(values, ["a"] * 3) == ((0, 1) if values[0] == 1 else (0.2, 0.9))
