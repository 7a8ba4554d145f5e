"""Before a run reads its data: lengths that fit, where findings are kept, how many bad records are too many."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmit.errors import ConfigError, RecordError
from mmit.train.data.setup import cache_folder, check_lengths, most_bad, note_bad, source_names


@pytest.mark.parametrize(
    ("length", "capacity", "limit", "where"),
    [(10, 10, 10, None), (10, 12, None, None), (11, 10, None, "data"), (11, 12, 10, "data.max_length")],
)
def test_records_must_fit_a_row_and_the_model(length: int, capacity: int, limit: int | None, where: str | None) -> None:
    if where is None:
        check_lengths(max_length=length, capacity=capacity, limit=limit)
        return
    with pytest.raises(ConfigError) as caught:
        check_lengths(max_length=length, capacity=capacity, limit=limit, virtual=3)
    assert caught.value.where == where and str(length) in caught.value.problem


def test_findings_are_kept_where_all_runs_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    monkeypatch.delenv("MMIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    assert cache_folder(str(tmp_path / "mine"), run_dir=run) == tmp_path / "mine"
    home.mkdir()
    assert cache_folder(None, run_dir=run) == home / ".cache" / "mmit" / "data" and not list(home.iterdir())
    (home / ".cache").write_text("a file where a folder belongs")
    assert cache_folder(None, run_dir=run) == run / "data"
    monkeypatch.setenv("MMIT_CACHE", str(tmp_path / "shared"))
    assert cache_folder(None, run_dir=run) == tmp_path / "shared" / "data"


@pytest.mark.parametrize(
    ("fraction", "records", "most"), [(0.29, 100, 29), (0.01, 50, 0), (0, 9, 0), (1, 7, 7), (0.1, 30, 3)]
)
def test_a_share_of_bad_records_is_counted_as_it_is_written(fraction: float, records: int, most: int) -> None:
    assert most_bad(fraction, records) == most


def test_each_rank_lists_bad_records_in_a_file_of_its_own(tmp_path: Path) -> None:
    for rank in (0, 2, 2):
        note_bad(tmp_path, rank, RecordError("p", where=f"w{rank}", remedy="r"))
    note_bad(tmp_path, 0, RecordError("p", where="held out"), part="eval")
    found = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert {name: len(lines) for name, lines in found.items()} == {
        "bad_records.jsonl": 1, "bad_records-2.jsonl": 2, "bad_records_eval.jsonl": 1
    }  # fmt: skip
    assert "w2" in json.dumps(json.loads(found["bad_records-2.jsonl"][0]))


def test_sources_of_one_name_are_numbered() -> None:
    data: Any = SimpleNamespace(sources=[SimpleNamespace(name=name) for name in ("a", "b", "a", "a")])
    found = source_names(data)
    assert len(set(found)) == 4 and found[:2] == ["a", "b"]
