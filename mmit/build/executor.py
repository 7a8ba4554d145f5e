"""Runs a stage of a build over batches, here or in processes.

A stage is a picklable callable: a batch in, a list out, each result decided by its own input alone. So where and by how
many it is run does not show in what a build writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mmit.build.annotated import Dropped, Made
from mmit.build.write import Line, line_of
from mmit.data.ahead import in_order

if TYPE_CHECKING:
    from pathlib import Path

BATCH = 100  # rows; those with images as bytes are some kilobytes each
A = TypeVar("A")
B = TypeVar("B")


class Lines:
    """A stage whose records leave it as the lines of a build's files: what is slow is done where the stage runs."""

    def __init__(self, stage: Callable[[list[Any]], list[Made | Dropped]], out: Path) -> None:
        self.stage, self.out = stage, out

    def __call__(self, batch: list[Any]) -> list[Line | Dropped]:
        """Return the lines of a batch. Raises what the stage raises."""
        return [line_of(item, self.out) if isinstance(item, Made) else item for item in self.stage(batch)]


def run(stage: Callable[[list[A]], Sequence[B]], rows: Iterable[A], *, workers: int = 0) -> Iterator[B]:
    """Yield the results of a stage in the order of its rows.

    Args:
        workers: processes; fewer than two for none. What waits between them is bounded.

    Raises what the stage raises. MmitError: a worker was killed.
    """
    found = in_order(stage, _batches(rows), workers=workers)
    try:
        for batch in found:
            yield from batch
    finally:
        found.close()


def _batches(rows: Iterable[A]) -> Iterator[list[A]]:
    source = iter(rows)
    while batch := list(itertools.islice(source, BATCH)):
        yield batch
