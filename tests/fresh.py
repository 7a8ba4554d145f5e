"""Processes of their own, forked from one that has imported torch, transformers and PEFT and has computed nothing.

Importing them takes longer than what such a process is for. The one that forks begins before anything of mmit is
imported, and before oneDNN and ATen read the environment, which they do at their first operation: a child knows as
little of the tests as `python -m` does. A file of tests that runs by itself starts a new Python instead.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("torch", "transformers.modeling_utils", "peft")
LARGEST = 1 << 17  # bytes of a request: the environment
_ours: list[socket.socket] = []  # the end at which this process asks


def prepare() -> None:
    """Import what is needed, and fork the process that forks. It ends with this one."""
    if sys.platform != "linux" or _ours:
        return
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            _serve(theirs)
        finally:
            os._exit(1)
    theirs.close()
    _ours.append(mine)


def run_module(
    module: str, *arguments: str | Path, env: Mapping[str, str], timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run a module as `python -m` does, in the root of the repository."""
    given = [str(a) for a in arguments]
    if not _ours:
        command = [sys.executable, "-W", "ignore", *uncollected(module), *given]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        asked = json.dumps({"module": module, "arguments": given, "env": dict(env), "timeout": timeout}).encode()
        socket.send_fds(_ours[0], [asked], [out.fileno(), err.fileno()])
        code = int(_ours[0].recv(64))
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([module, *given], code, out.read(), err.read())


def uncollected(module: str) -> list[str]:
    """Arguments of Python that run a module as `-m` does, without collecting garbage while everything is imported."""
    return ["-c", f"import gc, runpy; gc.disable(); runpy.run_module({module!r}, run_name='__main__')"]


def _serve(asked: socket.socket) -> None:
    """Fork a child for each request, and answer with its exit code."""
    kept = asked.fileno()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 1 << 16 else 1 << 16)
    while True:
        message, handles, *_ = socket.recv_fds(asked, LARGEST, 2)
        if not message:
            os._exit(0)
        child = os.fork()
        if child == 0:
            asked.close()
            _become(handles, **json.loads(message))
        for handle in handles:
            os.close(handle)
        asked.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def _become(handles: list[int], *, module: str, arguments: list[str], env: dict[str, str], timeout: int) -> None:
    code = None
    try:
        signal.alarm(timeout)
        for number, handle in enumerate(handles, 1):
            os.dup2(handle, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(env)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        sys.argv[:] = [module, *arguments]
        runpy.run_module(module, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        if code is None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if code is None else code)
