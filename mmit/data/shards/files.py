"""Files of shards, local or remote: opening, reading ranges, and running one job per shard in processes.

Owns the list of schemes. Anything else before "://", and every "pipe:", is refused: a path must not run a program.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import FileIO
from typing import Any, BinaryIO, TypeVar

from mmit.errors import MmitError
from mmit.processes import worker_pool
from mmit.records import short

REMOTE = ("hf", "s3", "http", "https")
_PACKAGES = {"hf": "huggingface_hub", "s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):")
_TRIES = 3
_OPEN_FILES = 128
T = TypeVar("T")


class ShardFileError(MmitError):
    """A shard or index cannot be reached. Not a fault of one record: skipping records would hide it."""

    missing = False  # whether it is known not to be there


def is_remote(path: str) -> bool:
    """Say whether `path` is a URL of an accepted scheme. Raises ShardFileError for any other scheme."""
    match = _SCHEME.match(path)
    if match is None:
        return False
    if match[1] not in REMOTE:
        remedy = f"Give a local path or one of {', '.join(f'{s}://' for s in REMOTE)}."
        raise ShardFileError(f"'{match[1] or match[2]}' is not an accepted scheme", where=short(path), remedy=remedy)
    return True


def filesystem(path: str) -> Any:
    """Return the fsspec filesystem of a URL. Raises ShardFileError, naming the package, if it is not installed."""
    scheme = path.partition("://")[0]
    package = _PACKAGES.get(scheme, "")
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        remedy = f"pip install fsspec {package}".rstrip()
        raise ShardFileError(f"{scheme}:// needs packages that are missing", where=path, remedy=remedy) from error


@contextmanager
def open_shard(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file for reading; give (file, size). Raises ShardFileError."""
    remote = is_remote(path)
    try:
        if remote:
            file = _open_remote(path)
        elif os.path.exists(path) and not os.path.isfile(path):
            # Opening a pipe or a device would wait for ever.
            raise ShardFileError("not a file", where=path, remedy="Check the path.")
        else:
            file = open(path, "rb")
        with file:
            yield file, file.size if remote else os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _unreachable(path, error) from error


def _open_remote(path: str) -> Any:
    files = filesystem(path)
    try:
        file = files.open(path, "rb")
    except Exception as error:
        # Each protocol has exceptions of its own, not all of them an OSError.
        raise _unreachable(path, error) from error
    if file.size is None:
        problem = "the server does not tell the size, so it cannot be read in ranges"
        raise ShardFileError(problem, where=path, remedy="Copy it to a disk, or to a server with range requests.")
    return file


def _unreachable(path: str, error: Exception) -> ShardFileError:
    cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
    remedy = "Check the path, the permissions and the connection, then run again: nothing was skipped."
    found = ShardFileError(f"cannot read: {short(cause, 160)}", where=path, remedy=remedy)
    found.missing = isinstance(error, FileNotFoundError)
    return found


class RangeReader:
    """Reads byte ranges of many files, from any thread. Opens lazily, in each process anew; the last used stay open."""

    def __init__(self) -> None:
        self._pid = 0
        self._renew()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def read(self, path: str, start: int, size: int) -> bytes:
        """Return `size` bytes from `start`, fewer if the file ends before. Raises ShardFileError."""
        # Asked at each read and not registered with fork: a reader may be pickled, forked or inherited, and only its
        # user knows when it is first read.
        if self._pid != os.getpid():
            # A forked child must not share connections with its parent; plain files do no harm, but stay its own.
            self._renew()
            self._pid = os.getpid()
        try:
            handle = self._handle(path)
            if isinstance(handle, FileIO):
                return _pread(handle.fileno(), start, size)
            return _fetch(handle, path, start, size)
        except (OSError, OverflowError) as error:
            raise _unreachable(path, error) from error

    def _handle(self, path: str) -> Any:
        with self._lock:
            if path not in self._open:
                self._open[path] = filesystem(path) if is_remote(path) else FileIO(path)
                if len(self._open) > _OPEN_FILES:
                    # Not closed here: a thread that still reads from it holds the last reference.
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return self._open[path]


def _pread(handle: int, start: int, size: int) -> bytes:
    # A read at a position moves no file pointer, so threads need no lock for a local file.
    data = os.pread(handle, size, start)
    while 0 < len(data) < size:
        more = os.pread(handle, size - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def _fetch(files: Any, path: str, start: int, size: int) -> bytes:
    """Fetch a range; a passing fault of the network is tried again."""
    for attempt in range(1, _TRIES + 1):
        try:
            data: bytes = files.cat_file(path, start=start, end=start + size)
            break
        except Exception as error:
            # What is not there will not be there in four seconds.
            if attempt == _TRIES or isinstance(error, FileNotFoundError):
                raise _unreachable(path, error) from error
            # Two and four seconds: longer than a passing fault, shorter than the patience of whoever waits for the
            # batch.
            time.sleep(2.0**attempt)
    if len(data) > size:
        # Not a fault of the record, which its checksum would make of it.
        problem = f"the server sends {len(data):,} bytes where a range of {size:,} was asked for"
        raise ShardFileError(problem, where=path, remedy="Copy it to a disk, or to a server with range requests.")
    return data


def run_jobs(job: Callable[..., T], arguments: Iterable[Sequence[Any]], *, workers: int) -> Iterator[T]:
    """Run `job(*arguments)` in `workers` processes; yield the results in the order of the arguments.

    At most two jobs per worker are in flight, so that a stream of arguments is never held whole. Raises what a job
    raises, and MmitError if a process is killed (often for want of memory).
    """
    if workers <= 1:
        for one in arguments:
            yield job(*one)
        return
    pool = worker_pool(workers)
    waiting: list[Future[T]] = []
    try:
        for one in arguments:
            waiting.append(pool.submit(job, *one))
            # Two each: while a worker's result waits to be taken, it has its next job already.
            if len(waiting) >= 2 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    except BrokenProcessPool as error:
        remedy = "It was probably out of memory: use fewer workers, or a smaller max_bytes."
        raise MmitError("a worker process was killed", remedy=remedy) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
