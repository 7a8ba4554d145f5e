"""How likely each label of each row is to a model, and what several models say together.

In: a model, a pattern, rows. Out: sums of log-probabilities of what the labels are said as, the token that ends the
answer included; the answers to one row share all tokens before them (`Model.score`). Letters: M models, N rows, K
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmit.errors import ConfigError
from mmit.pet.patterns import images_of

if TYPE_CHECKING:
    from mmit.generate import Model
    from mmit.pet.patterns import Pattern
    from mmit.pet.rows import Example

EMPTY = "N/A"  # what content-free fields say (arXiv:2102.09690)


def scores(
    model: Model, pattern: Pattern, examples: Sequence[Example], *, calibrate: bool = False, batch_size: int = 64
) -> np.ndarray:
    """Score the labels of rows: (N, K) float64, in the order of the pattern's labels.

    Args:
        calibrate: subtract the score of the same label for a row without content: texts that say N/A, and a blank
            picture (Zhao et al., arXiv:2102.09690).
        batch_size: most answers run at a time.

    Raises:
        RecordError: a row does not suit the pattern, or its picture cannot be read.
    """
    questions = [pattern.record(example.fields, where=example.where) for example in examples]
    found = np.array(model.score(questions, pattern.answers, with_end=True, batch_size=batch_size), dtype=np.float64)
    if not calibrate or not examples:
        return found.reshape(len(examples), len(pattern.answers))
    fields = {name: value if images_of(value) else EMPTY for name, value in examples[0].fields.items()}
    empty = pattern.record(fields, where="content-free")
    free = model.score([empty], pattern.answers, with_end=True, blank_images=True)
    return np.asarray(found - np.array(free[0]))


def soft_labels(
    given: Sequence[np.ndarray], *, weights: Sequence[float] | None = None, temperature: float = 2.0
) -> np.ndarray:
    """What models say together: (N, K) shares of the labels.

    Args:
        given: (N, K) scores of each model. weights: how much each counts; None, or zeros alone, for all alike.
        temperature: what the weighted mean of the scores is divided by before the softmax; the paper takes 2.

    Raises:
        ConfigError: no scores, or weights or a temperature that cannot be used.
    """
    if not given or len({array.shape for array in given}) > 1:
        raise ConfigError("the models have scored no rows, or different ones", remedy="Score the same rows with all.")
    if weights is not None and (len(weights) != len(given) or min(weights) < 0):
        problem = f"{len(weights)} weights for {len(given)} models, or one below 0"
        raise ConfigError(problem, where="weights", remedy="Give each model a weight of 0 or more.")
    if not temperature > 0:
        raise ConfigError(f"is {temperature}", where="temperature", remedy="Give a number above 0.")
    counted = None if weights is None or not any(weights) else list(weights)
    mean = np.average(np.stack(given), axis=0, weights=counted) / temperature
    shares = np.exp(mean - mean.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def accuracy(found: np.ndarray, examples: Sequence[Example], labels: Sequence[str]) -> float:
    """Share of labelled rows whose label has the best score: `found` (N, K)."""
    right = [labels.index(str(example.label)) for example in examples]
    return float((found.argmax(axis=1) == np.array(right)).mean())
