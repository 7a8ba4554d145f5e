"""Curves as SVG: extremes survive thinning, gaps stay gaps, axes have round numbers and a length."""

from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import pytest

from mmit.train.monitor.curves import POINTS, figure, smooth, thin, ticks


@pytest.mark.parametrize("seed", range(5))
def test_thinning_keeps_order_extremes_and_gaps(seed: int) -> None:
    rng = random.Random(seed)
    series = [(float(n), None if rng.random() < 0.1 else rng.gauss(0, 1)) for n in range(5000)]
    series[1234] = (1234.0, 99.0)
    kept = thin(series)
    assert len(kept) <= POINTS + 20 and set(kept) <= set(series) and kept == sorted(kept, key=lambda p: p[0])
    known = [y for _, y in series if y is not None]
    assert {min(known), max(known)} <= {y for _, y in kept}
    assert thin(series[:POINTS]) == series[:POINTS]
    hole = [(float(n), 1.0 if n < 1000 or n >= 2000 else None) for n in range(3000)]
    assert any(y is None for _, y in thin(hole))


def test_a_running_mean_follows_and_skips_what_is_missing() -> None:
    assert smooth([(1, 2.0), (2, None), (3, 4.0)], share=0.5) == [(1, 2.0), (2, 2.0), (3, 3.0)]
    assert smooth([(1, None)]) == [(1, None)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (-3, 12), (0.013, 0.019), (100, 1e6), (-1e-7, 1e-7)])
def test_ticks_are_round_numbers_within_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    slack = (high - low) * 1e-6
    assert 2 <= len(found) <= 7 and all(low - slack <= x <= high + slack for x in found)
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125" and all(abs(x / step - round(x / step)) < 1e-6 for x in found)


@pytest.mark.parametrize(
    "curve", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -1.0), (2, None), (3, 5.0)]]
)
def test_every_curve_is_sound_svg_inside_its_frame(curve: list[tuple[float, float | None]]) -> None:
    text = figure("a & <b>", {"one <i>": curve, "two": curve}, from_zero=False)
    svg = ElementTree.fromstring(text).find("svg")
    assert svg is not None and svg.get("aria-label") == "a & <b>" and "<i>" not in text
    _, _, width, height = map(int, str(svg.get("viewBox")).split())
    for line in svg.iter("polyline"):
        for x, y in (map(float, point.split(",")) for point in str(line.get("points")).split()):
            assert 0 <= x <= width and 0 <= y <= height
    lines = len(re.findall("<polyline", text))
    assert lines == 2 * (2 if None in [y for _, y in curve] else 1)


def test_without_a_value_there_is_no_figure() -> None:
    assert figure("t", {"one": [(1, None)], "two": []}) == ""
    assert 'class="legend"' not in figure("t", {"one": [(1, 1.0)]})
