"""MIMIC-IT: pictures found by id, related pairs kept as turns or as a note, every dangling reference named."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmit.data.formats import detect_format, import_file
from mmit.errors import ConfigError, RecordError
from mmit.records import Image
from tests.data.formats.format_tools import bad_rows, imported, shape, texts, write


def pair(instruction: str, answer: str, images: list[str] | None, related: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"instruction": instruction, "answer": answer, "rel_ins_ids": related}
    return row | ({} if images is None else {"image_ids": images})


PAIRS = {
    "LA_00_INS_1": pair("What is it?", "A cat.", ["LA_00_IMG_1"], []),
    "LA_00_INS_2": pair(" Its colour? ", "Black.", ["LA_00_IMG_1"], ["LA_00_INS_1"]),
    "LA_00_INS_3": pair("And here?", "A dog.", ["LA_00_IMG_2", "LA_00_IMG_3"], ["LA_00_INS_1", "LA_00_INS_2"]),
}
PICTURES = {
    "LA_00_IMG_1": base64.b64encode(b"one").decode(),
    "LA_00_IMG_2": base64.urlsafe_b64encode(b"\xfb\xff\xfe two").decode(),
    "LA_00_IMG_3": base64.b64encode(b"three").decode().rstrip("="),
}
META = {"version": "0.0.1", "time": "2023-06", "author": "ntu"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "LA.json", PICTURES)
    return write(tmp_path / "LA_instructions.json", {"meta": META, "data": PAIRS})


def test_related_pairs_come_first_and_a_picture_is_shown_once(path: Path) -> None:
    assert detect_format(path)[0] == "mimicit"
    records = imported(path, "mimicit")
    one, two, three = Image(b"one"), Image(b"\xfb\xff\xfe two"), Image(b"three")
    assert [r.images for r in records] == [(one,), (one,), (one, two, three)]
    assert [[parts[-1] for parts in texts(r)] for r in records][1] == ["What is it?", "A cat.", "Its colour?", "Black."]
    assert [len(turn.parts) for turn in records[2].turns] == [2, 1, 1, 1, 3, 1]
    assert records[2].meta == {"rel_ins_ids": ["LA_00_INS_1", "LA_00_INS_2"]}
    assert [(r.id, r.row) for r in records][2] == ("LA_00_INS_3", 3)


def test_relations_can_be_noted_only_or_limited(path: Path) -> None:
    noted = imported(path, "mimicit", relations="meta")[2]
    assert len(noted.turns) == 2 and len(noted.images) == 2
    assert noted.meta["rel_ins_ids"] == ["LA_00_INS_1", "LA_00_INS_2"]
    assert len(imported(path, "mimicit", max_related=1)[2].turns) == 4
    for options in ({"relations": "turn"}, {"max_related": "2"}):
        with pytest.raises(ConfigError, match="option (relations|max_related)"):
            list(import_file(path, "mimicit", **options))


def test_the_train_file_chooses_pairs_and_relations(path: Path) -> None:
    train = write(path.with_name("LA_train.json"), {"LA_00_INS_3": ["LA_00_INS_2"], "LA_00_INS_1": []})
    records = imported(path, "mimicit", train=str(train))
    assert [r.id for r in records] == ["LA_00_INS_3", "LA_00_INS_1"]
    assert records[0].turns[0].text == "Its colour?" and len(records[0].turns) == 4


def test_text_only_pairs_need_no_pictures(tmp_path: Path) -> None:
    data = {"T1": pair("Hi", "Hello", None, []), "T2": pair("Bye", "Ciao", [], ["T1"])}
    records = imported(write(tmp_path / "T_instructions.json", {"meta": META, "data": data}), "mimicit")
    assert shape(records[1])[2] == ("user", ["Bye"]) and not records[1].images


def test_pictures_in_a_folder(path: Path, tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    record = imported(path, "mimicit", images=str(tmp_path / "pics"), image_pattern="{image_id}.png")[0]
    assert record.images[0].source == str(tmp_path / "pics" / "LA_00_IMG_1.png")


class FakeParquet(ModuleType):
    """The two names of pyarrow that are used, over rows in memory: pyarrow is optional."""

    rows: list[dict[str, Any]] = []

    class ParquetFile:
        def __init__(self, path: str) -> None:
            self.path = path

        def __enter__(self) -> FakeParquet.ParquetFile:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def iter_batches(self, batch_size: int) -> list[Any]:
            class Batch:
                @staticmethod
                def to_pylist() -> list[dict[str, Any]]:
                    return FakeParquet.rows

            return [Batch()]


@pytest.fixture
def parquet(monkeypatch: pytest.MonkeyPatch) -> type[FakeParquet]:
    arrow = ModuleType("pyarrow")
    arrow.ArrowException = type("ArrowException", (Exception,), {})  # type: ignore[attr-defined]
    arrow.parquet = FakeParquet("pyarrow.parquet")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", arrow.parquet)
    return FakeParquet


def test_pictures_in_parquet(path: Path, tmp_path: Path, parquet: type[FakeParquet]) -> None:
    (tmp_path / "LA.parquet").write_bytes(b"PAR1")
    parquet.rows = [{"base64": value, "__index_level_0__": key} for key, value in PICTURES.items()]
    assert imported(path, "mimicit")[0].images == (Image(b"one"),)
    parquet.rows = [{"data": "x"}]
    with pytest.raises(ConfigError, match="row 1 has the columns data"):
        list(import_file(path, "mimicit"))


def test_dangling_references_are_named(tmp_path: Path) -> None:
    data = {
        "A": pair("a", "b", ["P9"], []),
        "B": pair("a", "b", ["P1"], ["C"]),
        "C": pair("a", "b", ["P1"], ["Z"]),
        "D": pair("a", "b", ["P1"], ["D"]),
        "E": {"instruction": "a", "image_ids": ["P1"]},
        "F": pair("a", "b", "P1", []),  # type: ignore[arg-type]
        "G": 3,
    }
    write(tmp_path / "X.json", {"P1": PICTURES["LA_00_IMG_1"], "P2": "%"})
    path = write(tmp_path / "X_instructions.json", {"meta": META, "data": data})
    bad = bad_rows(path, "mimicit")
    assert [e.problem for e in bad] == [
        "there is no picture 'P9' among the 2 of the image file",
        "the file has no pair 'Z'",
        "the pair is related to itself",
        "answer of E is 'None', not text",
        "image_ids of F is P1",
        "pair G is '3', not an object",
    ]
    assert bad[0].where == f"{path}:1 (A)"


def test_missing_files_are_named(tmp_path: Path, path: Path) -> None:
    (tmp_path / "LA.json").unlink()
    with pytest.raises(ConfigError, match="(?s)pairs refer to pictures.*option images"):
        list(import_file(path, "mimicit"))
    with pytest.raises(ConfigError, match="no image file or folder"):
        list(import_file(path, "mimicit", images=str(tmp_path / "none.json")))
    with pytest.raises(RecordError, match="no 'data'"):
        list(import_file(write(tmp_path / "n.json", {"meta": META}), "mimicit"))
