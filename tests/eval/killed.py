"""Runs one command of mmit again and again, each time in a fork that is killed at a random moment; then once whole.

    python -m tests.eval.killed FOLDER KILLS eval RUN ...

FOLDER is where its answers appear. Forks share the imports, so that ten starts take seconds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import peft  # noqa: F401
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama  # noqa: F401

import mmit.eval.summary
import mmit.generate  # noqa: F401
from mmit.cli import main

MOST_BYTES = 1500  # a killed process writes at most about so much before


def written(folder: Path) -> int:
    """Return the size of all answers on file."""
    return sum(path.stat().st_size for path in folder.glob("answers-*.jsonl"))


def start(arguments: list[str]) -> int:
    """Fork a process that runs the command; return its id."""
    process = os.fork()
    if process == 0:
        code: int | str | None = 1
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
    return process


def kill_one(folder: Path, arguments: list[str], draw: random.Random) -> bool:
    """Start the command and kill it; return whether it was still running then."""
    before, process = written(folder), start(arguments)
    enough, early = draw.randint(1, MOST_BYTES), draw.random() < 0.2
    deadline = time.monotonic() + (draw.random() * 0.3 if early else 60)
    while written(folder) < before + enough and time.monotonic() < deadline:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(draw.random() * 0.02)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    place, kills, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    chosen = random.Random(0)
    done = sum(kill_one(place, command, chosen) for _ in range(kills))
    status = os.waitstatus_to_exitcode(os.waitpid(start(command), 0)[1])
    print(f"killed {done}, then ended with {status}")  # noqa: T201
