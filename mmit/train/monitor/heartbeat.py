"""Heartbeats: what each rank is doing, written to the run folder by a thread, so that a rank which stops has a name.

Every rank goes through the same phases in the same order, so the rank that has come least far is the one the others
wait for. Rank 0 watches all, rank 1 watches rank 0; `mmit run-status` reads the same files from outside. Reports only:
a long evaluation or save is no fault, and ending a run is the launcher's business.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmit.errors import WriteError
from mmit.train.monitor.run_files import HEARTBEATS, read_json, write_json

SILENT = 5  # heartbeats that may be missed before a rank counts as stopped
OVER = ("finished", "stopped")


@dataclass(frozen=True)
class Beat:
    """What one rank is doing."""

    rank: int
    step: int
    phase: str
    since: float  # seconds of the epoch at which the phase began
    moves: int  # phases begun so far
    time: float  # of writing
    host: str
    pid: int
    works: int = 0  # signs of work inside phases so far

    @property
    def doing(self) -> str:
        """As it is told: "data loading of step 12"."""
        return f"{self.phase} of step {self.step}"


def path_of(run_dir: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return run_dir / HEARTBEATS / f"rank-{rank:05d}.json"


def read_beats(run_dir: Path) -> dict[int, Beat]:
    """The heartbeats of a run, by rank."""
    found = [read_json(path, HEARTBEATS) for path in sorted((run_dir / HEARTBEATS).glob("rank-*.json"))]
    return {b["rank"]: Beat(**b) for b in found if b}


class Heartbeat:
    """This rank's heartbeat, and its eye on the others.

    Args:
        stall: seconds without a move after which a rank is reported; None does nothing at all.
        report: receives (message, facts) once for each standstill, from a thread.
        every: seconds between heartbeats; by default a tenth of `stall`, between 0.2 and 10.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world: int,
        stall: float | None,
        report: Callable[[str, dict[str, Any]], None],
        every: float | None = None,
    ) -> None:
        self.run_dir, self.rank, self.world, self.stall, self.report = run_dir, rank, world, stall, report
        self.every = every if every is not None else min(max((stall or 0) / 10, 0.2), 10.0)
        self._state: tuple[int, str, float, int, int] = (0, "start", time.time(), 0, 0)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._watch = Watch(world, stall or 0.0)
        if stall is None:
            return
        path_of(run_dir, rank).parent.mkdir(parents=True, exist_ok=True)
        for path in path_of(run_dir, rank).parent.glob("rank-*.json"):
            if rank == 0 and int(path.stem.removeprefix("rank-")) >= world:  # of an earlier start with more ranks
                path.unlink(missing_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int) -> None:
        """Begin a phase; every rank calls this in the same order."""
        # One assignment of a tuple, which the thread reads as a whole: no lock that a stalled rank could hold.
        self._state = (step, name, time.time(), self._state[3] + 1, self._state[4])

    def work(self) -> None:
        """Say that the phase goes on, by whatever does it: measuring millions of records takes longer than `stall`."""
        self._state = (*self._state[:4], self._state[4] + 1)

    def close(self, last: str) -> None:
        """Write a last heartbeat, "finished" or "stopped", and end the thread."""
        self.phase(last, self._state[0])
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            with suppress(WriteError):  # as in `_run`
                self._write()

    def _write(self) -> None:
        step, phase, since, moves, works = self._state
        beat = Beat(self.rank, step, phase, since, moves, time.time(), platform.node(), os.getpid(), works)
        # Not synced: after a power cut nobody wants to know, and an fsync every few seconds slows what writes data.
        write_json(path_of(self.run_dir, self.rank), asdict(beat), sync=False)

    def _run(self) -> None:
        watched = range(self.world) if self.rank == 0 else [0] if self.rank == 1 else []
        while not self._ended.wait(self.every):
            try:
                self._write()
                beats = read_beats(self.run_dir) if watched else {}
            except (OSError, WriteError):  # a full disk is told by what cannot do without it
                continue
            mine = {r: b for r, b in beats.items() if r < self.world}
            for rank, message, facts in self._watch.look(mine, now=time.monotonic(), every=self.every):
                if rank in watched:
                    self.report(message, facts)


class Watch:
    """Finds the rank that stands still. Goes by its own clock: those of several machines differ."""

    def __init__(self, world: int, stall: float) -> None:
        self.world, self.stall = world, stall
        self._moved: dict[int, tuple[int, float]] = {}  # rank -> (moves, when they were first seen)
        self._worked: dict[int, tuple[int, float]] = {}  # rank -> (signs of work, when they were first seen)
        self._written: dict[int, tuple[float, float]] = {}  # rank -> (time in the file, when it was first seen)
        self._told: dict[int, tuple[int, float]] = {}  # rank -> (moves, seconds that were told)

    def look(self, beats: Mapping[int, Beat], *, now: float, every: float) -> list[tuple[int, str, dict[str, Any]]]:
        """(rank, message, facts) of the ranks that stand still and were not told yet; again after twice as long."""
        for rank, beat in beats.items():
            if self._moved.get(rank, (-1, 0.0))[0] != beat.moves:
                self._moved[rank] = beat.moves, now
            if self._worked.get(rank, (0, 0.0))[0] != beat.works:
                self._worked[rank] = beat.works, now
            if self._written.get(rank, (-1.0, 0.0))[0] != beat.time:
                self._written[rank] = beat.time, now
        running = {r: b for r, b in beats.items() if b.phase not in OVER}
        if not running:
            return []
        # Whoever is further on waits for those: they are not told, or one fault would be reported by every rank.
        least = min(b.moves for b in running.values())
        behind = [rank for rank, beat in running.items() if beat.moves == least]
        # While one of them works, the others in its phase may wait for it. One that hangs is told once those have gone
        # on to the next phase.
        if any(rank in self._worked and now - self._worked[rank][1] < self.stall for rank in behind):
            return []
        told = []
        for rank, beat in running.items():
            still = now - self._moved[rank][1]
            moves, seconds = self._told.get(rank, (-1, 0.0))
            again = self.stall if moves != beat.moves else 2 * seconds
            if beat.moves == least and still >= again:
                self._told[rank] = beat.moves, still
                silent = now - self._written[rank][1] > max(SILENT * every, self.stall / 2)
                message = _message(beat, still, silent=silent, waiting=sum(b.moves > least for b in running.values()))
                facts = {"rank": rank, "phase": beat.phase, "seconds": round(still), "silent": silent}
                told.append((rank, message, {**facts, "step": beat.step, "host": beat.host, "pid": beat.pid}))
        return told


def _message(beat: Beat, still: float, *, silent: bool, waiting: int) -> str:
    if silent:
        what = f"gives no sign of life for {still:.0f} s and was last in {beat.doing}: stopped or gone"
    else:
        what = f"has been in {beat.doing} for {still:.0f} s"
    others = f"; {waiting} other rank{'s' * (waiting > 1)} further on wait{'s' * (waiting == 1)} for it"
    return f"rank {beat.rank} ({beat.host}, process {beat.pid}) {what}{others if waiting else ''}"
