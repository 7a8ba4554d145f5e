"""Teachers whose requests are asked by the workers of a Ray cluster.

In: teachers and the pool of workers. Out: the same teachers, to a desk: their names, terms and replies do not change,
and the journal stays with the process that builds. Each worker opens the teachers for itself, a local model with its
first request. Limits of an endpoint hold for each worker.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mmit.errors import MmitError
from mmit.teachers import Reply, Request, Teacher, open_teachers

if TYPE_CHECKING:
    from mmit.build.executor import RayPool

Found = list["tuple[int, Reply] | MmitError"]
BATCH = 16  # requests of a teacher that says nothing of how many it takes at a time


class Asker:
    """The stage: requests to one of the teachers -> (place in the batch, reply), and last the error that ended it."""

    def __init__(self, described: Any, folder: str, *, lenient: bool = False) -> None:
        self._described, self._folder, self._lenient = described, folder, lenient
        self._teachers: list[Teacher] = []

    def __call__(self, batch: list[tuple[int, Request]]) -> Found:
        """Ask the teacher whose number the requests carry. What came in before an error is kept."""
        found: Found = []
        try:
            if not self._teachers:
                self._teachers = open_teachers(self._described, folder=self._folder, lenient=self._lenient)
            places = {request.digest: place for place, (_, request) in enumerate(batch)}
            for request, reply in self._teachers[batch[0][0]].ask([request for _, request in batch]):
                found.append((places[request.digest], reply))
        except MmitError as error:
            found.append(error)
        return found


class Spread:
    """A teacher whose requests the pool's workers ask; `number` is its place in what they open."""

    def __init__(self, teacher: Teacher, number: int, pool: RayPool) -> None:
        self.name, self.identity = teacher.name, teacher.identity
        self.terms, self.price = teacher.terms, teacher.price
        self._number, self._pool = number, pool
        self._size = int(getattr(teacher, "window", 0) or getattr(teacher, "in_flight", 0) or BATCH)

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Yield replies as batches finish. Raises MmitError after those in flight have been yielded."""
        failed: MmitError | None = None

        def batches() -> Iterator[list[tuple[int, Request]]]:
            left = iter(requests)
            while failed is None and (taken := list(itertools.islice(left, self._size))):
                yield [(self._number, request) for request in taken]

        for batch, found in self._pool.as_finished(batches()):
            for one in found:
                if isinstance(one, MmitError):
                    failed = failed or one
                else:
                    yield batch[one[0]][1], one[1]
        if failed is not None:
            raise failed
