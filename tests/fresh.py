"""Processes of their own, forked from one that has imported torch, transformers and PEFT and has computed nothing.

Importing them takes longer than what such a process is for. The one that forks begins before anything of mmit is
imported, and before oneDNN and ATen read the environment, which they do at their first operation: a child knows as
little of the tests as `python -m` does. A file of tests that runs by itself starts a new Python instead.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


class Forked:
    """A child, with what `subprocess.Popen` has for it."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self._told, tell = os.pipe()
        handles = [self._out.fileno(), self._err.fileno(), tell]
        socket.send_fds(_ours[0], [json.dumps(request).encode()], handles)
        os.close(tell)
        self.args, self.returncode = [request["module"], *request["arguments"]], None
        self.pid = int(self._line(time.monotonic() + 120))

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end. Raises TimeoutExpired."""
        if self.returncode is None:
            self.returncode = int(self._line(time.monotonic() + timeout))
            os.close(self._told)
        for file in (self._out, self._err):
            file.seek(0)
        return self._out.read(), self._err.read()

    def kill(self) -> None:
        """End it now, if it has not ended."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def _line(self, until: float) -> bytes:
        text = b""
        while not text.endswith(b"\n"):
            if not select.select([self._told], [], [], max(until - time.monotonic(), 0))[0]:
                raise subprocess.TimeoutExpired(self.args, until)
            got = os.read(self._told, 1)
            assert got, f"the process that ran {self.args} is gone"
            text += got
        return text


def start(module: str, *arguments: str | Path, env: Mapping[str, str]) -> Any:
    """Start a module as `python -m` does, in the root of the repository."""
    given = [str(a) for a in arguments]
    if _ours and not any(name.startswith(_too_late()) for name in env):
        return Forked({"module": module, "arguments": given, "env": dict(env)})
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Without collecting garbage while everything is imported.
    code = f"import gc, runpy; gc.disable(); runpy.run_module({module!r}, run_name='__main__')"
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *given], cwd=ROOT, env=dict(env), **pipes)


def _too_late() -> tuple[str, ...]:
    """Beginnings of the variables that a fork would read too late.

    The allocator reads its own before all else; PEFT imports bitsandbytes where it is installed, and that computes.
    """
    computed = importlib.util.find_spec("bitsandbytes") is not None
    return ("MALLOC_", "ATEN_", "ONEDNN_") if computed else ("MALLOC_",)


def run_module(
    module: str, *arguments: str | Path, env: Mapping[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a module to its end."""
    process = start(module, *arguments, env=env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _serve(asked: socket.socket) -> None:
    """Fork for each request; the fork tells the child's number and exit code."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.closerange(3, asked.fileno())
    os.closerange(asked.fileno() + 1, 4096)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, handles, *_ = socket.recv_fds(asked, LARGEST, 3)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if os.fork() == 0:
            asked.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            child = os.fork()
            if child == 0:
                _become(handles, **request)
            os.write(handles[2], b"%d\n" % child)
            os.write(handles[2], b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
        for handle in handles:
            os.close(handle)


def _become(handles: list[int], *, module: str, arguments: list[str], env: dict[str, str]) -> None:
    code = None
    try:
        for number, handle in enumerate(handles[:2], 1):
            os.dup2(handle, number)
        for handle in handles:
            os.close(handle)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        sys.argv[:] = [module, *arguments]
        if (threads := env.get("OMP_NUM_THREADS", "")).isdigit() and "torch" in sys.modules:  # read when it is loaded
            sys.modules["torch"].set_num_threads(int(threads))
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        if code is None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if code is None else code)
