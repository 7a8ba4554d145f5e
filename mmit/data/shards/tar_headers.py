"""Tar headers: which members a tar holds and where their bytes lie, without unpacking anything.

Takes a seekable binary file and its size, gives Members in order, then whatever damage made it stop. Reads POSIX
ustar, pax and GNU long names. Refuses links, devices, sparse and compressed files, and never lets a damaged or cut
tar look like a shorter sound one: the end-of-archive marker must be there, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mmit.errors import RecordError
from mmit.records import short

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20
# A long name or a pax header is read into memory before anything else is known about the member.
MAX_EXTENSION_BYTES = 1 << 16
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZ": "bzip2",
    b"\xfd7": "xz",
    b"\x28\xb5": "zstandard",
    b"PK": "zip",
}
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_CUT = "The tar is damaged or cut short: fetch or write it again."


class TarError(RecordError):
    """A tar is damaged, cut short, or holds what no data set needs."""


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file; its header blocks, long-name blocks included, begin at `start`."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """One past its last block."""
        return self.offset + padded(self.size)


def padded(size: int) -> int:
    """Bytes that `size` bytes take in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def read_members(file: BinaryIO, size: int, *, where: str) -> Iterator[Member]:
    """Yield the regular files of a tar of `size` bytes, seeking from header to header.

    Raises TarError, after the members before it, at the first thing that is wrong, naming the byte and how much of
    the tar was not read. Directories are passed over, since they hold nothing.
    """
    at, extra = 0, _Extensions()
    while True:
        block = _read(file, at, BLOCK)
        if len(block) < BLOCK or block == _ZEROS:
            break
        if at == 0 and block[:2] in _COMPRESSED and not _sound_checksum(block):
            problem = f"a {_COMPRESSED[block[:2]]} file, which cannot be read from the middle"
            raise TarError(problem, where=where, remedy="Unpack the compression once; tars of images gain nothing.")
        header = _Header(block, at, where=f"{where}, byte {at:,} of {size:,}")
        data = at + BLOCK
        extends = header.kind in (b"x", b"L", b"g", b"K")
        # A pax header may state a size that the member's own field cannot hold; it counts for the member, not for
        # further extensions.
        length = header.size if extra.size is None or extends else extra.size
        if data + length > size:
            left = f"{short(header.name)} needs {length:,} bytes where {max(size - data, 0):,} are left"
            raise TarError(f"cut short: {left}", where=header.where, remedy=_CUT)
        if extends:
            extra.take(header, _extension(file, data, header), at)
        elif header.kind in (b"0", b"\0", b"7"):
            name = extra.name or header.name
            # From the first extension on: a member that is checked later must be read with the blocks that name it.
            yield Member(name, at if extra.start is None else extra.start, data, length)
            extra = _Extensions()
        elif header.kind == b"5" and not length:
            extra = _Extensions()
        else:
            kind = _KINDS.get(header.kind, f"of the unknown type {header.kind!r}")
            problem = f"member {short(extra.name or header.name)} is {kind}; {size - at:,} bytes were not read"
            raise TarError(problem, where=header.where, remedy="Only regular files are accepted: write it again.")
        at = data + padded(length)
    if extra.start is not None:
        raise TarError("cut short: a long name without its member", where=where, remedy=_CUT)
    _check_end(file, at, size, where)


def _check_end(file: BinaryIO, at: int, size: int, where: str) -> None:
    """Two zero blocks end a tar; without them the last members may be missing."""
    # tarfile takes the end of the file for the end of the archive, so a tar that was cut between members looks whole to
    # it.
    end = _read(file, at, 2 * BLOCK)
    if end != 2 * _ZEROS:
        problem = f"cut short at byte {at:,}: no end-of-archive marker, so members may be missing after it"
        raise TarError(problem, where=where, remedy=_CUT)
    while at < size:
        chunk = _read(file, at, _CHUNK)
        if not chunk:
            break
        # Padding up to a record of 20 blocks is zeros. Anything else is a second tar behind the first, which no reader
        # would see.
        if chunk.count(0) != len(chunk):
            problem = f"data after the end-of-archive marker ({size - at:,} bytes from byte {at:,})"
            remedy = "Tars joined with cat hide all but the first: give them as separate files."
            raise TarError(problem, where=where, remedy=remedy)
        at += len(chunk)


class _Header:
    """The fields of a header block that matter here."""

    __slots__ = ("kind", "name", "size", "where")

    def __init__(self, block: bytes, at: int, *, where: str) -> None:
        self.where = where
        if not _sound_checksum(block):
            raise TarError("not a tar header (wrong checksum); nothing after it was read", where=where, remedy=_CUT)
        name = block[:100].split(b"\0", 1)[0]
        # Only POSIX headers have a prefix there; GNU's keep other fields in the same place.
        prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
        self.name = _text(prefix + b"/" + name if prefix else name, where)
        self.size = _number(block[124:136], where)
        self.kind = block[156:157]


class _Extensions:
    """What long-name and pax blocks say about the next member."""

    __slots__ = ("name", "size", "start")

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None
        self.start: int | None = None

    def take(self, header: _Header, data: bytes, at: int) -> None:
        """Add one block's words; a global block and a link's long name say nothing about a regular file."""
        if header.kind in (b"g", b"K"):
            return
        self.start = at if self.start is None else self.start
        # A tar could stack extensions for ever, and be read for ever without a member.
        if at - self.start > 4 * MAX_EXTENSION_BYTES:
            raise TarError("too many names and pax headers for one member", where=header.where, remedy=_CUT)
        if header.kind == b"L":
            self.name = _text(data.split(b"\0", 1)[0], header.where)
            return
        for key, value in _pax(data, header.where):
            if key == b"path":
                self.name = _text(value, header.where)
            elif key == b"size":
                self.size = _decimal(value, header.where)
            elif key.startswith(b"GNU.sparse"):
                raise TarError("a sparse file", where=header.where, remedy="Write it again without holes.")


def _pax(data: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the "length key=value" lines of a pax header."""
    at = 0
    # Contract: each line states its own length, so a value may hold line breaks and equal signs.
    while at < len(data) and data[at]:
        length = _decimal(data[at : at + 20].split(b" ", 1)[0], where)
        line = data[at : at + length]
        key, found, value = line[line.find(b" ") + 1 : -1].partition(b"=")
        if len(line) != length or not line.endswith(b"\n") or not found:
            raise TarError("a damaged pax header", where=where, remedy=_CUT)
        yield key, value
        at += length


def _extension(file: BinaryIO, at: int, header: _Header) -> bytes:
    if header.size > MAX_EXTENSION_BYTES:
        problem = f"a name or pax header of {header.size:,} bytes ({MAX_EXTENSION_BYTES:,} are allowed)"
        raise TarError(problem, where=header.where, remedy=_CUT)
    return _read(file, at, header.size)


def _sound_checksum(block: bytes) -> bool:
    digits = block[148:156].strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        return False
    # The checksum counts its own eight bytes as spaces.
    return int(digits, 8) == sum(block) - sum(block[148:156]) + 8 * 0x20


def _number(field: bytes, where: str) -> int:
    """Octal digits, or GNU's big-endian number for 8 GiB and more."""
    # The high bit marks a binary number; eleven octal digits end below 8 GiB.
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    # Strict: int() takes signs, spaces within and underscores, and a size that two readers understand otherwise hides
    # members.
    if digits.strip(b"01234567"):
        raise TarError(f"a size that is no number: {field!r}", where=where, remedy=_CUT)
    return int(digits or b"0", 8)


def _decimal(digits: bytes, where: str) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise TarError(f"a length that is no number: {short(digits)}", where=where, remedy=_CUT)
    return int(digits)


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TarError(f"a member name that is not UTF-8: {short(raw)}", where=where, remedy=_CUT) from error


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
