"""Photographs of solar cells: the package's own rows, in blocks of neighbours that stay in one split."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmit.build import solar_cells
from mmit.build.solar_cells import BLOCK, cells
from mmit.errors import RecordError
from tests.build.packaged import opened, some


def test_cells_are_the_package_s_and_blocks_of_them_are_of_one_split():
    train, test = some("solar-cells", 3_000), some("solar-cells", 3_000, "test")
    assert (len(train), len(test)) == (2_112, 512)
    assert {row["probability"] for row in train} == {0.0, 0.33, 0.67, 1.0}
    assert sum(row["kind"] == "monocrystalline" for row in train + test) == 1_074
    assert all(row["defective"] == ("yes" if row["probability"] > 0.5 else "no") for row in train)
    blocks = [{(int(row["id"].rsplit("/", 1)[1]) - 1) // 32 for row in part} for part in (train, test)]
    assert not blocks[0] & blocks[1]
    assert opened(train[0]["image"]).size == (300, 300)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "labels.csv"
    monkeypatch.setattr(solar_cells, "package_file", lambda *_, **__: path)
    told = ("0.0 mono", "0.3333333333333333 poly", "0.6666666666666666 mono", "1.0 poly")
    path.write_text("".join(f"images/cell{n:04}.png  {told[n % 4]}\n" for n in range(10 * BLOCK)))
    return path


def test_every_line_is_one_row_of_one_split(table: Path) -> None:
    train, test = dict(cells("train")), dict(cells("test"))
    assert sorted([*train, *test]) == list(range(1, 10 * BLOCK + 1))
    assert {(number - 1) // BLOCK for number in test} == {4, 9}
    assert list(train) != sorted(train) and list(train) == [number for number, _ in cells("train")]
    for number, row in (train | test).items():
        assert row["image"].source == str(table.parent / f"images/cell{number - 1:04}.png")
        assert row["probability"] == [0.0, 0.33, 0.67, 1.0][(number - 1) % 4]
        assert row["defective"] == ("yes" if row["probability"] > 0.5 else "no")
        assert row["kind"] == ("polycrystalline" if (number - 1) % 2 else "monocrystalline")


@pytest.mark.parametrize("line", ["a.png 0.0", "a.png much mono", "a.png 0.0 thin", ""])
def test_a_damaged_line_is_named(table: Path, line: str) -> None:
    table.write_text(f"a.png 0.0 mono\n{line}\n")
    told = r"labels\.csv:2: is no line of name, probability and kind: .*\npip install --force-reinstall elpv-dataset"
    with pytest.raises(RecordError, match=told):
        list(cells("train"))
