"""SIGTERM and SIGINT as a request: finish the step at hand, save, leave with a stated exit code."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 143  # ended by SIGTERM or SIGINT after saving; 128 + 15 as shells report it


@contextmanager
def stop_asked(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Inside the block a signal interrupts nothing, a save least of all; the callable says whether one came.

    Further signals change nothing; only SIGKILL ends the process at once.
    """
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)

    old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    told: list[bool] = []

    def answer() -> bool:
        if asked and not told:  # not from the handler: it may have interrupted the very console
            told.append(True)
            say(f"{signal.Signals(asked[0]).name}: saving, then leaving with exit code {EXIT_STOPPED}")
        return bool(asked)

    try:
        yield answer
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
