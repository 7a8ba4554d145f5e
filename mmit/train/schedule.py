"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def lr_factor(step: int, *, steps: int, schedule: str, warmup: float, min_ratio: float) -> float:
    """Factor on every peak learning rate at `step` (from 0) of `steps`.

    Linear warm-up over `warmup` steps (a fraction of `steps` if below 1), then `schedule` from 1 to `min_ratio`.
    """
    warm = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(steps - warm, 1)
    return min_ratio + (1 - min_ratio) * SCHEDULES[schedule](progress)
