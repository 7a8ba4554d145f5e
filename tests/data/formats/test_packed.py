"""Packed files: unpacked by their first bytes while they are read, refused by name, and nothing is left behind."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tempfile
import zipfile
from pathlib import Path

import pytest

from mmit.data.formats.packed import packing, unpacked
from mmit.errors import RecordError

DATA = b'{"a": 1}\n' * 1000


def zipped(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "ROWS.JSONL.GZ", "rows.jsonl"])
def test_gzip_is_known_by_its_bytes(tmp_path: Path, scratch: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(DATA))
    assert packing(str(path)) == "gzip"
    with unpacked(str(path)) as file:
        assert Path(file).read_bytes() == DATA
        assert Path(file).name.lower() == "rows.jsonl"  # what the name's ending says is still there to be told
        assert Path(file).is_relative_to(scratch)
    assert not list(scratch.iterdir())


def test_a_zip_holds_one_file(tmp_path: Path, scratch: Path) -> None:
    path = zipped(tmp_path / "rows.zip", {"deep/": b"", "deep/rows.json": DATA, "__MACOSX/._rows.json": b"finder"})
    assert packing(path) == "zip"
    with unpacked(path) as file:
        assert Path(file).name == "rows.json" and Path(file).read_bytes() == DATA
    two = zipped(tmp_path / "two.zip", {"a.json": DATA, "b.json": DATA})
    with pytest.raises(RecordError, match=r"holds 2 files: a\.json, b\.json") as caught, unpacked(two):
        pass
    assert caught.value.where == two and not list(scratch.iterdir())


def test_a_name_that_leaves_the_folder_stays_inside(tmp_path: Path, scratch: Path) -> None:
    with unpacked(zipped(tmp_path / "x.zip", {"../../escaped.json": DATA})) as file:
        assert os.path.dirname(os.path.dirname(file)) == str(scratch)
    assert not (tmp_path / "escaped.json").exists()


def test_what_is_not_packed_is_read_where_it_is(tmp_path: Path) -> None:
    plain, tar = tmp_path / "rows.jsonl", tmp_path / "images.tar.gz"
    plain.write_bytes(DATA)
    tar.write_bytes(gzip.compress(DATA))
    for path in (plain, tar, tmp_path / "absent"):  # tars have a reader of their own; a missing file is said there
        with unpacked(str(path)) as file:
            assert file == str(path)


@pytest.mark.parametrize(
    ("data", "command"),
    [(bz2.compress(DATA), "bzip2 -dk"), (lzma.compress(DATA), "xz -dk"), (b"\x28\xb5\x2f\xfd....", "zstd -d")],
)
def test_other_packings_are_refused_with_their_command(tmp_path: Path, data: bytes, command: str) -> None:
    path = tmp_path / "rows.gz"
    path.write_bytes(data)
    with pytest.raises(RecordError, match="does not unpack") as caught:
        packing(str(path))
    assert command in (caught.value.remedy or "")


@pytest.mark.parametrize("cut", [5, 30, -8])
def test_a_damaged_file_is_an_error_and_leaves_nothing(tmp_path: Path, scratch: Path, cut: int) -> None:
    path = tmp_path / "rows.gz"
    path.write_bytes(gzip.compress(DATA)[:cut])
    with pytest.raises(RecordError, match="damaged gzip"), unpacked(str(path)):
        pass
    whole = Path(zipped(tmp_path / "rows.zip", {"rows.json": DATA}))
    whole.write_bytes(whole.read_bytes()[:cut])
    with pytest.raises(RecordError, match="damaged zip"), unpacked(str(whole)):
        pass
    assert not list(scratch.iterdir())
