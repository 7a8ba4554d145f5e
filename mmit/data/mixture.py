"""Order: which unit of data comes when, as a pure function of (seed, epoch).

Owns the mixing of sources and the walk through epochs. Holds no state: a position in the run is one integer, the
number of rows taken, so that resuming is arithmetic and does not depend on ranks or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def epoch_order(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """Shuffle one epoch of a mixture.

    Args:
        sizes: units in each source; source k owns the numbers from sum(sizes[:k]).
        weights: how often the units of a source are drawn in an epoch; 2.5 gives each twice and a fresh random
            half a third time.
        seed, epoch: decide everything else.

    Returns:
        int64 unit numbers in order.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    parts = []
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        own = np.arange(start, start + size, dtype=np.int64)
        whole, rest = int(weight), weight - int(weight)
        parts.extend([own] * whole)
        if rest > 0:
            parts.append(rng.choice(own, size=round(rest * size), replace=False))
        start += size
    order = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return order[rng.permutation(len(order))]


class Walk:
    """The rows of a run, epoch after epoch.

    Args:
        rows_of: epoch -> its rows, a pure function.
        epochs: passes, possibly fractional; or
        steps: optimizer steps. Exactly one is given.
        rows_per_step: rows in an optimizer step, over all ranks.
    """

    def __init__(
        self,
        rows_of: Callable[[int], list[list[int]]],
        *,
        rows_per_step: int,
        epochs: float | None = None,
        steps: int | None = None,
    ) -> None:
        self._rows_of = rows_of
        self._starts = [0]
        self._kept: tuple[int, list[list[int]]] = (-1, [])
        self.rows_per_step = rows_per_step
        if steps is not None:
            self.steps, self.total_rows = steps, steps * rows_per_step
        else:
            assert epochs is not None
            whole = int(epochs)
            self.total_rows = self._start(whole)
            if epochs > whole:
                self.total_rows += round((epochs - whole) * len(self._epoch(whole)))
            self.total_rows = max(self.total_rows, 1)
            self.steps = -(-self.total_rows // rows_per_step)

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._kept[0] != epoch:
            self._kept = (epoch, self._rows_of(epoch))
        return self._kept[1]

    def _start(self, epoch: int) -> int:
        """Rows before `epoch`."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        return self._starts[epoch]

    def row(self, position: int) -> list[int] | None:
        """Units of the row at `position`, or None past the end of the run (the last step may be short)."""
        if position >= self.total_rows:
            return None
        epoch = max(i for i, s in enumerate(self._starts) if s <= position)
        while position >= self._start(epoch + 1):
            epoch += 1
        return self._epoch(epoch)[position - self._starts[epoch]]

    def epoch_at(self, position: int) -> float:
        """Epochs completed before row `position`, as a fraction."""
        position = min(position, self.total_rows)
        epoch = 0
        while self._start(epoch + 1) <= position:
            epoch += 1
        return epoch + (position - self._starts[epoch]) / max(len(self._epoch(epoch)), 1)

    def micro_positions(self, step: int, *, rank: int, world: int, micro_rows: int) -> list[list[int]]:
        """Row positions of one step on one rank, micro-batch by micro-batch.

        Row p of a step belongs to rank p mod world. Every rank gets the same number of micro-batches.
        """
        first = step * self.rows_per_step
        mine = list(range(first + rank, first + self.rows_per_step, world))
        micros = -(-self.rows_per_step // (world * micro_rows))
        return [mine[i * micro_rows : (i + 1) * micro_rows] for i in range(micros)]
