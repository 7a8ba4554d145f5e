"""The cores of a CPU that other processes hold too.

Owns what is said and done about a busy machine: how OpenMP's threads wait, and how much of the cores others use. Does
not import torch, whose OpenMP reads the environment once, when it is loaded. Changes nothing that the user has set.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

# Each says how OpenMP's threads wait: one that is set is the user's choice.
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SPINS = "1000"  # of waiting, a few microseconds
KERNELS = "256"  # of each cache, where oneDNN's default is 1024
PROC = Path("/proc")
NOTABLE = 0.5  # cores
SHORTEST = 0.1  # seconds; the system counts in hundredths


class Others(NamedTuple):
    """What other processes use: `cores` of the `total` this process may use, and the busiest of them."""

    cores: float
    total: int
    busiest: str  # "name (pid)", "" where it cannot be seen

    def __str__(self) -> str:
        who = f", most of it {self.busiest}" if self.busiest else ""
        return f"other processes use {self.cores:.1f} of {self.total} cores{who}"


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let OpenMP's threads fall asleep after a short wait; returns whether anything was set.

    For the start of a program, before torch is imported; later it would have no effect, and is left undone. A thread
    that spins takes the core from the one it waits for as soon as another process wants a core too. One that sleeps at
    once makes a quiet machine slower. Of the waits measured by scripts/bench_busy.py this one loses nothing there
    (LAB.md). Child processes (ranks, data loader workers) inherit it. Known limit: only GNU's OpenMP reads it (torch on
    Linux).
    """
    if "torch" in sys.modules or any(name in environment for name in WAITING):
        return False
    environment["GOMP_SPINCOUNT"] = SPINS
    return True


def few_kernels(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound what oneDNN keeps for the shapes it has met, unless the environment says how much.

    For a process that answers for days, before torch is imported. In bf16 on a CPU every new length of a prompt adds
    its kernels and their memory, megabytes each time, up to 1,024 of them in each of two caches (LAB.md). One that gave
    way is made again in about a millisecond. Known limit: torch's oneDNN on x86 alone reads these names.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        environment.setdefault(name, KERNELS)


def usable() -> list[int]:
    """Numbers of the cores this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Watch:
    """Looks at what other process groups use of our cores, from when it is made until it is asked."""

    def __init__(self) -> None:
        self._group, self._cores = os.getpgrp(), usable()
        try:
            self._begin, self._busy, self._each = time.monotonic(), _busy(self._cores), _per_process()
        except (OSError, ValueError):
            self._each = {}

    def others(self) -> Others | None:
        """What they used meanwhile; None where the system does not tell, or after less than a tenth of a second."""
        if not self._each or (took := time.monotonic() - self._begin) < SHORTEST:
            return None
        spent, after = _busy(self._cores) - self._busy, _per_process()
        used = {pid: (own, ticks - self._each[pid][2]) for pid, (_, own, ticks) in after.items() if pid in self._each}
        ours = sum(ticks for own, ticks in used.values() if own == self._group)
        share = min(max(spent - ours, 0) / os.sysconf("SC_CLK_TCK") / took, len(self._cores))
        theirs = {pid: ticks for pid, (own, ticks) in used.items() if own != self._group and ticks > 0}
        top = max(theirs, key=lambda pid: theirs[pid], default=None)
        return Others(share, len(self._cores), "" if top is None else f"{after[top][0]} (pid {top})")

    def crowd(self) -> Others | None:
        """What others used, where it is enough to slow this process down."""
        found = self.others()
        return found if found is not None and found.cores >= NOTABLE else None


def _busy(cores: list[int]) -> int:
    """Clock ticks in which the given cores were at work, since the machine started."""
    names, ticks = {f"cpu{n}" for n in cores}, 0
    for line in (PROC / "stat").read_text().splitlines():
        name, *values = line.split()
        if name in names:
            user, nice, system, _, _, irq, soft = map(int, values[:7])
            ticks += user + nice + system + irq + soft
    return ticks


def _per_process() -> dict[int, tuple[str, int, int]]:
    """Of every process that can be seen: name, process group, clock ticks it has used."""
    found = {}
    for number in filter(str.isdigit, os.listdir(PROC)):
        try:
            with open(f"{PROC}/{number}/stat", "rb", buffering=0) as file:  # a machine may have thousands
                head, _, rest = file.read(4096).rpartition(b")")
        except OSError:  # it has ended meanwhile
            continue
        name, fields = head.partition(b"(")[2].decode(errors="replace"), rest.split(None, 13)
        found[int(number)] = (name, int(fields[2]), int(fields[11]) + int(fields[12]))
    return found
