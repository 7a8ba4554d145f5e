"""Conversions keep their verdicts: what was wrong with a row is known at every opening."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmit.data.sources import SourceSpec, open_source
from mmit.errors import RecordError


def rows_file(tmp_path: Path, *, bad: tuple[int, ...] = (0, 2, 5)) -> Path:
    rows = []
    for n in range(6):
        answer = None if n in bad else "a"
        turns = [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": answer}]
        rows.append({"conversations": turns, "topic": "t", "score": n})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def opened(path: Path, tmp_path: Path, *, limit: int | None = None, **options) -> tuple[list[str], object]:
    bad: list[RecordError] = []
    wanted = SourceSpec(path, format="sharegpt", limit=limit)
    source = open_source(wanted, cache=tmp_path / "cache", on_bad=bad.append, **options)
    return [error.where.rpartition(":")[2] for error in bad], source


def test_bad_rows_and_kept_keys_are_known_at_every_opening(tmp_path: Path) -> None:
    path = rows_file(tmp_path)
    first, source = opened(path, tmp_path)
    again, later = opened(path, tmp_path)
    assert first == again == ["1", "3", "6"]
    assert source.unreadable == later.unreadable == 3 and len(later) == 3
    assert source.kept == later.kept == {"topic": 3, "score": 3}


def test_a_run_that_does_not_skip_meets_them_too(tmp_path: Path) -> None:
    """The policy may change between two starts of one run folder."""
    path = rows_file(tmp_path)
    opened(path, tmp_path)
    with pytest.raises(RecordError, match="value of turn 2 is 'None'"):
        open_source(SourceSpec(path, format="sharegpt"), cache=tmp_path / "cache")


def test_a_refused_file_is_refused_again(tmp_path: Path) -> None:
    path, table = rows_file(tmp_path), tmp_path / "rows.csv"
    table.write_text("instruction,output\nAdd.,3\nAdd.,\n")
    for file, format in ((path, "sharegpt"), (table, "csv"), (path, "sharegpt"), (table, "csv")):
        with pytest.raises(RecordError):
            open_source(SourceSpec(file, format=format), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.jsonl"))


def test_rows_that_are_not_judged_have_numbers_and_raise_when_asked_for(tmp_path: Path) -> None:
    bad, source = opened(rows_file(tmp_path), tmp_path, check_rows=False)
    assert bad == [] and len(source) == 6 and not source.rows_checked
    assert source[1].turns[0].text == "q1" and source[1].row == 2
    with pytest.raises(RecordError, match="value of turn 2 is 'None'") as refused:
        source[2]
    assert refused.value.where.endswith("rows.json:3")


def test_only_rows_before_the_limit_count(tmp_path: Path) -> None:
    path = rows_file(tmp_path)
    assert opened(path, tmp_path, limit=1)[0] == ["1"]
    assert opened(path, tmp_path, limit=2)[0] == ["1", "3"]


def test_another_version_of_the_importers_converts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_file(tmp_path)
    _, source = opened(path, tmp_path)
    monkeypatch.setattr("mmit.data.sources.VERSION", 99)
    _, other = opened(path, tmp_path)
    assert source.fingerprint != other.fingerprint
