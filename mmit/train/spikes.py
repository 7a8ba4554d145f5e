"""Loss spikes: a loss far above those of the steps before it.

Plain arithmetic over a list that the caller keeps (and stores in checkpoints, so that a resumed run judges alike).
Reports only: a spike whose numbers are finite is trained on, since which records are bad is the user's to judge.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

LEAST = 16  # losses that a mean and a deviation are taken from


@dataclass(frozen=True)
class Spikes:
    """A loss is a spike above mean + sigma * standard deviation of the last `window` losses; None never."""

    sigma: float | None
    window: int

    def bound(self, recent: list[float]) -> float:
        """Largest loss that is no spike."""
        if self.sigma is None or len(recent) < min(LEAST, self.window):
            return math.inf
        return statistics.fmean(recent) + self.sigma * statistics.pstdev(recent)

    def remember(self, recent: list[float], loss: float) -> None:
        """Add a finite loss. A spike counts too, so that a level that rose for good is told once, not for ever."""
        if self.sigma is not None:
            recent.append(loss)
            del recent[: -self.window]
