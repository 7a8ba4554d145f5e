"""Intervals against closed forms, and the paired tests against brute force."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import bootstrap_counts, bootstrap_mean, mcnemar, paired_bootstrap, wilson


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
