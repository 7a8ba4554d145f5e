"""Order: which unit of data comes when, as a pure function of (seed, epoch, position).

Owns the weights of a mixture and its shuffling; `row_order.py` fills rows in this order. Holds no state and
reads nothing but the sizes of the sources. Up to GLOBAL_LIMIT units an epoch is one shuffled array; above that it is
shuffled block by block (see BlockOrder).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from mmit.errors import ConfigError, nearest

SCHEMES = ("proportional", "sqrt", "temperature", "equal")
# epoch_order holds 8 bytes a unit, and at its peak 16 (24 if a weight has a fraction): 1 GB makes 125 million units,
# 60 (40) million while the array is made.
GLOBAL_LIMIT = 100_000_000
SHUFFLES = ("auto", "global", "block")
WINDOW = 1 << 20


def mixing_weights(
    sizes: Sequence[int],
    *,
    scheme: str = "proportional",
    cap: int | None = None,
    temperature: float = 2.0,
    total: int | None = None,
) -> list[float]:
    """Return the weights for `epoch_order` that draw from the sources at the rates of a scheme.

    Args:
        sizes: units in each source.
        scheme: what a source's rate is proportional to, n being its size or `cap` if that is less: "proportional" n
            (examples-proportional mixing with the limit K of T5, section 3.5.2; FLAN takes K = 3000), "sqrt" the root
            of n (InstructBLIP), "temperature" n ** (1 / temperature) (T5), "equal" the same for all.
        total: units in an epoch; by default the sum of all n, so that "proportional" repeats nothing.

    Raises:
        ConfigError: an unknown scheme, or numbers that make no mixture.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"unknown mixing scheme '{scheme}'", remedy=nearest(scheme, SCHEMES))
    if any(size < 0 for size in sizes) or not any(sizes):
        raise ConfigError("the sources hold no unit to mix", remedy="Check the sources.")
    if (cap is not None and cap < 1) or not temperature > 0 or (total is not None and total < 1):
        problem = f"cap={cap}, temperature={temperature}, total={total} make no mixture"
        raise ConfigError(problem, remedy="Give positive numbers.")
    capped = [size if cap is None else min(size, cap) for size in sizes]
    power = {"proportional": 1.0, "sqrt": 0.5, "temperature": 1 / temperature, "equal": 0.0}[scheme]
    # Relative to the largest, so that no power overflows.
    largest = max(capped)
    rates = [(n / largest) ** power if n else 0.0 for n in capped]
    drawn = sum(capped) if total is None else total
    return [drawn * rate / sum(rates) / size if size else 0.0 for rate, size in zip(rates, sizes, strict=True)]


def _check_weights(sizes: Sequence[int], weights: Sequence[float]) -> None:
    if len(sizes) != len(weights):
        raise ConfigError(f"{len(weights)} weights for {len(sizes)} sources", remedy="Give one for each.")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight {weight} of a source", remedy="Give 0 or a positive number.")


def epoch_order(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """Shuffle one epoch of a mixture, globally.

    Args:
        sizes: units in each source; source k owns the numbers from sum(sizes[:k]).
        weights: how often the units of a source are drawn in an epoch; 2.5 gives each twice and a fresh random
            half a third time.
        seed, epoch: decide everything else.

    Returns:
        int64 unit numbers in order. Raises ConfigError for weights that are negative or not finite.
    """
    _check_weights(sizes, weights)
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    pairs = list(zip(sizes, weights, strict=True))
    # Which units come is decided source by source and before the shuffle: an epoch holds the same number of each,
    # whatever the seed.
    counts = [_drawn(size, weight) for size, weight in pairs]
    order = np.empty(sum(counts), dtype=np.int64)
    start = at = 0
    for (size, weight), count in zip(pairs, counts, strict=True):
        end = at + count
        for _ in range(int(weight)):
            order[at : at + size] = np.arange(start, start + size)
            at += size
        if weight > int(weight):
            # The fraction of a weight is a fresh draw in each epoch, without repetition, so that in the long run every
            # unit comes as often.
            order[at:end] = start + rng.choice(size, size=end - at, replace=False) if size else 0
        at, start = end, start + size
    rng.shuffle(order)
    return order


class BlockOrder:
    """One epoch of a mixture too large for an array in memory.

    The units are cut into blocks of `block` neighbours. All blocks are shuffled; then each run of `window` blocks,
    which lie anywhere in the data, is shuffled unit by unit. So two units of one block come within `block * window`
    positions of each other, while their window is anywhere in the epoch. A weight's fraction is drawn in
    whole blocks. Memory: 24 bytes a block and 16 bytes a unit of one window. With the defaults a window is 1,048,576
    units, and 1e9 units need 6 MB of blocks and 17 MB of window.

    Args: see `epoch_order`. `order[position]` and slices are pure functions of them.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        epoch: int,
        block: int = 4096,
        window: int = 256,
    ) -> None:
        _check_weights(sizes, weights)
        if block < 1 or window < 1:
            raise ConfigError(f"block={block}, window={window}", remedy="Give positive whole numbers.")
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        first = 0
        for size, weight in zip(sizes, weights, strict=True):
            own = np.arange(0, size, block, dtype=np.int64)
            length = np.minimum(block, size - own)
            starts.extend([own + first] * int(weight))
            lengths.extend([length] * int(weight))
            rest = round((weight - int(weight)) * size)
            if rest:
                some = rng.permutation(len(own))
                ends = np.cumsum(length[some])
                # As many whole blocks as the fraction needs; the last of them is cut, so that the count is exact.
                some = some[: int(np.searchsorted(ends, rest)) + 1]
                part = length[some]
                part[-1] -= ends[len(some) - 1] - rest
                starts.append(own[some] + first)
                lengths.append(part)
            first += size
        order = rng.permutation(sum(len(piece) for piece in starts))
        self._starts, self._lengths = np.concatenate(starts)[order], np.concatenate(lengths)[order]
        # Where each window begins, and where the last ends.
        ends = np.concatenate([[0], np.cumsum(self._lengths)])
        self._bounds = np.append(ends[:-1:window], ends[-1])
        self._seed, self._epoch, self._window = seed, epoch, window
        self._kept: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: slice) -> np.ndarray: ...
    def __getitem__(self, position: int | slice) -> int | np.ndarray:
        """Return the unit at `position`, or an int64 array for a slice, of which each window is shuffled once."""
        if isinstance(position, slice):
            begin, end, step = position.indices(len(self))
            if step != 1:
                return np.array([self[p] for p in range(begin, end, step)], np.int64)
            pieces = [np.zeros(0, np.int64)]
            while begin < end:
                w = self._window_of(begin)
                low, high = int(self._bounds[w]), int(self._bounds[w + 1])
                pieces.append(self._units(w)[begin - low : end - low])
                begin = high
            return np.concatenate(pieces)
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        position %= len(self)
        w = self._window_of(position)
        return int(self._units(w)[position - int(self._bounds[w])])

    def __iter__(self) -> Iterator[int]:
        for w in range(len(self._bounds) - 1):
            yield from self._units(w).tolist()

    def _window_of(self, position: int) -> int:
        return int(np.searchsorted(self._bounds, position, side="right")) - 1

    def _units(self, w: int) -> np.ndarray:
        """The units of window `w`, shuffled; the last one asked for is kept."""
        if self._kept[0] != w:
            chosen = slice(w * self._window, (w + 1) * self._window)
            blocks = zip(self._starts[chosen].tolist(), self._lengths[chosen].tolist(), strict=True)
            units = np.concatenate([np.arange(start, start + n, dtype=np.int64) for start, n in blocks])
            # w + 1, since numpy takes [seed, epoch] and [seed, epoch, 0] for the same seed.
            np.random.Generator(np.random.PCG64([self._seed, self._epoch, w + 1])).shuffle(units)
            self._kept = (w, units)
        return self._kept[1]


def mixture_order(
    sizes: Sequence[int],
    weights: Sequence[float],
    *,
    seed: int,
    epoch: int,
    shuffle: str = "auto",
    window: int = WINDOW,
    limit: int = GLOBAL_LIMIT,
) -> np.ndarray | BlockOrder:
    """Return the order of one epoch, indexed by position: the one that a run reads in.

    Args:
        shuffle: "global" an `epoch_order`, "block" a BlockOrder, "auto" the first up to `limit` units in an epoch.
        window: units that a BlockOrder shuffles together, in 256 blocks of neighbours.

    Raises:
        ConfigError: weights that are negative or not finite, an unknown shuffle.
    """
    if shuffle not in SHUFFLES:
        raise ConfigError(f"unknown shuffle '{shuffle}'", remedy=nearest(shuffle, SHUFFLES))
    # By units of an epoch and not of the sources: weights multiply what has to lie in memory.
    if shuffle == "global" or (shuffle == "auto" and units_in_epoch(sizes, weights) <= limit):
        return epoch_order(sizes, weights, seed=seed, epoch=epoch)
    return BlockOrder(sizes, weights, seed=seed, epoch=epoch, block=max(window // 256, 1), window=256)


def units_in_epoch(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Units in an epoch, the same in each. Raises ConfigError as `epoch_order`."""
    _check_weights(sizes, weights)
    return sum(_drawn(size, weight) for size, weight in zip(sizes, weights, strict=True))


def _drawn(size: int, weight: float) -> int:
    return int(weight) * size + round((weight - int(weight)) * size)
