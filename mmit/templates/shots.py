"""Few-shot prompts: solved examples of the same task before the question.

In: a rendered question and rendered examples of other rows. Out: one rendered question whose parts begin with the
examples, images included. `Pool` draws the rows: never the asked row, never one that shares an image with it, and
never two that share an image with each other.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

from mmit.errors import ConfigError
from mmit.records import Part, Text

if TYPE_CHECKING:
    from mmit.templates.render import Rendered

Row = TypeVar("Row")
_TRIES = 50


def with_shots(question: Rendered, shots: Sequence[Rendered]) -> Rendered:
    """Put solved examples before a question; each is its question, a line break, its answer, a blank line."""
    parts: list[Part] = []
    for shot in shots:
        parts += [*shot.parts, Text(f"\n{shot.target}\n\n")]
    return replace(question, parts=_joined([*parts, *question.parts]))


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join texts that follow each other."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        else:
            joined.append(part)
    return tuple(joined)


class Pool(Generic[Row]):
    """Rows that examples are drawn from, with what identifies their images.

    Args:
        rows: the rows. images: for each row the identities of its images (paths, digests); () for a text row.
    """

    def __init__(self, rows: Sequence[Row], images: Sequence[tuple[Hashable, ...]]) -> None:
        self.rows, self._images = rows, images

    def draw(
        self, count: int, *, rng: random.Random, images: Iterable[Hashable] = (), skip: int | None = None
    ) -> list[int]:
        """Return the positions of `count` rows to show before a question.

        Args:
            images: those of the question. skip: the position of the asked row, None if it is not in the pool.

        Raises:
            ConfigError: too few rows share no image.
        """
        taken: set[Hashable] = set(images)
        drawn: list[int] = []

        def take(at: int) -> None:
            if at != skip and at not in drawn and taken.isdisjoint(self._images[at]):
                drawn.append(at)
                taken.update(self._images[at])

        for _ in range(count * _TRIES):
            if len(drawn) < count and self.rows:
                take(rng.randrange(len(self.rows)))
        if len(drawn) < count:  # a small pool, or many rows on few images: look at every row in random order
            for at in rng.sample(range(len(self.rows)), len(self.rows)):
                if len(drawn) < count:
                    take(at)
        if len(drawn) < count:
            problem = f"{count} examples are asked for, but only {len(drawn)} rows share no image with the question"
            raise ConfigError(problem, where="shots", remedy="Ask for fewer examples, or give more rows.")
        return drawn


def check_shots(shares: Mapping[int, float]) -> None:
    """Refuse shares of numbers of examples that are negative or do not sum to 1. Raises ConfigError."""
    for count, share in shares.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= 32:
            raise ConfigError(f"'{count}' examples", where="shots", remedy="Give whole numbers from 0 to 32.")
        if share < 0:
            raise ConfigError(f"the share of {count} is {share}", where="shots", remedy="Give shares of 0 or more.")
    if abs(sum(shares.values()) - 1) > 1e-9:
        problem = f"the shares sum to {sum(shares.values()):g}"
        raise ConfigError(problem, where="shots", remedy="Let them sum to 1, e.g. shots: {0: 0.7, 2: 0.3}")
