"""Runs a stage of a build over batches: here, in processes, or by the workers of a Ray cluster.

A stage is a picklable callable: a batch in, a list out, each result decided by its own input alone. So where and by how
many it is run does not show in what a build writes. Ray is imported here alone. Its workers are actors that live as
long as the build: a data set of Ray Data would start them, and load their models, anew for every round of requests.

They can ask teachers too: each worker opens those it gets for itself, a local model with its first request. To a desk
they are the same teachers: names, terms and replies do not change, and the journal stays with the process that builds.
Limits of an endpoint hold for each worker.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mmit.build.annotated import Dropped, Made
from mmit.build.write import Line, line_of
from mmit.data.prefetch import in_order
from mmit.errors import ConfigError, MmitError, nearest
from mmit.teachers import Reply, Request, Teacher, open_teachers

if TYPE_CHECKING:
    from pathlib import Path

AT_ONCE = 16  # requests of a teacher that says nothing of how many it takes at a time
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


def run(
    stage: Callable[[list[A]], Sequence[B]], rows: Iterable[A], *, workers: int = 0, cluster: str | None = None
) -> Iterator[B]:
    """Yield the results of a stage in the order of its rows.

    Args:
        workers: processes; fewer than two for none. What waits between them is bounded.
        cluster: runs it on Ray instead, see `RayPool`; `workers` are then its actors.

    Raises what the stage raises. MmitError: a worker was killed.
    """
    if cluster is not None:
        with RayPool(stage, cluster, workers) as pool:
            for results in pool.in_order(_batches(rows)):
                yield from results
        return
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


EXECUTORS = ("local", "ray")


def cluster_of(executor: str) -> str | None:
    """Return the cluster that `local`, `ray` or `ray:ADDRESS` names: None, "" for this machine's cores, or its address.

    Raises ConfigError.
    """
    kind, _, address = executor.partition(":")
    if kind not in EXECUTORS or (kind == "local" and address):
        remedy = f"{nearest(kind, EXECUTORS)} A cluster is ray:ADDRESS."
        raise ConfigError(f"unknown executor '{executor}'", where="--executor", remedy=remedy)
    return None if kind == "local" else address


class _Worker:
    """An actor that holds a stage, in the folder that relative paths start from."""

    def __init__(self, stage: Callable[[list[Any]], Any], folder: str) -> None:
        os.chdir(folder)
        self._stage = stage

    def run(self, batch: list[Any]) -> Any:
        return self._stage(batch)


class RayPool:
    """Actors on a Ray cluster, each with one core and the stage.

    Args:
        stage: what they run; it is pickled.
        cluster: address of a cluster, whose nodes see the same files at the same paths and have mmit installed; ""
            starts one with this machine's cores.
        workers: actors; 0 for one a core.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or there are more actors than cores, which would wait for
            each other for ever.
    """

    def __init__(self, stage: Callable[[list[Any]], Any], cluster: str = "", workers: int = 0) -> None:
        try:
            import ray
        except ImportError:
            remedy = "Install it: pip install 'mmit-tune[ray]'"
            raise ConfigError("Ray is not installed", where="--executor ray", remedy=remedy) from None
        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            local: dict[str, Any] = {} if cluster else {"include_dashboard": False}
            try:
                ray.init(cluster or "local", log_to_driver=False, logging_level="ERROR", **local)
            except (ConnectionError, RuntimeError, ValueError) as error:
                problem = f"no cluster answers at '{cluster}': {str(error).splitlines()[0]}"
                remedy = "Check the address, or write --executor ray to use this machine's cores."
                raise ConfigError(problem, where="--executor", remedy=remedy) from None
        cores = int(ray.cluster_resources().get("CPU", 0))
        if workers > cores or not cores:
            self.close()
            problem = f"{workers or 1} workers, but the cluster has {cores} cores"
            raise ConfigError(problem, where="--workers", remedy=f"Give at most {cores}, or 0 for one a core.")
        held = ray.put(stage)
        worker = ray.remote(_Worker).options(num_cpus=1)
        self._actors = [worker.remote(held, os.getcwd()) for _ in range(workers or cores)]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        for actor in getattr(self, "_actors", ()):
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()

    def in_order(self, batches: Iterable[list[Any]]) -> Iterator[Any]:
        """Yield the results in the order of the batches; two a worker are under way."""
        waiting: deque[Any] = deque()
        for batch, actor in zip(batches, itertools.cycle(self._actors), strict=False):
            # Dealt in turn, and waited for in the order of the batches: two under way keep an actor from standing still
            # while an earlier batch is slow, and no more results wait in memory.
            waiting.append(actor.run.remote(batch))
            if len(waiting) >= 2 * len(self._actors):
                yield self._got(waiting.popleft())
        while waiting:
            yield self._got(waiting.popleft())

    def as_finished(self, batches: Iterable[list[Any]]) -> Iterator[tuple[list[Any], Any]]:
        """Yield (batch, results) as they finish; one a worker is under way."""
        source, free = iter(batches), list(self._actors)
        running: dict[Any, tuple[Any, list[Any]]] = {}
        while True:
            while free and (batch := next(source, None)) is not None:
                actor = free.pop()
                running[actor.run.remote(batch)] = (actor, batch)
            if not running:
                return
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            actor, batch = running.pop(done)
            free.append(actor)
            yield batch, self._got(done)

    def _got(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MmitError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayActorError as error:
            # Ray's text ends with the cause where there is one, such as a module that a node lacks.
            problem = f"a worker of the cluster was lost: {str(error).strip().splitlines()[-1]}"
            raise MmitError(problem, where="--executor ray", remedy="Run the same command again.") from None


Found = list["tuple[int, Reply] | MmitError"]


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
        self._size = int(getattr(teacher, "window", 0) or getattr(teacher, "in_flight", 0) or AT_ONCE)

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
