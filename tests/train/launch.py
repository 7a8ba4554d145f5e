"""Processes that train together on one machine, started as a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(
    arguments: list[str], *, ranks: int, timeout: float, check: bool = True, env: dict[str, str] | None = None
) -> list[str]:
    """Run `python ARGUMENTS` on gloo ranks, as a launcher would; return what each printed."""
    port = free_port()
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own |= env or {}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | own | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        said = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (out, err) in zip(processes, said, strict=True):
        assert not check or p.returncode == 0, out[-1500:] + err[-3000:]
    return [out + err for out, err in said]
