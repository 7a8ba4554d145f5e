"""Work done ahead: in order, within its budget of bytes, and ended with whoever asked for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest

from mmit.data.prefetch import prefetched
from mmit.errors import MmitError, RecordError


def given(job: Callable[[int], bytes], sizes: list[int], **options: int):
    return prefetched(job, sizes, expected=lambda n: n, size=len, **{"workers": 2, "budget": 1000, **options})


def test_results_come_in_order() -> None:
    def job(n: int) -> bytes:
        time.sleep(0.02 if n % 3 == 0 else 0)
        return bytes(n)

    assert [len(r) for r in given(job, list(range(1, 40)))] == list(range(1, 40))


@pytest.mark.parametrize("budget", [1, 1000, 100_000])
def test_what_waits_never_passes_the_budget(budget: int) -> None:
    """A slow consumer: what was begun and not yet taken is within the budget, or one result for each worker."""
    begun = multiprocessing.get_context("fork").Value("l", 0)

    def job(n: int) -> bytes:
        with begun.get_lock():
            begun.value += n
        return bytes(n)

    sizes = [37 * i % 400 + 1 for i in range(60)]
    taken = most = 0
    for result in given(job, sizes, budget=budget):
        time.sleep(0.002)
        taken += len(result)
        most = max(most, begun.value - taken)
    assert taken == sum(sizes) and most <= max(budget, 2 * 400)
    if budget == 100_000:
        assert most > 1000  # it does run ahead where it may


def test_errors_keep_their_type_and_place() -> None:
    def job(n: int) -> bytes:
        if n == 3:
            raise RecordError("is bad", where="record 3", remedy="fix it")
        return bytes(n)

    results = given(job, [1, 2, 3, 4])
    assert len(next(results)) == 1 and len(next(results)) == 2
    with pytest.raises(RecordError, match="record 3: is bad") as error:
        next(results)
    assert error.value.remedy == "fix it"


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    def job(n: int) -> bytes:
        if n == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(n)

    with pytest.raises(MmitError, match="was killed"):
        list(given(job, list(range(10))))


def test_closing_ends_the_workers() -> None:
    results = given(lambda n: str(os.getpid()).encode(), [9] * 50)
    worker = int(next(results))
    os.kill(worker, 0)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        for _ in given(lambda n: os.write(writer, b"%d\n" % os.getpid()) * b"x", [9] * 50):
            time.sleep(60)
    os.close(writer)
    worker = int(os.read(reader, 100).split()[0])
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(100):
        time.sleep(0.1)
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
    raise AssertionError("the worker outlived its parent")
