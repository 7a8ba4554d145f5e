"""The order of a run: which units fill row 0, 1, 2, ..., epoch after epoch.

Takes a pure function that fills rows from a stretch of the order; plans segment by segment, when one is reached, so
that memory and the cost of starting anywhere are those of one segment. A position is one integer, the rows taken. Its
`state` is one small JSON from which any number of ranks and workers goes on without planning what came before. Which
rows a step holds never depends on the ranks, so its loss does not either; only who computes a row does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from mmit.errors import ConfigError


def spread(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Places of `costs` for each rank, in the order they are to run.

    Rows are dealt in rounds of neighbours in cost, since ranks wait for each other in every micro-batch too, and the
    dearest row of a round goes to the rank that has least so far.
    """
    # Longest first: what is left for the last rounds is small enough to even the loads out. Ties by place, so that all
    # ranks deal alike.
    order = sorted(range(len(costs)), key=lambda place: (-costs[place], place))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for begin in range(0, len(order), ranks):
        # Every rank gets one row a round: the numbers of rows must be equal, or ranks would have other numbers of
        # micro-batches.
        poorest = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for rank, place in zip(poorest, order[begin : begin + ranks], strict=False):
            hands[rank].append(place)
            load[rank] += costs[place]
    return hands


def imbalance(costs: Sequence[float], ranks: int) -> float:
    """Largest over mean cost of a rank; 1.0 is perfect."""
    loads = [sum(costs[place] for place in hand) for hand in spread(costs, ranks)]
    return max(loads) * ranks / sum(loads) if sum(loads) else 1.0


# Units planned together. A row is filled from one segment only: the last row of each may stay emptier.
SEGMENT = 65_536
_KEPT = 3  # segments in memory: loading runs ahead of the step whose records may be asked for


@dataclass(frozen=True)
class Duration:
    """How long a run is.

    Attributes:
        rows_per_step: rows in an optimizer step, over all ranks.
        epochs: passes, possibly fractional; or
        steps: optimizer steps. Exactly one is given. With `epochs` all rows are planned once, to count them.
    """

    rows_per_step: int
    epochs: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Sharing:
    """How the rows of a step are shared out among ranks and micro-batches; with nothing set, one after the other.

    Attributes:
        cost_of: predicts what a row costs; ranks then get equal work instead of every world-th row.
        alike: a row's key; rows of a step with near keys then share micro-batches, and near ones run at the same time
            on all ranks.
    """

    cost_of: Callable[[list[int]], float] | None = None
    alike: Callable[[list[int]], tuple[int, ...]] | None = None


class RowOrder:
    """The rows of a run.

    Args:
        rows_of: (epoch, begin, end) -> rows filled from these places of the epoch's order; a pure function.
        duration: how long the run is.
        units: in an epoch.
        known: the `state` of an earlier run over the same order; rows before it cannot be asked for.
        counts: rows in the first segments, as far as they are known; these are not planned to be counted.
        segment: units planned together; part of the order, so a resumed run must have the same.
        sharing: among ranks and micro-batches.

    Raises:
        ConfigError: there is no row.
    """

    def __init__(
        self,
        rows_of: Callable[[int, int, int], list[list[int]]],
        duration: Duration,
        *,
        units: int,
        known: Mapping[str, Any] | None = None,
        counts: Iterable[int] = (),
        segment: int = SEGMENT,
        sharing: Sharing | None = None,
    ) -> None:
        if units < 1:
            # Planning would go from epoch to epoch for ever, looking for the first row.
            raise ConfigError("an epoch holds no row", remedy="Check the sources and their weights.")
        sharing = sharing or Sharing()
        self._rows_of, self._units, self._segment = rows_of, units, segment
        self._cost_of, self._alike = sharing.cost_of, sharing.alike
        self._segments = -(-units // segment)  # in an epoch; numbered on through the epochs
        # The first segment known, first row of it and of those after it. How many rows a segment gives is known only
        # once it is planned, since that depends on how its units fit; so rows are found by these sums, not by division.
        self._base, self._starts = 0, list(accumulate(counts, initial=0))
        if known is not None:
            self._base, self._starts = int(known["segment"]), [int(known["first_row"])]
        self._kept: OrderedDict[int, list[list[int]]] = OrderedDict()
        self.rows_per_step, self._epochs = duration.rows_per_step, duration.epochs
        if duration.steps is not None:
            self.steps, self.total_rows = duration.steps, duration.steps * self.rows_per_step
            return
        assert self._epochs is not None
        # The count of an earlier run holds only for as many epochs: a run may be resumed to go on longer.
        counted = known is not None and known["epochs"] == self._epochs
        self.total_rows = int(known["rows"]) if known and counted else self._count(self._epochs)
        self.steps = -(-self.total_rows // self.rows_per_step)

    @staticmethod
    def whole_segments(units: int, epochs: float, segment: int = SEGMENT) -> list[tuple[int, int, int]]:
        """(epoch, begin, end) of the segments that so many epochs hold whole, in order."""
        cuts = [(begin, min(begin + segment, units)) for begin in range(0, units, segment)]
        rest = int((epochs - int(epochs)) * units // segment)
        whole = [(epoch, begin, end) for epoch in range(int(epochs)) for begin, end in cuts]
        return whole + [(int(epochs), begin, end) for begin, end in cuts[:rest]]

    def _count(self, epochs: float) -> int:
        """Rows in so many epochs; where they end inside a segment, the share of its units is rounded to rows."""
        epoch, units = int(epochs), (epochs - int(epochs)) * self._units
        # Whole segments are counted exactly; of the last one, a share of its rows, since a row's place inside says
        # nothing about its units.
        segment = epoch * self._segments + int(units // self._segment)
        if segment < self._base:  # fewer epochs than were gone already
            return self._starts[0]
        rest = units % self._segment
        rows = self._start(segment)
        return max(rows + (round(rest / self._length(segment) * len(self._rows(segment))) if rest else 0), 1)

    def _length(self, segment: int) -> int:
        """Units in a segment; the last of an epoch has what is left."""
        return min(self._segment, self._units - segment % self._segments * self._segment)

    def _rows(self, segment: int) -> list[list[int]]:
        if segment not in self._kept:
            epoch, place = divmod(segment, self._segments)
            begin = place * self._segment
            # Planned whole even if one row of it is asked for: which units share a row depends on all that could.
            rows = self._rows_of(epoch, begin, begin + self._length(segment))
            if not rows:
                raise ConfigError("an epoch holds no row", remedy="Check the sources and their weights.")
            self._kept[segment] = rows
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(segment)
        return self._kept[segment]

    def _start(self, segment: int) -> int:
        """Rows before a segment."""
        while self._base + len(self._starts) <= segment:
            self._starts.append(self._starts[-1] + len(self._rows(self._base + len(self._starts) - 1)))
        return self._starts[segment - self._base]

    def _segment_at(self, position: int) -> int:
        self._check(position)
        segment = self._base + bisect_right(self._starts, position) - 1
        while position >= self._start(segment + 1):
            segment += 1
        return segment

    def _segment_behind(self, position: int) -> int:
        """The segment of the row before `position`, so that the end of one does not ask for the next."""
        self._check(position)
        segment = self._base + max(bisect_left(self._starts, position) - 1, 0)
        # Grows the list of starts as it goes: a run that is resumed far on plans only from its own segment.
        while position > self._start(segment + 1):
            segment += 1
        return segment

    def _check(self, position: int) -> None:
        if position < self._starts[0]:
            raise IndexError(f"row {position} lies before row {self._starts[0]}, from which the order is known")

    def row(self, position: int) -> list[int] | None:
        """Units of the row at `position`, or None past the end of the run (the last step may be short)."""
        if position >= self.total_rows:
            return None
        segment = self._segment_at(position)
        return self._rows(segment)[position - self._start(segment)]

    def state(self, position: int) -> dict[str, Any]:
        """What a later run needs to go on at row `position`: four numbers."""
        segment = self._segment_behind(min(position, self.total_rows))
        first = self._start(segment)
        return {"segment": segment, "first_row": first, "rows": self.total_rows, "epochs": self._epochs}

    def epoch_at(self, position: int) -> float:
        """Epochs completed before row `position`, as a fraction (of units; within a segment, of its rows)."""
        position = min(position, self.total_rows)
        segment = self._segment_behind(position)
        epoch, place = divmod(segment, self._segments)
        share = (position - self._start(segment)) / (self._start(segment + 1) - self._start(segment))
        return epoch + (place * self._segment + share * self._length(segment)) / self._units

    def micros(self, *, world: int, micro_rows: int) -> int:
        """Micro-batches of a step on every rank."""
        return -(-self.rows_per_step // (world * micro_rows))

    def micro_positions(self, step: int, *, rank: int, world: int, micro_rows: int) -> list[list[int]]:
        """Row positions of one step on one rank, micro-batch by micro-batch.

        Without costs row p of a step belongs to rank p mod world. Every rank gets the same number of micro-batches: a
        rank that had one fewer would not come to the reduction that the others wait in.

        Args:
            step: from 0. rank: of `world`. micro_rows: rows of a micro-batch.

        Returns:
            a list for each micro-batch. Past the end of the run positions name no row: such micro-batches are idle.
        """
        first = step * self.rows_per_step
        if self._alike is not None and micro_rows > 1:
            return self._alike_positions(step, world=world, micro_rows=micro_rows)[rank::world]
        if self._cost_of is None or world == 1:
            mine = list(range(first + rank, first + self.rows_per_step, world))
        else:
            mine = [first + place for place in spread(self._costs(step), world)[rank]]
        count = self.micros(world=world, micro_rows=micro_rows)
        return [mine[i * micro_rows : (i + 1) * micro_rows] for i in range(count)]

    def _alike_positions(self, step: int, *, world: int, micro_rows: int) -> list[list[int]]:
        """The step's rows cut into micro-batches by their keys: the first of every rank, the second, ..."""
        assert self._alike is not None
        first = step * self.rows_per_step
        rows = [(self.row(p), p) for p in range(first, first + self.rows_per_step)]
        order = [p for _, p in sorted((self._alike(row), p) for row, p in rows if row)]
        # Cut evenly and not into pieces of micro_rows: the last step has fewer rows, and all ranks get some of them.
        count = world * self.micros(world=world, micro_rows=micro_rows)
        cuts = [i * len(order) // count for i in range(count + 1)]
        return [order[begin:end] for begin, end in pairwise(cuts)]

    def imbalance(self, step: int, *, world: int, micro_rows: int = 1) -> float:
        """Predicted cost of the step's busiest rank over the mean of all; 1.0 where costs are unknown."""
        if self._cost_of is None or world == 1:
            return 1.0
        costs, first = self._costs(step), step * self.rows_per_step
        ranks = (self.micro_positions(step, rank=r, world=world, micro_rows=micro_rows) for r in range(world))
        loads = [sum(costs[p - first] for micro in micros for p in micro) for micros in ranks]
        return max(loads) * world / sum(loads) if sum(loads) else 1.0

    def _costs(self, step: int) -> list[float]:
        assert self._cost_of is not None
        first = step * self.rows_per_step
        rows = [self.row(p) for p in range(first, first + self.rows_per_step)]
        return [self._cost_of(row) if row else 0.0 for row in rows]
