"""Where the rows of a JSON file lie: each can be read by itself, in lists and in JSONL."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmit.data.row_table import RowFile, row_table
from mmit.data.store import Store, digest
from mmit.errors import RecordError

ROWS: list[Any] = [{"a": "é\\n ,]"}, {"b": [1, {"c": "}{"}]}, {}, {"d": "\u2028 \U0001f600", "e": None}]


def written(folder: Path, text: str) -> Path:
    path = folder / "rows.json"
    path.write_bytes(text.encode())
    return path


def read(path: Path) -> tuple[list[Any], list[int]]:
    table, file = row_table(path, digest(path), None), RowFile(path)
    spans = zip(table.starts.tolist(), table.stops.tolist(), strict=True)
    return [json.loads(file.read(start, stop)) for start, stop in spans], table.numbers.tolist()


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_of_a_list_are_numbered_by_their_place(tmp_path: Path, indent: int | None) -> None:
    path = written(tmp_path, json.dumps(ROWS, ensure_ascii=False, indent=indent))
    assert read(path) == (ROWS, [1, 2, 3, 4])


def test_rows_of_jsonl_are_numbered_by_their_line(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = written(tmp_path, f"{lines[0]}\n\n  \r\n{lines[1]}\r\n{lines[2]}\n{lines[3]}")
    assert read(path) == (ROWS, [1, 4, 5, 6])


def test_a_line_that_is_no_json_has_a_place_like_any_other(tmp_path: Path) -> None:
    path = written(tmp_path, '{"a": 1}\n{"b": \n{"c": 3}\n')
    table = row_table(path, digest(path), None)
    assert len(table) == 3
    some = table.take(np.array([0, 2]))
    assert some.numbers.tolist() == [1, 3]
    assert json.loads(RowFile(path).read(int(some.starts[1]), int(some.stops[1]))) == {"c": 3}


def test_a_broken_list_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"rows\.json"):
        path = written(tmp_path, '[{"a": 1}, {"b"')
        row_table(path, digest(path), None)


def test_a_kept_table_is_not_made_again(tmp_path: Path) -> None:
    path, store = written(tmp_path, json.dumps(ROWS)), Store(tmp_path / "cache")
    first = row_table(path, "the same content", store)
    path.write_text("no longer read")
    again = row_table(path, "the same content", store)
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in ("starts", "stops", "numbers"))


def test_a_file_goes_to_another_process_without_its_descriptor(tmp_path: Path) -> None:
    path = written(tmp_path, "abcdef")
    file = RowFile(path)
    assert file.read(2, 4) == b"cd"
    other = pickle.loads(pickle.dumps(file))
    assert other._descriptor is None and other.read(0, 2) == b"ab" and file.read(4, 6) == b"ef"
