"""Commands of mmit, each in a process of its own that need not import anything first.

A study runs hundreds of short commands, and importing torch and transformers takes a process seconds. So one process
imports them, computes nothing, and forks for each command (multiprocessing's forkserver; Linux). Elsewhere each command
starts a new Python. Whichever it is, a command sees what a user's would: its arguments, its environment, no input.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from mmit.processes import ended_by_kernel_with_parent

IMPORTED = ["mmit.train.run", "mmit.eval.summary", "mmit.generate"]
_one_at_a_time = threading.Lock()  # multiprocessing looks at all of its processes whenever it starts one


def run_command(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run `mmit WORDS` and return its exit code; what it prints is added to the log. Ends with this process."""
    return (_forked if sys.platform == "linux" else _started)(words, log, environment)


def _forked(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    child = context.Process(target=_become, args=(list(words), str(log), dict(environment)))
    with _one_at_a_time:
        child.start()
    try:
        wait([child.sentinel])
    except BaseException:  # Ctrl-C: the child heard it too, and saves what it has
        wait([child.sentinel])
        raise
    with _one_at_a_time:
        child.join()
        assert child.exitcode is not None
        return child.exitcode


def _become(words: list[str], log: str, environment: dict[str, str]) -> None:
    """In the fork: be the command."""
    ended_by_kernel_with_parent(signal.SIGTERM)()
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    # torch reads this one when it is loaded.
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdigit() and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    sys.argv[:] = ["mmit", *words]
    runpy.run_module("mmit", run_name="__main__", alter_sys=True)


def _started(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    with open(log, "ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "mmit", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            preexec_fn=ended_by_kernel_with_parent(signal.SIGTERM),
        )
        try:
            return child.wait()
        except BaseException:
            child.wait()
            raise
