"""Packed data files: what lies in a .gz or a .zip is unpacked into a scratch folder while it is read.

A zip must hold exactly one file. Other packings are refused by name. Told by the first bytes, not by the file's name.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from mmit.errors import RecordError
from mmit.records import short

_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
# First bytes of what is not unpacked here -> its name, and the command that unpacks it.
_OTHERS: dict[bytes, tuple[str, str]] = {
    b"\x28\xb5\x2f\xfd": ("Zstandard (.zst)", "zstd -d FILE"),
    b"\xfd7zXZ\x00": ("xz (.xz)", "xz -dk FILE"),
    b"BZh": ("bzip2 (.bz2)", "bzip2 -dk FILE"),
    b"\x04\x22\x4d\x18": ("LZ4 (.lz4)", "lz4 -d FILE"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip (.7z)", "7z x FILE"),
}


def packing(path: str) -> str:
    """Return "gzip" or "zip" for a packed file, else "". Raises RecordError for a packing that is not read."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, (name, command) in _OTHERS.items():
        if head.startswith(magic):
            problem = f"is packed with {name}, which mmit does not unpack"
            remedy = f"Unpack it ({command}) and give the file, or pack it as .gz."
            raise RecordError(problem, where=path, remedy=remedy)
    return "gzip" if head[:2] == _GZIP else "zip" if head[:4] == _ZIP else ""


@contextmanager
def unpacked(path: str) -> Iterator[str]:
    """Give the path of the data, unpacked for as long as the context lasts where it is packed.

    Raises RecordError for a damaged file, and for a zip of several files.
    """
    kind = packing(path)
    # Left to the reader of tars, whose refusal says what is wrong with a compressed one.
    if not kind or path.lower().endswith((".tar.gz", ".tgz")):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mmit-") as folder:
        try:
            file = _gunzip(path, folder) if kind == "gzip" else _unzip(path, folder)
        except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
            problem = f"a damaged {kind} file: {short(str(error))}"
            raise RecordError(problem, where=path, remedy="Fetch it again, or unpack it and give the file.") from error
        except (NotImplementedError, RuntimeError) as error:  # zipfile: another compression, a password
            problem = f"a zip that cannot be read: {short(str(error))}"
            raise RecordError(problem, where=path, remedy="Unpack it and give the file.") from error
        yield file


def _gunzip(path: str, folder: str) -> str:
    name = os.path.basename(path)
    target = os.path.join(folder, name[:-3] if name.lower().endswith(".gz") else name)
    with gzip.open(path, "rb") as packed, open(target, "wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return target


def _unzip(path: str, folder: str) -> str:
    with zipfile.ZipFile(path) as archive:
        entries = [e for e in archive.infolist() if not e.is_dir() and not e.filename.startswith("__MACOSX/")]
        if len(entries) != 1:
            listed = ", ".join(short(e.filename, 40) for e in entries[:5])
            problem = f"the zip holds {len(entries)} files: {listed}{', ...' if len(entries) > 5 else ''}"
            raise RecordError(problem, where=path, remedy="Unpack it, and give the data file.")
        # Its last part alone: a name in an archive may hold .. or begin at the root.
        target = os.path.join(folder, os.path.basename(entries[0].filename) or "data")
        with archive.open(entries[0]) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return target
