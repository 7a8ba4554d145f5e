"""Order is arithmetic: complete, repeatable, and the same however the work is divided."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.data.mixture import BlockOrder, epoch_order, mixing_weights, mixture_order, units_in_epoch
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


def test_a_window_is_what_is_mixed() -> None:
    order = mixture_order([100_000], [1.0], seed=0, epoch=0, shuffle="block", window=2560)
    assert isinstance(order, BlockOrder)
    place = np.empty(100_000, int)
    place[order[:]] = np.arange(100_000)
    inside = np.arange(1, 100_000) % 10 != 0  # neighbours of one block, a 256th of the window
    assert np.abs(np.diff(place))[inside].max() < 2560
    assert isinstance(mixture_order([9], [1.0], seed=0, epoch=0, shuffle="global", limit=1), np.ndarray)
    with pytest.raises(ConfigError, match="did you mean 'global'"):
        mixture_order([9], [1.0], seed=0, epoch=0, shuffle="globl")


@given(mixture=MIXTURES, seed=SEEDS)
def test_an_epoch_has_as_many_units_as_is_said(mixture: tuple[list[int], list[float]], seed: int) -> None:
    for kind in ("global", "blocks"):
        assert len(order_of(kind, mixture, seed=seed)) == units_in_epoch(*mixture)


def test_the_memory_of_a_shuffle_is_what_the_readme_says() -> None:
    """Peak bytes a unit: 16 for a global shuffle, 24 a block and 16 a unit of the window for one by blocks."""
    tracemalloc.start()
    try:
        mixture_order([200_000], [1.0], seed=0, epoch=0, shuffle="global")
        assert tracemalloc.get_traced_memory()[1] < 200_000 * 16.5
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        order = mixture_order([2_000_000], [1.0], seed=0, epoch=0, shuffle="block", window=256_000)
        order[1_000_000:1_000_010]
        assert tracemalloc.get_traced_memory()[1] - before < 3 * 24 * 2000 + 17 * 256_000 + 50_000
    finally:
        tracemalloc.stop()


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


@pytest.mark.parametrize("scheme", ["proportional", "sqrt", "temperature", "equal"])
def test_fifty_thousand_draws_have_the_shares_of_the_scheme(scheme: str) -> None:
    """Within 1 % of the epoch, and any 10,000 neighbours within 2 %: the draws are mixed, not laid end to end."""
    sizes = [400, 3_000, 20_000, 70_000]
    weights = mixing_weights(sizes, scheme=scheme, cap=30_000, temperature=3.0, total=50_000)
    order = epoch_order(sizes, weights, seed=3, epoch=1)
    source = np.searchsorted(np.cumsum(sizes), order, side="right")
    assert len(order) == pytest.approx(50_000, abs=len(sizes))
    power = {"proportional": 1.0, "sqrt": 0.5, "temperature": 1 / 3, "equal": 0.0}[scheme]
    asked = np.array([min(size, 30_000) ** power for size in sizes])
    for part, bound in ((source, 0.01), (source[:10_000], 0.02), (source[-10_000:], 0.02)):
        shares = np.bincount(part, minlength=4) / len(part)
        np.testing.assert_allclose(shares, asked / asked.sum(), atol=bound)


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
