"""What a run does at which step: learning rates, log lines, evaluations, saves; and which loss is a spike.

Pure functions of the step, and of a list of losses that the caller keeps, so that a resumed run decides alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def lr_factor(step: int, *, steps: int, schedule: str, warmup: float, min_ratio: float) -> float:
    """Factor on every peak learning rate: linear warm-up, then a schedule from 1 to a least.

    Args:
        step: from 0. steps: of the run.
        schedule: a name of SCHEDULES.
        warmup: steps, or below 1 a fraction of `steps`.
        min_ratio: the factor at the end.
    """
    warm = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < warm:
        return (step + 1) / warm  # the first step already moves: a rate of 0 would waste its data
    progress = (step - warm) / max(steps - warm, 1)
    return min_ratio + (1 - min_ratio) * SCHEDULES[schedule](progress)


LEAST = 16  # losses that a mean and a deviation are taken from


@dataclass(frozen=True)
class Spikes:
    """A loss is a spike above mean + sigma * standard deviation of the last `window` losses; None never.

    Reports only: a spike whose numbers are finite is trained on, since which records are bad is the user's to judge.
    """

    sigma: float | None
    window: int

    def bound(self, recent: list[float]) -> float:
        """Largest loss that is no spike."""
        # A deviation of a few losses says nothing, and in the first steps every loss is far from the one before.
        if self.sigma is None or len(recent) < min(LEAST, self.window):
            return math.inf
        return statistics.fmean(recent) + self.sigma * statistics.pstdev(recent)

    def remember(self, recent: list[float], loss: float) -> None:
        """Add a finite loss. A spike counts too, so that a level that rose for good is told once, not for ever."""
        if self.sigma is not None:
            recent.append(loss)
            del recent[: -self.window]


@dataclass(frozen=True)
class Schedule:
    """A run of `steps` steps."""

    steps: int
    rates: Mapping[str, float]  # peak learning rate of each trained component, the one that is shown first
    shape: str = "cosine"  # of SCHEDULES
    warmup: float = 0.03  # see `lr_factor`, as min_ratio
    min_ratio: float = 0.0
    log_every: int = 1
    save_every: int | None = None  # None only at the end
    eval_every: int | None = None
    spikes: Spikes = Spikes(None, 128)

    def lr_factor(self, step: int) -> float:
        """Factor on every peak learning rate at `step`, counted from 0."""
        return lr_factor(step, steps=self.steps, schedule=self.shape, warmup=self.warmup, min_ratio=self.min_ratio)

    def logs(self, step: int) -> bool:
        """Whether the step that makes `step` steps is written to metrics.jsonl; so below."""
        return self._due(step, self.log_every)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due."""
        return self._due(step, self.save_every)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due."""
        return self._due(step, self.eval_every)

    def _due(self, step: int, every: int | None) -> bool:
        """Every so many steps, and after the last whatever that is."""
        return step == self.steps or (every is not None and step % every == 0)
