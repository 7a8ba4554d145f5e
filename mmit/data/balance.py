"""Equal work for every rank: which of a step's rows goes where.

In: a predicted cost for each row. Out: the rows of each rank, as many for one as for another (give or take one). Which
rows a step holds is not decided here, so a step's loss does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence


def spread(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Places of `costs` for each rank, in the order they are to run.

    Rows are dealt in rounds of neighbours in cost, since ranks wait for each other in every micro-batch too, and the
    dearest row of a round goes to the rank that has least so far.
    """
    order = sorted(range(len(costs)), key=lambda place: (-costs[place], place))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for begin in range(0, len(order), ranks):
        poorest = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for rank, place in zip(poorest, order[begin : begin + ranks], strict=False):
            hands[rank].append(place)
            load[rank] += costs[place]
    return hands


def imbalance(costs: Sequence[float], ranks: int) -> float:
    """Largest over mean cost of a rank; 1.0 is perfect."""
    loads = [sum(costs[place] for place in hand) for hand in spread(costs, ranks)]
    return max(loads) * ranks / sum(loads) if sum(loads) else 1.0
