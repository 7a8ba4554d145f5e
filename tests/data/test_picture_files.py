"""What is known of picture files: kept while path, size and time are the same, forgotten as soon as one changes."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmit.data.picture_files import MARK, Looked, PictureFiles, hash_of, joined, stamp, table
from mmit.data.store import Store
from mmit.records import Image

A, B = b"a" * MARK, b"b" * MARK


def preparation(*, tiled: bool) -> Any:
    opened: list[str] = []

    def size_of(image: Image, *, where: str) -> tuple[int, int]:
        opened.append(str(image.source))
        with PIL.Image.open(str(image.source)) as picture:
            return picture.size

    return SimpleNamespace(tiled=tiled, size_of=size_of, opened=opened)


@pytest.fixture
def path(tmp_path: Path) -> str:
    PIL.Image.new("RGB", (8, 5)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_a_stamp_changes_with_time_and_size_and_is_nothing_of_what_is_no_file(path: str, tmp_path: Path) -> None:
    found = [stamp(path)]
    os.utime(path, ns=(1, 1))
    found.append(stamp(path))
    with open(path, "ab") as file:
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    found.append(stamp(path))
    assert len(set(found)) == 3 and all(0 < value < 2**63 for value in found)
    assert stamp(str(tmp_path)) == stamp(str(tmp_path / "gone.png")) == stamp("a\0b") == 0


def test_tables_are_joined_by_path_and_the_last_row_counts() -> None:
    rng = random.Random(0)
    known: dict[int, tuple[int, tuple[int, int], bytes]] = {}
    tables = []
    for _ in range(5):
        rows = [(rng.randrange(12), rng.randrange(1, 99), (rng.randrange(9), 3), A) for _ in range(6)]
        known |= {path: rest for path, *rest in rows}  # type: ignore[misc]
        tables.append(table(rows))
    whole = joined(tables)
    assert whole["paths"].tolist() == sorted(known)
    assert whole["stamps"].tolist() == [known[p][0] for p in sorted(known)]
    assert [tuple(size) for size in whole["sizes"].tolist()] == [known[p][1] for p in sorted(known)]
    assert all(len(column) == 0 for column in joined([]).values())


def test_only_the_same_file_is_known_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [(hash_of("a"), 7, (8, 5), A), (hash_of("b"), 8, (0, 0), B), (hash_of("c"), 9, (3, 4), bytes(MARK))]
    PictureFiles(store, "k").keep(table(rows))
    known = PictureFiles(store, "k")
    assert known.find("a", 7) == ((8, 5), A)
    assert known.find("b", 8) == (None, B) and known.find("c", 9) == ((3, 4), b"")  # zeros: it was not read
    assert known.find("a", 8) == known.find("d", 7) == (None, b"")
    assert PictureFiles(store, "other").find("a", 7) == PictureFiles().find("a", 7) == (None, b"")
    known.keep(table([(hash_of("d"), 1, (1, 1), A)]))
    assert PictureFiles(store, "k").find("a", 7) == ((8, 5), A)  # what was known stays


def test_a_file_is_opened_once_and_what_was_read_is_kept_for_the_next_start(path: str, tmp_path: Path) -> None:
    store, image = Store(tmp_path / "store"), Image(path)
    first, tiled = Looked(PictureFiles(store, "k"), one := preparation(tiled=True)), preparation(tiled=True)
    assert first.at(image, where="w") and first.at(image, where="w") and one.opened == [path]
    first.marks[path] = A
    PictureFiles(store, "k").keep(first.read())
    again = Looked(PictureFiles(store, "k"), tiled)
    assert again.at(image, where="w") and tiled.opened == []
    assert again.sizes[path] == (8, 5) and again.marks[path] == A
    assert all(len(column) == 0 for column in again.read().values())  # nothing new
    os.utime(path, ns=(1, 1))
    changed = Looked(PictureFiles(store, "k"), tiled)
    changed.at(image, where="w")
    assert tiled.opened == [path] and path not in changed.marks


def test_what_another_preparation_did_not_need_stays_known(path: str, tmp_path: Path) -> None:
    store, image = Store(tmp_path / "store"), Image(path)
    sized = Looked(PictureFiles(store, "k"), preparation(tiled=True))
    sized.at(image, where="w")
    PictureFiles(store, "k").keep(sized.read())
    marked = Looked(PictureFiles(store, "k"), preparation(tiled=False))
    marked.at(image, where="w")
    marked.marks[path] = B
    PictureFiles(store, "k").keep(marked.read())
    assert PictureFiles(store, "k").find(path, stamp(path)) == ((8, 5), B)


def test_only_files_are_looked_at_and_a_missing_one_is_told(tmp_path: Path) -> None:
    looked = Looked(PictureFiles(), preparation(tiled=True))
    assert looked.at(Image(b"bytes"), where="w") and looked.at(Image("gone.png", size=(1, 1)), where="w")
    assert not looked.at(Image(str(tmp_path / "gone.png")), where="w")
    assert looked.sizes == {} and np.array_equal(looked.read()["paths"], table()["paths"])
