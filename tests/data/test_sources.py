"""Sources: rows read where they stand, in any layout and order, with a fingerprint of what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmit.data.sources import SourceSpec, open_source, source_name
from mmit.errors import ConfigError, RecordError
from mmit.records import Record, write_jsonl

ROWS = [{"instruction": f"Say {n}, \u00e9\n.", "input": "", "output": f"It is {n}."} for n in range(7)]


def texts(source) -> list[str]:
    return [source[index].turns[0].text for index in range(len(source))]


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=3, ensure_ascii=False),
        "\n".join(map(json.dumps, ROWS)),
        "\r\n".join(map(json.dumps, ROWS)) + "\r\n",
        "\n\n".join(map(json.dumps, ROWS)) + "\n",
        "\ufeff" + json.dumps(ROWS),
    ],
    ids=["list", "indented", "lines", "crlf", "empty lines", "byte order mark"],
)
def test_every_layout_of_a_file_gives_the_same_rows_in_any_order(tmp_path: Path, written: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(written.encode())
    source = open_source(SourceSpec(path, format="alpaca"))
    assert texts(source) == [row["instruction"] for row in ROWS]
    # Random access reads the same row as going through, and does not move what comes after it.
    assert [source[index].turns[1].text for index in (6, 0, 3, 3)] == ["It is 6.", "It is 0.", "It is 3.", "It is 3."]


def test_the_cache_changes_nothing_but_the_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    without = open_source(SourceSpec(path, format="alpaca"))
    first, second = (open_source(SourceSpec(path, format="alpaca"), cache=tmp_path / "cache") for _ in range(2))
    assert texts(first) == texts(second) == texts(without)
    assert first.fingerprint == second.fingerprint == without.fingerprint
    assert first.kept == second.kept == without.kept


def test_a_row_changed_at_the_same_size_and_time_is_another_source(tmp_path: Path) -> None:
    """The bytes decide, not what the file system says of them."""
    path = tmp_path / "rows.jsonl"
    write_jsonl([Record.triple(f"Say {n}.", "Yes.") for n in range(3)], path)
    before, stamp = open_source(path), path.stat()
    path.write_text(path.read_text().replace("Say 1.", "Say 9."))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = open_source(path)
    assert path.stat().st_size == stamp.st_size and before.fingerprint != after.fingerprint
    assert texts(after) == ["Say 0.", "Say 9.", "Say 2."]


def test_what_decides_the_records_is_in_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ROWS[::-1]))
    opened = [
        open_source(SourceSpec(path, format="alpaca")),
        open_source(SourceSpec(path, format="alpaca", limit=3)),
        open_source(SourceSpec(path, format="alpaca", image_root=str(tmp_path))),
        open_source(SourceSpec(f"{path}#3", format="alpaca")),
        open_source(SourceSpec(f"{path}#3@1", format="alpaca")),
        open_source(SourceSpec(other, format="alpaca")),
    ]
    assert len({source.fingerprint for source in opened}) == len(opened)


def test_bad_rows_keep_their_number_and_do_not_move_the_others(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in ROWS]
    rows[2] = '{"instruction": "cut'
    rows[4] = json.dumps({"instruction": "Say.", "output": None})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    bad: list[RecordError] = []
    source = open_source(SourceSpec(path, format="alpaca"), on_bad=bad.append)
    assert [error.where.rpartition(":")[2] for error in bad] == ["3", "5"] and source.unreadable == 2
    assert texts(source) == [ROWS[n]["instruction"] for n in (0, 1, 3, 5, 6)]
    assert [source[index].row for index in range(5)] == [1, 2, 4, 6, 7]
    with pytest.raises(RecordError, match="not JSON"):
        open_source(SourceSpec(path, format="alpaca"))


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    write_jsonl([Record.triple("Say.", "Yes.")], tmp_path / "some.rows.jsonl")
    assert open_source(tmp_path / "some.rows.jsonl").name == source_name(tmp_path / "some.rows.jsonl#1") == "some.rows"
    assert open_source(SourceSpec(tmp_path / "some.rows.jsonl", name="mine")).name == "mine"
    with pytest.raises(ConfigError, match="no such file"):
        open_source(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="is a folder"):
        open_source(SourceSpec(tmp_path, format="mmit"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no record"):
        open_source(tmp_path / "empty.jsonl")
