"""What a user sets for each stage of a task, checked when it is set.

Refuses values that no stage could use, by the key of the YAML. See `stages.py` for what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmit.errors import ConfigError, nearest

WEIGHTS = ("accuracy", "uniform")


@dataclass(frozen=True)
class Fitting:
    """How a model is fitted to labelled rows.

    Attributes:
        repetitions: models a pattern, each with another seed; the paper takes 3.
        steps: optimizer steps of each.
        lm: part of the loss on the question; the authors' code takes 1 - 0.9999.
        tune: what is trained, as `mmit.train` takes it; None as the start's config says.
        settings: any other keys of the config, {"train.rows_per_step": 1}.
        seed: of the whole task.
    """

    repetitions: int = 3
    steps: int = 60
    lm: float = 1e-4
    tune: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_whole("fit.repetitions", self.repetitions)
        _check_whole("steps", self.steps)


@dataclass(frozen=True)
class Generations:
    """How models label for each other (iPET); the defaults but `count` are those of the authors' code.

    Attributes:
        count: of them; 1 is PET without iteration, the authors take 3.
        factor: by how much the rows of a model grow from one generation to the next.
        share: of the other models, those that label for one; one at least.
    """

    count: int = 1
    factor: float = 5.0
    share: float = 0.25

    def __post_init__(self) -> None:
        _check_whole("generations.count", self.count)
        if not _number(self.factor) or self.factor <= 1:
            remedy = "Give a number above 1, by which the rows grow."
            raise ConfigError(f"is {self.factor}", where="generations.factor", remedy=remedy)
        if not _number(self.share) or not 0 < self.share <= 1:
            raise ConfigError(f"is {self.share}", where="generations.share", remedy="Give a part of 1.")


@dataclass(frozen=True)
class Labelling:
    """How models label together.

    Attributes:
        weights: `accuracy`, that of a model on the labelled rows before it was fitted, or `uniform`.
        temperature, calibrate: see `soft_labels` and `scores`.
        pattern: the question of the labelled records, by its id; None for the first.
    """

    weights: str = "accuracy"
    temperature: float = 2.0
    calibrate: bool = False
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"is '{self.weights}'", where="label.weights", remedy=nearest(str(self.weights), WEIGHTS))
        if not _number(self.temperature) or self.temperature <= 0:
            problem = f"is {self.temperature}"
            raise ConfigError(problem, where="label.temperature", remedy="Give a number above 0; the paper takes 2.")
        if not isinstance(self.calibrate, bool):
            raise ConfigError(f"is {self.calibrate!r}", where="label.calibrate", remedy="Write true or false.")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"is {value!r}", where=name, remedy="Give a whole number, 1 or more.")
