"""Holes in the heap of a process that answers for days, given back to the system.

Blocks of many lengths live between short-lived ones; what those leave, glibc keeps for itself, and it has no bound
(LAB.md). Owns when it is asked for them: at rest, and now and then at work. Other C libraries have no such call, and
are left alone.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

REST_S = 5.0  # without a request: shorter, and the next question of a conversation would wait for its pages again
WORK_S = 30.0  # between two times under load: each takes a fraction of a step of decoding, and the pages' return


def give_back() -> None:
    """Return what is free inside the heap to the system, where libc can."""
    if _trim is not None:
        _trim(0)  # other threads go on meanwhile: ctypes holds no lock of Python's


def _found() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # Windows opens no None; musl and macOS have no malloc_trim
        return None
    found.argtypes = [ctypes.c_size_t]
    return found


_trim = _found()


class Holes:
    """Gives the heap's holes back for one thread that works and waits."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def between_steps(self) -> None:
        """At work: give them back if the last time is long ago."""
        if time.monotonic() - self._last >= WORK_S:
            self._give_back()

    def wait(self, bell: threading.Event) -> None:
        """Wait for a bell, and give them back if it does not ring for a while."""
        if not bell.wait(REST_S):
            self._give_back()
            bell.wait()

    def _give_back(self) -> None:
        give_back()
        self._last = time.monotonic()
