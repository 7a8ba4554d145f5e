"""Curves that are known are found again, and where little is known nothing is claimed."""

from __future__ import annotations

import numpy as np
import pytest

from mmit.analysis.curves import saturating, slope_per_doubling


def scores(curve, amounts, *, noise=0.0, seeds=3):
    rng = np.random.default_rng(0)
    return {float(n): {s: float(curve(n) + rng.normal(0, noise)) for s in range(seeds)} for n in amounts}


def test_a_line_over_doublings_has_its_slope():
    found = slope_per_doubling(scores(lambda n: 0.1 * np.log2(n), (1, 2, 4, 10)))
    assert found["slope"] == pytest.approx(0.1) and found["seeds"] == 3
    assert slope_per_doubling(scores(lambda n: 0.5, (2,))) is None
    assert slope_per_doubling(scores(lambda n: 0.5, (2, 4), seeds=1))["ci95"] is None


def test_a_saturating_curve_is_found_again():
    found = saturating(scores(lambda n: 0.9 - 2.0 * n**-0.5, (60, 240, 960, 3840), noise=1e-4), margin=0.05)
    assert found["a"] == pytest.approx(0.9, abs=0.01) and found["c"] == pytest.approx(0.5, abs=0.02)
    gain = 2.0 * (3840**-0.5 - 7680**-0.5)
    assert found["gain"] == pytest.approx(gain, abs=2e-3) and "buys +0.00" in found["verdict"]


def test_noise_as_large_as_the_effect_is_no_finding():
    found = saturating(scores(lambda n: 0.5, (60, 240, 960, 3840), noise=0.2), margin=0.01)
    assert found is None or found["verdict"] == "cannot tell"
    assert saturating(scores(lambda n: 0.5, (60, 240, 960)), margin=0.05) is None
