"""Rows dealt to ranks: equal work, the same rows in a step whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mmit.data.balance import imbalance, spread
from mmit.data.row_order import Duration, RowOrder, Sharing


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_goes_to_one_rank_and_ranks_differ_by_one_row_at_most(ranks):
    costs = np.random.default_rng(0).lognormal(size=21).tolist()
    hands = spread(costs, ranks)
    assert sorted(place for hand in hands for place in hand) == list(range(21))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_rounds_hold_rows_of_like_cost():
    hands = spread([1, 100, 2, 99, 3, 98], 3)
    assert [sorted(hand) for hand in zip(*hands, strict=True)] == [[1, 3, 5], [0, 2, 4]]


def test_dealing_is_more_even_than_taking_turns():
    rng = np.random.default_rng(1)
    steps = [rng.lognormal(sigma=0.3, size=128).tolist() for _ in range(20)]
    turns = [max(sum(c[r::8]) for r in range(8)) * 8 / sum(c) for c in steps]
    dealt = [imbalance(c, 8) for c in steps]
    assert max(dealt) < 1.05 < np.mean(turns)
    assert imbalance([], 4) == 1.0


def test_a_step_holds_the_same_rows_on_any_number_of_ranks():
    def rows_of(epoch, begin, end):
        return [[i] for i in range(begin, end)]

    row_order = RowOrder(rows_of, Duration(12, epochs=1.0), units=40, sharing=Sharing(lambda row: float(row[0] % 7)))
    for step in range(row_order.steps):
        for world, micro_rows in ((1, 1), (2, 1), (4, 3), (8, 1)):
            ranks = [row_order.micro_positions(step, rank=r, world=world, micro_rows=micro_rows) for r in range(world)]
            assert len({len(micros) for micros in ranks}) == 1
            places = sorted(p for micros in ranks for micro in micros for p in micro)
            assert places == list(range(12 * step, 12 * step + 12))
        assert row_order.imbalance(step, world=4) >= 1.0 == row_order.imbalance(step, world=1)


@pytest.mark.parametrize(("world", "micro_rows"), [(1, 4), (2, 3), (4, 2), (3, 5)])
def test_like_rows_share_a_micro_batch_and_the_step_stays_what_it_was(world, micro_rows):
    length = np.random.default_rng(2).integers(10, 200, 31)
    pictured = np.random.default_rng(3).integers(0, 2, 31)

    def rows_of(epoch, begin, end):
        return [[i] for i in range(begin, end)]

    def key(row):
        return int(pictured[row[0]]), int(length[row[0]])

    def padding(row_order):
        waste = 0
        for step in range(row_order.steps):
            for rank in range(world):
                for micro in row_order.micro_positions(step, rank=rank, world=world, micro_rows=micro_rows):
                    lengths = [int(length[p]) for p in micro if p < 31]
                    waste += sum(max(lengths) - n for n in lengths)
        return waste

    duration = Duration(12, epochs=1.0)
    row_order, plain = (RowOrder(rows_of, duration, units=31, sharing=Sharing(alike=a)) for a in (key, None))
    for step in range(row_order.steps):
        ranks = [row_order.micro_positions(step, rank=r, world=world, micro_rows=micro_rows) for r in range(world)]
        assert {len(micros) for micros in ranks} == {-(-12 // (world * micro_rows))}
        places = [p for micros in ranks for micro in micros for p in micro]
        assert sorted(places) == list(range(12 * step, min(12 * step + 12, 31)))
        assert all(len(micro) <= micro_rows for micros in ranks for micro in micros)
        in_order = [p for at_once in zip(*ranks, strict=True) for micro in at_once for p in micro]
        assert in_order == sorted(in_order, key=lambda p: (key([p]), p))
    assert padding(row_order) < padding(plain)
