"""Learning-rate schedules: warm-up, ends, bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.train.schedule import SCHEDULES, lr_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_then_the_peak(schedule):
    factors = [lr_factor(s, steps=100, schedule=schedule, warmup=0.1, min_ratio=0.0) for s in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 500), st.floats(0, 1), st.floats(0, 20), st.data())
def test_stays_between_the_floor_and_one(schedule, steps, floor, warmup, data):
    step = data.draw(st.integers(0, steps - 1))
    factor = lr_factor(step, steps=steps, schedule=schedule, warmup=warmup, min_ratio=floor)
    warm = round(warmup * steps) if warmup < 1 else int(warmup)
    assert (0 if step < warm else floor - 1e-12) <= factor <= 1
    if schedule == "constant" and step >= warm:
        assert factor == 1
