"""Rows of a run: complete, the same however the work is divided, and reached without planning what came before."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.data.mixture import epoch_order
from mmit.data.row_order import Duration, RowOrder, Sharing, imbalance, spread
from mmit.errors import ConfigError

UNITS = 23
SEGMENTS = st.sampled_from([4, 7, 23, 1000])


def rows_of(epoch: int, begin: int, end: int) -> list[list[int]]:
    """Rows of one or two units; their number differs from epoch to epoch, as with packing."""
    order = epoch_order([UNITS], [1.0], seed=5, epoch=epoch)[begin:end].tolist()
    width = 1 + epoch % 2
    return [order[i : i + width] for i in range(0, len(order), width)]


def made(rows, *, rows_per_step, epochs=None, steps=None, **options) -> RowOrder:
    return RowOrder(rows, Duration(rows_per_step, epochs, steps), **options)


def row_order_of(**options) -> RowOrder:
    return made(rows_of, units=UNITS, **options)


RUNS = st.tuples(st.integers(1, 9), st.floats(0.1, 4.0), st.integers(1, 5), st.integers(1, 4))


@given(run=RUNS, segment=SEGMENTS)
def test_ranks_and_micro_batches_partition_every_step(run: tuple[int, float, int, int], segment: int) -> None:
    rows_per_step, epochs, world, micro_rows = run
    row_order = row_order_of(rows_per_step=rows_per_step, epochs=epochs, segment=segment)
    seen: list[int] = []
    for step in range(row_order.steps):
        ranks = [row_order.micro_positions(step, rank=r, world=world, micro_rows=micro_rows) for r in range(world)]
        assert len({len(micros) for micros in ranks}) == 1  # or ranks would wait for each other for ever
        assert all(len(micro) <= micro_rows for micros in ranks for micro in micros)
        seen.extend(sorted(p for micros in ranks for micro in micros for p in micro))
    assert seen == list(range(row_order.steps * rows_per_step))
    assert [row_order.row(p) is None for p in seen] == [p >= row_order.total_rows for p in seen]


@given(run=RUNS, segment=SEGMENTS)
def test_every_unit_comes_once_an_epoch_whatever_the_division(run: tuple[int, float, int, int], segment: int) -> None:
    rows_per_step, _, world, micro_rows = run
    row_order = row_order_of(rows_per_step=rows_per_step, epochs=3, segment=segment)
    rows = []
    for step in range(row_order.steps):
        for rank in range(world):
            for micro in row_order.micro_positions(step, rank=rank, world=world, micro_rows=micro_rows):
                rows.extend(row for p in micro if (row := row_order.row(p)) is not None)
    assert np.bincount([unit for row in rows for unit in row]).tolist() == [3] * UNITS
    assert len(rows) == row_order.total_rows


@given(run=RUNS, at=st.floats(0, 1), segment=SEGMENTS, with_state=st.booleans())
def test_a_fresh_walk_continues_where_another_stopped(
    run: tuple[int, float, int, int], at: float, segment: int, with_state: bool
) -> None:
    rows_per_step, epochs, _, _ = run
    options = {"rows_per_step": rows_per_step, "epochs": epochs, "segment": segment}
    whole = row_order_of(**options)
    everything = [whole.row(p) for p in range(whole.total_rows)]
    position = int(at * whole.total_rows)
    known = json.loads(json.dumps(whole.state(position))) if with_state else None
    resumed = row_order_of(**options, known=known)
    assert resumed.steps == whole.steps
    assert [resumed.row(p) for p in range(position, whole.total_rows)] == everything[position:]
    assert resumed.row(whole.total_rows) is None
    assert resumed.epoch_at(position) == whole.epoch_at(position)
    assert whole.epoch_at(whole.total_rows) == pytest.approx(epochs, abs=0.1)


@given(steps=st.integers(1, 30), rows_per_step=st.integers(1, 9), segment=SEGMENTS)
def test_steps_instead_of_epochs(steps: int, rows_per_step: int, segment: int) -> None:
    row_order = row_order_of(rows_per_step=rows_per_step, steps=steps, segment=segment)
    assert row_order.steps == steps and row_order.total_rows == steps * rows_per_step
    assert row_order.row(row_order.total_rows - 1) is not None and row_order.row(row_order.total_rows) is None


@pytest.mark.parametrize("limit", [{"epochs": 9.5}, {"steps": 80}])
def test_resuming_costs_the_same_anywhere(limit: dict[str, float]) -> None:
    """At 10 % of the first epoch, at 90 % of it, and in the eighth: one segment is planned."""
    planned: list[tuple[int, int]] = []

    def counted(epoch: int, begin: int, end: int) -> list[list[int]]:
        planned.append((epoch, begin))
        return [[unit] for unit in epoch_order([100], [1.0], seed=0, epoch=epoch)[begin:end].tolist()]

    options = {"units": 100, "rows_per_step": 10, "segment": 10, **limit}
    whole = made(counted, **options)
    for position in (10, 90, 715):
        expected = whole.row(position)
        state = whole.state(position)
        assert len(json.dumps(state)) < 100
        planned.clear()
        resumed = made(counted, **options, known=state)
        assert resumed.steps == whole.steps and resumed.row(position) == expected
        assert len(planned) <= 2, planned
        with pytest.raises(IndexError, match="lies before row"):
            resumed.row(position - 11)


@pytest.mark.parametrize("epochs", [0.5, 2.0, 3.25])
def test_a_resumed_run_may_be_longer_or_shorter(epochs: float) -> None:
    first = row_order_of(rows_per_step=2, epochs=1.5, segment=4)
    resumed = row_order_of(rows_per_step=2, epochs=epochs, segment=4, known=first.state(first.total_rows))
    anew = row_order_of(rows_per_step=2, epochs=epochs, segment=4)
    if epochs > 1.5:
        assert resumed.total_rows == anew.total_rows
    else:  # it is over already
        assert resumed.total_rows <= first.total_rows


def test_segments_are_planned_when_they_are_reached() -> None:
    planned: list[tuple[int, int]] = []

    def counted(epoch: int, begin: int, end: int) -> list[list[int]]:
        planned.append((epoch, begin))
        return [[unit] for unit in range(begin, end)]

    row_order = made(counted, units=1000, rows_per_step=1, steps=100, segment=10)
    assert [row_order.row(p) for p in range(15)] == [[p] for p in range(15)]
    assert planned == [(0, 0), (0, 10)]
    row_order.epoch_at(20), row_order.state(20)
    assert len(planned) == 2


def test_a_walk_over_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no row"):
        made(lambda epoch, begin, end: [], units=0, rows_per_step=2, steps=3)
    with pytest.raises(ConfigError, match="no row"):
        made(lambda epoch, begin, end: [], units=3, rows_per_step=2, steps=3).row(0)


@given(run=RUNS, segment=SEGMENTS)
def test_counts_known_before_change_nothing_and_are_not_planned_again(
    run: tuple[int, float, int, int], segment: int
) -> None:
    rows_per_step, epochs, _, _ = run
    plain = row_order_of(rows_per_step=rows_per_step, epochs=epochs, segment=segment)
    whole = RowOrder.whole_segments(UNITS, epochs, segment)
    planned: list[tuple[int, int, int]] = []

    def noted(*place: int) -> list[list[int]]:
        planned.append((place[0], place[1], place[2]))
        return rows_of(*place)

    counts = [len(rows_of(*place)) for place in whole]
    known = made(noted, units=UNITS, rows_per_step=rows_per_step, epochs=epochs, segment=segment, counts=counts)
    assert not set(planned) & set(whole)
    assert known.total_rows == plain.total_rows and known.steps == plain.steps
    assert [known.row(p) for p in range(plain.total_rows + 1)] == [plain.row(p) for p in range(plain.total_rows + 1)]
    assert [known.state(p) for p in range(plain.total_rows)] == [plain.state(p) for p in range(plain.total_rows)]


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
