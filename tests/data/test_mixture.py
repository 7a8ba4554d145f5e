"""Order is arithmetic: complete, repeatable, and the same however the work is divided."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.data.mixture import BlockOrder, Walk, epoch_order, mixing_weights, mixture_order
from mmit.errors import ConfigError

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=5)
WEIGHT = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0, 1.5, 2.0, 3.3])
MIXTURES = SIZES.flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.lists(WEIGHT, min_size=len(sizes), max_size=len(sizes)))
)
SEEDS = st.integers(0, 2**40)


def order_of(kind: str, mixture: tuple[list[int], list[float]], *, seed: int = 0, epoch: int = 0) -> list[int]:
    if kind == "global":
        return epoch_order(*mixture, seed=seed, epoch=epoch).tolist()
    return list(BlockOrder(*mixture, seed=seed, epoch=epoch, block=7, window=3))


@pytest.mark.parametrize("kind", ["global", "blocks"])
@given(mixture=MIXTURES, seed=SEEDS, epoch=st.integers(0, 5))
def test_each_unit_comes_as_often_as_its_weight_says(
    kind: str, mixture: tuple[list[int], list[float]], seed: int, epoch: int
) -> None:
    order = order_of(kind, mixture, seed=seed, epoch=epoch)
    assert order == order_of(kind, mixture, seed=seed, epoch=epoch)
    counts = np.bincount(order, minlength=sum(mixture[0])) if order else np.zeros(sum(mixture[0]), int)
    start = 0
    for size, weight in zip(*mixture, strict=True):
        own = counts[start : start + size]
        assert own.sum() == int(weight) * size + round((weight - int(weight)) * size)
        assert set(own.tolist()) <= {int(weight), math.ceil(weight)}
        start += size


@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_seed_and_epoch_change_the_order(kind: str) -> None:
    mixture = ([50, 30], [1.0, 1.0])
    orders = {tuple(order_of(kind, mixture, seed=s, epoch=e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_a_fraction_is_drawn_anew_each_epoch() -> None:
    drawn = np.concatenate([epoch_order([40], [0.5], seed=1, epoch=e) for e in range(12)])
    assert len(np.unique(drawn)) == 40


@given(mixture=MIXTURES, seed=SEEDS, where=st.tuples(st.integers(0, 300), st.integers(0, 300)), step=st.integers(1, 3))
def test_block_order_can_be_entered_anywhere(
    mixture: tuple[list[int], list[float]], seed: int, where: tuple[int, int], step: int
) -> None:
    def make() -> BlockOrder:
        return BlockOrder(*mixture, seed=seed, epoch=1, block=5, window=4)

    whole = list(make())
    begin, end = where
    assert make()[begin:end:step].tolist() == whole[begin:end:step]
    if begin < len(whole):
        assert make()[begin] == whole[begin] and make()[begin - len(whole)] == whole[begin]
    with pytest.raises(IndexError):
        make()[len(whole)]


def test_block_order_mixes_within_its_stated_window_and_places_windows_anywhere() -> None:
    order = np.array(BlockOrder([100_000], [1.0], seed=0, epoch=0, block=100, window=10)[:])
    place = np.empty(100_000, int)
    place[order] = np.arange(100_000)
    apart = np.abs(np.diff(place))
    inside = np.arange(1, 100_000) % 100 != 0  # neighbours of one block
    assert apart[inside].max() < 1000 and apart[~inside].max() > 50_000
    early = np.sort(order[:1000])
    assert early[-1] - early[0] > 50_000


def test_a_billion_units_take_little_memory() -> None:
    order = mixture_order([600_000_000, 400_000_000], [1.0, 1.5], seed=1, epoch=2)
    assert isinstance(order, BlockOrder) and len(order) == 1_200_000_000
    held = order._starts.nbytes + order._lengths.nbytes + order._bounds.nbytes
    assert held < 6_000_000
    assert len(np.unique(order[900_000_000:900_001_000])) == 1000


def test_small_mixtures_are_shuffled_globally() -> None:
    small = mixture_order([5], [1.0], seed=1, epoch=2)
    assert isinstance(small, np.ndarray) and small.tolist() == epoch_order([5], [1.0], seed=1, epoch=2).tolist()
    assert isinstance(mixture_order([5], [1.0], seed=1, epoch=2, limit=4), BlockOrder)


# --- weights --------------------------------------------------------------------------------------------------------


def rates(sizes: list[int], weights: list[float]) -> list[float]:
    drawn = [size * weight for size, weight in zip(sizes, weights, strict=True)]
    return [d / sum(drawn) for d in drawn]


def test_schemes_draw_at_the_rates_of_their_papers() -> None:
    sizes = [100, 10_000, 1_000_000]
    assert mixing_weights(sizes) == pytest.approx([1, 1, 1])
    assert mixing_weights(sizes, cap=3000) == pytest.approx([1, 0.3, 0.003])
    assert rates(sizes, mixing_weights(sizes, scheme="sqrt")) == pytest.approx([10 / 1110, 100 / 1110, 1000 / 1110])
    half = mixing_weights(sizes, scheme="temperature", temperature=2)
    assert half == pytest.approx(mixing_weights(sizes, scheme="sqrt"))
    assert rates(sizes, mixing_weights(sizes, scheme="equal")) == pytest.approx([1 / 3] * 3)
    assert rates(sizes, mixing_weights(sizes, scheme="temperature", temperature=1e9)) == pytest.approx([1 / 3] * 3)


@given(
    sizes=st.lists(st.integers(0, 10**9), min_size=1, max_size=6).filter(any),
    scheme=st.sampled_from(["proportional", "sqrt", "temperature", "equal"]),
    cap=st.none() | st.integers(1, 10**9),
    total=st.none() | st.integers(1, 10**9),
    temperature=st.floats(0.1, 100),
)
def test_weights_add_up_to_the_epoch(
    sizes: list[int], scheme: str, cap: int | None, total: int | None, temperature: float
) -> None:
    weights = mixing_weights(sizes, scheme=scheme, cap=cap, total=total, temperature=temperature)
    drawn = sum(size * weight for size, weight in zip(sizes, weights, strict=True))
    expected = total or sum(min(size, cap or size) for size in sizes)
    assert drawn == pytest.approx(expected)
    assert all(weight >= 0 and (size or not weight) for size, weight in zip(sizes, weights, strict=True))


def test_wrong_mixtures_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sqrt'"):
        mixing_weights([1], scheme="sqr")
    with pytest.raises(ConfigError, match="no unit"):
        mixing_weights([0, 0])
    with pytest.raises(ConfigError, match="positive numbers"):
        mixing_weights([1], temperature=0)
    for weight in (-1.0, math.nan, math.inf):
        for make in (epoch_order, BlockOrder, mixture_order):
            with pytest.raises(ConfigError, match="weight"):
                make([3], [weight], seed=0, epoch=0)
    with pytest.raises(ConfigError, match="2 weights for 1 sources"):
        epoch_order([3], [1.0, 1.0], seed=0, epoch=0)


# --- the walk -------------------------------------------------------------------------------------------------------


def rows_of(epoch: int) -> list[list[int]]:
    """Rows of one or two units; their number differs from epoch to epoch, as with packing."""
    order = epoch_order([23], [1.0], seed=5, epoch=epoch).tolist()
    width = 1 + epoch % 2
    return [order[i : i + width] for i in range(0, len(order), width)]


RUNS = st.tuples(st.integers(1, 9), st.floats(0.1, 4.0), st.integers(1, 5), st.integers(1, 4))


@given(run=RUNS)
def test_ranks_and_micro_batches_partition_every_step(run: tuple[int, float, int, int]) -> None:
    rows_per_step, epochs, world, micro_rows = run
    walk = Walk(rows_of, rows_per_step=rows_per_step, epochs=epochs)
    seen: list[int] = []
    for step in range(walk.steps):
        ranks = [walk.micro_positions(step, rank=r, world=world, micro_rows=micro_rows) for r in range(world)]
        assert len({len(micros) for micros in ranks}) == 1  # or ranks would wait for each other for ever
        assert all(len(micro) <= micro_rows for micros in ranks for micro in micros)
        seen.extend(sorted(p for micros in ranks for micro in micros for p in micro))
    assert seen == list(range(walk.steps * rows_per_step))
    assert [walk.row(p) is None for p in seen] == [p >= walk.total_rows for p in seen]


@given(run=RUNS)
def test_every_unit_comes_once_an_epoch_whatever_the_division(run: tuple[int, float, int, int]) -> None:
    rows_per_step, _, world, micro_rows = run
    walk = Walk(rows_of, rows_per_step=rows_per_step, epochs=3)
    rows = []
    for step in range(walk.steps):
        for rank in range(world):
            for micro in walk.micro_positions(step, rank=rank, world=world, micro_rows=micro_rows):
                rows.extend(row for p in micro if (row := walk.row(p)) is not None)
    assert np.bincount([unit for row in rows for unit in row]).tolist() == [3] * 23
    assert len(rows) == walk.total_rows


@given(run=RUNS, at=st.floats(0, 1))
def test_a_fresh_walk_continues_where_another_stopped(run: tuple[int, float, int, int], at: float) -> None:
    rows_per_step, epochs, _, _ = run
    whole = Walk(rows_of, rows_per_step=rows_per_step, epochs=epochs)
    everything = [whole.row(p) for p in range(whole.total_rows)]
    position = int(at * whole.total_rows)
    resumed = Walk(rows_of, rows_per_step=rows_per_step, epochs=epochs)
    assert [resumed.row(p) for p in range(position, whole.total_rows)] == everything[position:]
    assert resumed.row(whole.total_rows) is None
    assert resumed.epoch_at(position) == whole.epoch_at(position)
    assert whole.epoch_at(whole.total_rows) == pytest.approx(epochs, abs=0.1)


@given(steps=st.integers(1, 30), rows_per_step=st.integers(1, 9))
def test_steps_instead_of_epochs(steps: int, rows_per_step: int) -> None:
    walk = Walk(rows_of, rows_per_step=rows_per_step, steps=steps)
    assert walk.steps == steps and walk.total_rows == steps * rows_per_step
    assert walk.row(walk.total_rows - 1) is not None and walk.row(walk.total_rows) is None


def test_a_walk_over_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no row"):
        Walk(lambda epoch: [], rows_per_step=2, steps=3).row(0)
