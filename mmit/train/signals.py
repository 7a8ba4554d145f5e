"""SIGTERM and SIGINT as a request: finish the step at hand, save, leave with a stated exit code.

A signal interrupts neither a step nor a save. It breaks off what comes before the first step, and an evaluation,
since neither changes what would be saved. A second signal, a moment later, leaves at once: the checkpoint under way is
lost, earlier ones are whole.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 143  # ended by SIGTERM or SIGINT after saving; 128 + 15 as shells report it
ECHO_SECONDS = 1.0  # a launcher passes on what its whole group has got already: the same wish, told twice


class StopNow(BaseException):
    """Leave work that can be dropped, because a signal came. Not an Exception, so that no `except` keeps it."""


class Stop:
    """Whether a signal came; made by `stop_asked`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._first: tuple[int, float] | None = None
        self._told = False
        self._leaving = False
        self._process = os.getpid()  # loader processes inherit the handler, and must not answer for the run

    def __call__(self) -> bool:
        """Say whether a signal came, and tell it the first time."""
        if self._first is not None and not self._told:  # not from the handler: it may have interrupted the console
            self._told = True
            self._say(
                f"{signal.Signals(self._first[0]).name}: saving, then leaving with exit code {EXIT_STOPPED} "
                "(a second signal leaves at once, without saving)"
            )
        return self._first is not None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Take a signal."""
        late = self._first is not None and time.monotonic() - self._first[1] > ECHO_SECONDS
        if late or os.getpid() != self._process:  # a forked helper has nothing to save
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)  # so that the exit status names the signal
        self._first = self._first or (signum, time.monotonic())
        if self._leaving:
            self._leaving = False
            raise StopNow

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside, a signal raises `StopNow`: for work that can be dropped anywhere."""
        if self._first is not None:
            raise StopNow
        self._leaving = True
        try:
            yield
        finally:
            self._leaving = False


@contextmanager
def stop_asked(say: Callable[[str], None]) -> Iterator[Stop]:
    """Inside the block SIGTERM and SIGINT are requests; the object says whether one came."""
    stop = Stop(say)
    old = {s: signal.signal(s, stop.handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
