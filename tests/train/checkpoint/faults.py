"""A file system that fails on demand: counts every touch of a folder and fails, or ends the process, at one of them.

Works in a forked child, since an audit hook cannot be taken off again. Python's own file calls are seen by the audit
hook, fsync by a patch, and safetensors (written by Rust, unseen by Python) by patches before, in the middle of and
after each file.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from mmit.errors import CheckpointError

MODES = ("kill", "power", "ENOSPC", "EIO")
SAVED, REFUSED, OTHER_ERROR = 0, 20, 21  # exit codes of the child
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


class Faults:
    """Fail at touch number `at` (from 0) of anything under `root`; never for a negative number."""

    def __init__(self, root: Path, *, at: int, mode: str) -> None:
        self.root, self.at, self.mode = os.path.realpath(root), at, mode
        self.count, self.busy = 0, False
        self.synced: set[str] = set()
        self.touched: set[str] = set()

    def install(self) -> None:
        """Begin to count; cannot be undone in this process."""
        self._fsync, self._serialize = os.fsync, safetensors.torch.serialize_file
        os.fsync = self._sync  # type: ignore[assignment]
        safetensors.torch.serialize_file = self._write_tensors
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.busy or not arguments or isinstance(arguments[0], int):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith(self.root):
            return
        writing = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event == "open" and writing:
            self.touched.add(path)
        self._point(path, removing=event in ("os.remove", "os.rmdir"), writing=writing)

    def _sync(self, handle: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")
        self._point(path)
        self._fsync(handle)
        self.synced.add(path)

    def _write_tensors(self, tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        place = os.path.realpath(os.fsdecode(path))
        self.touched.add(place)
        self._point(place)
        self._serialize(tensors, path, *rest, **named)
        if self.count == self.at:
            os.truncate(path, os.path.getsize(path) // 2)
        self._point(place)
        self._point(place)

    def _point(self, path: str, *, removing: bool = False, writing: bool = True) -> None:
        number = self.count
        self.count += 1
        if self.at < 0 or number < self.at:
            return
        if self.mode == "ENOSPC":  # a full disk stays full, but lets go of files
            if writing and not removing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        elif number == self.at:
            if self.mode == "EIO":
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            if self.mode == "power":
                self._lose_power()
            os.kill(os.getpid(), signal.SIGKILL)

    def _lose_power(self) -> None:
        """What was never synced is half gone, wherever its folder was moved to."""
        self.busy = True
        synced = {os.path.basename(p) for p in self.synced}
        for path in {os.path.basename(p): p for p in self.touched}.values():
            if os.path.basename(path) in synced:
                continue
            for folder, _, names in os.walk(self.root):
                victim = os.path.join(folder, os.path.basename(path))
                if os.path.basename(path) in names and (".draft" in folder or victim == path):
                    os.truncate(victim, os.path.getsize(victim) // 2)


def in_child(action: Callable[[], None], root: Path, *, at: int, mode: str = "kill") -> tuple[int, int]:
    """Fork, run `action` with a fault; return (exit code or -signal, touches counted)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faults = Faults(root, at=at, mode=mode)
        code = OTHER_ERROR
        try:
            signal.alarm(60)
            faults.install()
            action()
            code = SAVED
        except CheckpointError as error:
            code = REFUSED if error.remedy and error.where else OTHER_ERROR
        finally:
            if code == OTHER_ERROR:
                traceback.print_exc()
            os.write(writer, str(faults.count).encode())
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(told or 0)
