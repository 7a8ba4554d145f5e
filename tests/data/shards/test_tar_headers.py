"""Headers of tars against tarfile's own reading, and every kind of damage as an error that names the byte."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest

from mmit.data.shards.tar_headers import BLOCK, MAX_EXTENSION_BYTES, Member, TarError, padded, read_members

FILES = {"0.png": b"x" * 700, "0.json": b"{}", "empty.txt": b"", "folder/1.png": b"y" * BLOCK}


def tar(files: dict[str, bytes] = FILES, *, form: int = tarfile.USTAR_FORMAT, **fields: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def members(data: bytes) -> list[Member]:
    return list(read_members(io.BytesIO(data), len(data), where="t.tar"))


def broken(data: bytes) -> TarError:
    with pytest.raises(TarError) as caught:
        members(data)
    assert caught.value.remedy and (caught.value.where or "").startswith("t.tar")
    return caught.value


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["a.png", "d" * 90 + "/" + "n" * 60, "ä" * 40 + ".png"])
def test_members_are_those_of_tarfile(form: int, name: str) -> None:
    data = tar({"first": b"1", name: b"2" * 1000, "last": b"3"}, form=form)
    found = members(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        theirs = archive.getmembers()
    assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in theirs]
    # Blocks follow each other without a hole, so that a member can be read again from `start` alone.
    assert [m.start for m in found] == [0, *(m.end for m in found[:-1])]
    assert members(data[found[1].start : found[1].end] + bytes(2 * BLOCK))[0].name == name


def test_padding_is_to_whole_blocks() -> None:
    assert [padded(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, BLOCK, BLOCK, 2 * BLOCK]


def test_folders_hold_nothing_and_global_headers_say_nothing() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "wrong"}) as archive:
        archive.addfile(tarfile.TarInfo("right"))
        folder = tarfile.TarInfo("d" * 101)  # its long name is the folder's alone
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("next"))
    assert [m.name for m in members(out.getvalue())] == ["right", "next"]


def test_a_size_beyond_octal_is_read() -> None:
    """GNU's binary field; the tar is cut there, and the error has the size that was stated."""
    data = tar({"a": b"x"}, form=tarfile.GNU_FORMAT)
    info = tarfile.TarInfo("a")
    info.size = 9 << 30
    error = broken(info.tobuf(tarfile.GNU_FORMAT) + data[BLOCK:])
    assert f"needs {9 << 30:,} bytes" in error.problem


@pytest.mark.parametrize("at", range(0, members(tar())[-1].end + 2 * BLOCK, 256))
def test_no_cut_makes_a_shorter_sound_tar(at: int) -> None:
    whole = members(tar())
    seen: list[Member] = []
    with pytest.raises(TarError, match="cut short"):
        seen.extend(read_members(io.BytesIO(tar()[:at]), at, where="t.tar"))
    assert seen == [m for m in whole if m.offset + m.size <= at]


@pytest.mark.parametrize(
    ("kind", "word"),
    [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"), (tarfile.FIFOTYPE, "pipe"), (b"Z", "unknown")],
)
def test_what_is_no_regular_file_is_refused(kind: bytes, word: str) -> None:
    error = broken(tar({"0.png": b""}, type=kind, linkname="/etc/passwd"))
    assert word in error.problem and "0.png" in error.problem


def test_damage_is_named_with_its_byte() -> None:
    data = tar()
    second = members(data)[1].start
    wrong = bytearray(data)
    wrong[second + 3] ^= 1
    error = broken(bytes(wrong))
    assert "checksum" in error.problem and f"byte {second:,} of {len(data):,}" in (error.where or "")
    assert "after the end-of-archive marker" in broken(data + tar({"hidden": b"x"})).problem
    assert "a gzip file" in broken(b"\x1f\x8b" + data[2:]).problem


def test_long_names_have_a_bound() -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, MAX_EXTENSION_BYTES + 1
    body = b"n" * name.size
    error = broken(name.tobuf() + body.ljust(padded(name.size), b"\0") + tar())
    assert f"{MAX_EXTENSION_BYTES:,} are allowed" in error.problem
    name.size = MAX_EXTENSION_BYTES
    block = name.tobuf() + body[: name.size]
    assert "too many names" in broken(block * 6 + tar()).problem
    assert "without its member" in broken(name.tobuf() + body[: name.size] + bytes(2 * BLOCK)).problem
