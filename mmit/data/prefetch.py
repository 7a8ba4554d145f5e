"""Work done ahead of its consumer, in processes that end with it.

Owns the pool of workers and the bound on what waits: results come in the order of the arguments, whatever the number of
workers, and the bytes that lie ready or are being made never pass the budget (one result for each worker may lie there
in any case, or nothing could be made). Knows nothing of data.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from mmit.errors import MmitError
from mmit.processes import worker_pool

A = TypeVar("A")
T = TypeVar("T")
_MOST_PER_WORKER = 64  # small results: their number costs time to look through, not memory

_job: Callable[[Any], Any] | None = None


class Ahead(NamedTuple):
    """How far ahead of its consumer work may be: `workers` processes (0: none, each result is made when it is asked
    for), and `budget` bytes of results that may wait; one for each worker may in any case."""

    workers: int = 0
    budget: int = 256 << 20


def allowed_cores() -> int:
    """Cores that this process may use: those of its affinity mask, less where its control group allows less time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return max(min(cores, -(-int(quota) // int(period))), 1)
    except (OSError, ValueError):  # no control groups of version 2, or no limit ("max")
        return cores


def in_order(job: Callable[[A], T], arguments: Iterable[A], *, workers: int) -> Generator[T]:
    """Yield `job(argument)` for each argument, in order, made by `workers` forked processes, or here for less than two.

    For small results, of which each worker may have 64 waiting. Closing, signals and errors as `prefetched`.
    """
    if workers < 2:
        return (job(argument) for argument in arguments)
    return prefetched(job, arguments, workers=workers, budget=0, expected=lambda _: 0, size=lambda _: 0)


def prefetched(
    job: Callable[[A], T],
    arguments: Iterable[A],
    *,
    workers: int,
    budget: int,
    expected: Callable[[A], int],
    size: Callable[[T], int],
) -> Generator[T]:
    """Yield `job(argument)` for each argument, in order, made by `workers` forked processes.

    Closing the generator ends the workers; a caller that stops early must, or its process cannot end. They ignore
    SIGTERM and SIGINT, which a shell or scheduler sends to the whole group while the caller still needs them.

    Args:
        job: inherited by the workers, so it need not be picklable; its results must be.
        budget: bytes. expected: most bytes that an argument's result will have. size: bytes of a result.

    Raises:
        What the job raises. MmitError: a worker was killed.
    """
    pool = worker_pool(workers, begin=_begin, arguments=(job,))
    waiting: deque[tuple[Future[T], int]] = deque()
    source = iter(arguments)
    following = next(source, None)
    try:
        while following is not None or waiting:
            # Results are taken in order, so a slow one holds back those behind it: the budget counts them as well.
            while following is not None and len(waiting) < _MOST_PER_WORKER * workers:
                more = expected(following)
                # By what arguments may come to at most as long as they are not made, then by what they are.
                if len(waiting) >= workers and _held(waiting, size) + more > budget:
                    break
                waiting.append((pool.submit(_run, following), more))
                following = next(source, None)
            yield waiting.popleft()[0].result()
    except BrokenProcessPool as error:
        remedy = "it was probably out of memory: use fewer data.workers, or a smaller data.prefetch_mb"
        raise MmitError("a worker process that prepares data was killed", remedy=remedy) from error
    finally:
        # Waited for: workers that outlive their caller would hold its file descriptors and locks.
        pool.shutdown(wait=True, cancel_futures=True)


def _held(waiting: Iterable[tuple[Future[T], int]], size: Callable[[T], int]) -> int:
    """Bytes of what is ready, and what the rest may come to."""
    total = 0
    for future, most in waiting:
        made = future.done() and not future.cancelled() and future.exception() is None
        total += size(future.result()) if made else most
    return total


def _begin(job: Callable[[Any], Any]) -> None:
    global _job  # noqa: PLW0603
    _job = job
    gc.freeze()  # what was there before the fork is the parent's to collect: looking through it would copy its pages
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # their threads were not forked with this process
    os.environ["OMP_NUM_THREADS"] = "1"  # for a job that loads torch; loading it here would take seconds
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _run(argument: Any) -> Any:
    assert _job is not None
    return _job(argument)
