"""Files that appear whole or not at all, lines that are added to one, and the one message of a disk that takes no more.

In: a path and what to write. Out: the file, or a WriteError that names it. Nothing else in mmit writes a draft and
renames it, except whole folders (`train/folders.py`, `data/store.py`, `build/write.py`) and tars
(`data/shards/writer.py`).
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mmit.errors import WriteError

# EFBIG: a limit on the size of a file, as `ulimit -f` and some disks have one.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unwritable(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """Return the message for a file or folder that could not be written."""
    remedy = "Check that its folder can be written."
    if error.errno in FULL:
        remedy = "The disk is full, or this user's share of it: free space, or choose another folder."
    return WriteError(f"cannot write: {error.strerror or error}", where=os.fspath(path), remedy=remedy)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a draft that takes the name `path` when the block ends well, with its folder if there is none.

    With `sync` the file is there also when the power goes. After an error, and at every instant, what was there before
    is there still. Raises WriteError.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a terminal, a pipe
        try:
            with open(path, "wb") as file:
                yield file
            return
        except OSError as error:
            raise unwritable(path, error) from error
    target = Path(os.path.realpath(path))  # a link stays one
    # Nodes may share the folder, and have processes of the same number.
    draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # usually it has its new name by now
            draft.unlink()


def write_atomic(path: str | os.PathLike[str], content: str | bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file that appears whole or not at all; text as UTF-8, half of a surrogate pair as `?`.

    Raises WriteError.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with whole_file(path, sync=sync) as file:
        file.write(data)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Add whole lines to a file. Raises WriteError; what a full disk took of them is taken back."""
    data = text.encode("utf-8", "replace")
    try:
        # Unbuffered: what could not be written must not be tried again when the file is closed.
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise
    except OSError as error:
        raise unwritable(path, error) from error


def drop_half_line(path: str | os.PathLike[str]) -> None:
    """Cut off what a killed process left of the last line of a file that grows by whole lines. Raises WriteError."""
    try:
        content = Path(path).read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def unless_failing() -> Iterator[None]:
    """Let no failed write of the block hide the error that is under way; without one it is raised as WriteError."""
    under_way = sys.exc_info()[0] is not None
    try:
        yield
    except (WriteError, OSError) as error:
        if not under_way:
            raise error if isinstance(error, WriteError) else unwritable(error.filename or "", error) from error
