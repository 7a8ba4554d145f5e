"""PATH#N: the same records in every run and from every command, smaller subsets inside larger ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmit.data.rows import import_records, read_rows
from mmit.data.shards.writer import build_shards
from mmit.data.sources import SourceSpec, Subset, open_source, split_subset
from mmit.errors import ConfigError, RecordError
from mmit.records import Record, write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [Record.triple(f"Say {i}.", f"It is {i}.", id=str(i)) for i in range(40)]
    write_jsonl(records, tmp_path / "a.jsonl")
    build_shards(records, tmp_path / "shards")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(40)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    return tmp_path


def said(records) -> list[str]:
    return [record.turns[0].text for record in records]


def test_every_way_to_read_takes_the_same_records(folder: Path) -> None:
    source = open_source(f"{folder}/a.jsonl#12")
    expected = said(source[i] for i in range(len(source)))
    assert len(set(expected)) == 12 and expected != [f"Say {i}." for i in range(12)]
    assert expected == sorted(expected, key=lambda text: int(text[4:-1]))  # in the order of the file
    for path, format in (("shards", "shards"), ("alpaca.json", "alpaca")):
        other = open_source(SourceSpec(f"{folder}/{path}#12", format=format), cache=folder / "cache")
        assert said(other[i] for i in range(12)) == expected
        assert said(read_rows(f"{folder}/{path}#12", format)) == expected
    assert said(read_rows(f"{folder}/a.jsonl#12")) == expected
    assert said(import_records(f"{folder}/alpaca.json#12", "alpaca")) == expected
    assert source.origin.endswith("a.jsonl#12") and source.outline(0).id == source[0].id
    whole = open_source(folder / "a.jsonl")
    assert source.name == whole.name and source.fingerprint != whole.fingerprint


def test_subsets_are_nested_even_and_seeded() -> None:
    small, large = Subset(30).numbers(1000), Subset(300).numbers(1000)
    assert set(small) <= set(large) and 350 < large.mean() < 650
    assert set(Subset(30, 1).numbers(1000)) != set(small)
    # Fixed for ever: a run that is repeated next year reads the same records.
    assert Subset(5).numbers(100).tolist() == [3, 24, 35, 39, 69]


def test_names_with_a_hash_are_names(folder: Path) -> None:
    (folder / "b#3").write_bytes((folder / "a.jsonl").read_bytes())
    assert len(open_source(f"{folder}/b#3")) == 40 and len(open_source(f"{folder}/b#3#4@9")) == 4
    assert split_subset("s3://bucket/x#20@3") == ("s3://bucket/x", Subset(20, 3))
    assert split_subset("a#b") == ("a#b", None) and split_subset("#5") == ("#5", None)


def test_mistakes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="41 records are asked for, but there are 40"):
        open_source(f"{folder}/a.jsonl#41")
    with pytest.raises(ConfigError, match="but there are 7"):
        open_source(SourceSpec(f"{folder}/a.jsonl#8", limit=7))
    with pytest.raises(ConfigError, match="no record"):
        open_source(f"{folder}/a.jsonl#0")
    with pytest.raises(ConfigError, match="no such file"):
        open_source(f"{folder}/none.jsonl#3")


def test_bad_rows_do_not_move_the_others(folder: Path) -> None:
    lines = (folder / "a.jsonl").read_text().splitlines()
    lines[int(Subset(12).numbers(40)[3])] = "{"
    (folder / "a.jsonl").write_text("\n".join(lines))
    source = open_source(f"{folder}/a.jsonl#12")
    rows = list(read_rows(f"{folder}/a.jsonl#12"))
    assert [isinstance(row, RecordError) for row in rows] == [i == 3 for i in range(12)]
    assert [row.id for i, row in enumerate(rows) if i != 3] == [source[i].id for i in range(12) if i != 3]
