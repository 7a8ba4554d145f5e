"""Lifetimes: processes that end with the one that started them, and folders that one process at a time may write.

Owns the start of every pool of workers and every lock. A worker whose parent is killed, as the kernel does for want of
memory, ends too. A lock ends with its process however that ends, since workers let go of it when they are forked.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError
from mmit.io import unwritable

_PR_SET_PDEATHSIG = 1
LOOK_S = 0.5  # between two looks at a parent that may be gone, or at a lock that another process holds
_held: set[int] = set()  # descriptors of locks, which a fork must let go of


def worker_pool(
    workers: int, *, begin: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """Return a pool of forked processes that end with this one; each calls `begin(*arguments)` first.

    Use it from the thread that made it: on Linux its workers may end with that thread.
    """
    # fork where there is one, since spawn would run a script without a main guard again in every worker.
    forks = "fork" in multiprocessing.get_all_start_methods()
    main = threading.current_thread() is threading.main_thread()
    return ProcessPoolExecutor(
        workers,
        mp_context=_forking() if forks else multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(), main, begin, arguments),
    )


def _forking() -> multiprocessing.context.BaseContext:
    """A context whose workers end though they ignore SIGTERM.

    A pool that lost a worker ends the others with `terminate`, and since Python 3.12 tells them in no other way: it
    would wait for them without end.
    """

    class Worker(multiprocessing.context.ForkProcess):
        def terminate(self) -> None:
            self.kill()

    class Context(multiprocessing.context.ForkContext):
        Process = Worker

    return Context()


def _begin(parent: int, main: bool, begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent(parent, at_once=main)
    if begin is not None:
        begin(*arguments)


def end_with_parent(parent: int, *, at_once: bool = False) -> None:
    """Make this process end when its parent `parent` is gone: one that is killed cannot tell its workers.

    Args:
        at_once: let the kernel do it (Linux); it goes by the thread that forked, so only where that was the main one.
    """
    if at_once and sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ended_by_kernel_with_parent(number: int) -> Callable[[], None]:
    """Return what a child calls before it becomes another program: signal `number` comes when the parent is gone.

    The kernel does it (Linux), so that it holds for programs that know nothing of it. It goes by the thread that
    started the child, which has to live as long. Elsewhere nothing is done.
    """

    def ask() -> None:
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)

    return ask


@contextmanager
def only_one(path: Path, what: str, *, folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, in which `what` ("run", "build") writes into `folder`.

    A lock whose process is gone is taken over, also after its machine started anew. What was left by another machine
    is not, since nothing tells here whether its process lives.

    Args:
        wait: told once who holds it, and then it is waited for; None refuses at once.

    Raises:
        ConfigError: another process holds it, or may; names its number and its machine.
        WriteError: the file cannot be made.
    """
    handle = _taken(path, what, folder) if wait is None else _taken_later(path, what, folder, wait)
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _taken_later(path: Path, what: str, folder: Path, wait: Callable[[str], None]) -> int:
    told = False
    while True:
        try:
            return _taken(path, what, folder)
        except ConfigError as held:
            if not told:
                wait(f"waiting: {held}")
            told = True
            time.sleep(LOOK_S)


def _taken(path: Path, what: str, folder: Path) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            free = _flock(handle)
            if free and not _still(path, handle):
                os.close(handle)  # its owner removed it between our opening and locking it
                continue
            owner = _owner(handle)
            if not free or _alive(owner):
                raise _refused(path, what, folder, owner, sure=not free)
            me = {"pid": os.getpid(), "host": platform.node(), "boot": _boot(), "since": time.time()}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me | {"began": _began(os.getpid())}).encode(), 0)
            return handle
        except OSError as error:
            os.close(handle)
            raise unwritable(path, error) from error
        except ConfigError:
            os.close(handle)
            raise


def _still(path: Path, handle: int) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _flock(handle: int) -> bool:
    """Lock the file; False if another has it. Where locks do not work, what the file says has to do."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _owner(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return found if isinstance(found, dict) else {}
    except ValueError:  # empty, or its owner is just writing it
        return {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the owner may be at work though the lock could be had: it did not go in peace."""
    if not owner:
        return False
    if owner.get("boot") == _boot():  # this machine, also in another container: its kernel would have kept the lock
        return owner.get("host") == platform.node() and _runs(owner)
    return owner.get("host") != platform.node()  # else it has started anew since


def _runs(owner: dict[str, Any]) -> bool:
    began = _began(owner.get("pid", -1))
    return began is not None and began == owner.get("began") and owner.get("pid") != os.getpid()


def _began(pid: int) -> str | None:
    """When a process began, which tells it from a later one of the same number; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "?"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _refused(path: Path, what: str, folder: Path, owner: dict[str, Any], *, sure: bool) -> ConfigError:
    who = "of which nothing is known"
    if owner:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(owner.get("since", 0)))
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {when}"
    remedy = "Wait for it, end it, or give another folder."
    if not sure:
        remedy += f" If it is gone, which cannot be seen from here ({platform.node()}), remove {path}."
    return ConfigError(f"another {what} is writing here: {who}", where=str(folder), remedy=remedy)


def _after_fork() -> None:
    """A child that kept the descriptor would hold the lock after its parent's death."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
