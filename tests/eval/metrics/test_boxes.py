"""Boxes in texts, as every way of writing them has them, and how far two of them agree."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmit.data.formats.boxes import WAYS, spelt, with_boxes
from mmit.errors import MmitError
from mmit.eval.metrics import METRICS
from mmit.eval.metrics.boxes import box_of, overlap
from mmit.records import Record

share = st.floats(0, 1)
boxes = st.tuples(share, share, share, share).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)


@given(boxes, st.sampled_from(WAYS))
def test_a_box_is_read_as_it_was_written(box, way):
    # Known limit: [0, 0, 0, 1] of 0 to 1000 is a box of a thousandth, and reads as one of shares.
    assume(way != "norm1000" or max(box) >= 0.0015)
    written = with_boxes(Record.triple("Where?", f"It is at {spelt(box)}."), boxes=way).turns[1].text
    assert box_of(written) == pytest.approx(box, abs=0.0006)


@given(boxes, boxes)
def test_overlap_is_symmetric_and_within_bounds(one, other):
    assert 0 <= overlap(one, other) <= 1 and overlap(one, other) == overlap(other, one)
    assert overlap(one, one) == 1


def test_overlap_by_counting_cells():
    one, other = (0.2, 0.1, 0.6, 0.5), (0.4, 0.3, 0.9, 0.7)
    cells = [(x + 0.5, y + 0.5) for x in range(10) for y in range(10)]
    inside = [{c for c in cells if b[0] * 10 < c[0] < b[2] * 10 and b[1] * 10 < c[1] < b[3] * 10} for b in (one, other)]
    assert overlap(one, other) == pytest.approx(len(inside[0] & inside[1]) / len(inside[0] | inside[1]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left",
        "[1, 2, 3]",
        "10 cm of 20, then 30 or 40",
        "[500, 1, 400, 2]",
        "[1, 2, 1200, 3]",
        "[0.1, 0.2, 1.5, 0.3]",
    ],
)
def test_what_is_no_box(text):
    assert box_of(text) is None


def test_shares_and_thousandths_are_told_apart():
    assert box_of("[0, 0, 1, 0.5]") == (0, 0, 1, 0.5)
    assert box_of("[0, 0, 1, 5]") == (0, 0, 0.001, 0.005)
    assert box_of("between 3 and 4: [100, 200, 300, 400] or [0, 0, 9, 9]") == (0.1, 0.2, 0.3, 0.4)


def test_profiles_and_invalid_answers():
    said, meant = ["[0, 0, 500, 1000]", "[0, 0, 400, 1000]", "no"], ["(0,0),(1000,1000)"] * 2 + ["[1, 1, 2, 2]"]
    scores = {name: METRICS[name](said, meant) for name in ("iou", "iou:50", "iou:75")}
    assert [round(score.value, 3) for score in scores.values()] == [0.3, 0.333, 0]
    assert scores["iou"].unparsed_rate == pytest.approx(1 / 3)
    with pytest.raises(MmitError, match=r"question 0: the reference has no box(.|\n)*Write \[left"):
        METRICS["iou"](["[1, 2, 3, 4]"], ["there"])
