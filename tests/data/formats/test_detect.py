"""Formats told from names and keys: each from the keys it states, none from a part of them, never a guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS
from mmit.data.formats.detect import detect, expected
from mmit.errors import RecordError

TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
KEYED = {name: entry for name, entry in FORMATS.items() if entry.detect}


def told(tmp_path: Path, rows: Any, name: str = "rows.json") -> tuple[str, str]:
    path = tmp_path / name
    lines = rows if isinstance(rows, str) else json.dumps(rows)
    path.write_text(lines, "utf-8")
    return detect(str(path), FORMATS)


def sample(keys: tuple[str, ...]) -> dict[str, Any]:
    """An object of these keys; "a.b" is b in the first object of the list a, "*.b" that of an object under any key."""
    out: dict[str, Any] = {}
    for key in keys:
        outer, dot, inner = key.partition(".")
        if not dot:
            out.setdefault(outer, "x")
        elif outer == "*":
            out.setdefault("some id", {})[inner] = "x"
        else:
            out[outer] = [{**(out[outer][0] if isinstance(out.get(outer), list) else {}), inner: "x"}]
    return out


@pytest.mark.parametrize("name", [name for name in KEYED if not any("." in key for key in KEYED[name].detect)])
def test_each_format_is_told_by_its_keys(tmp_path: Path, name: str) -> None:
    keys = KEYED[name].detect
    found, reason = told(tmp_path, [sample(keys)] * 2)
    # A format whose keys are all among another's gives way to the one that asks for more.
    assert set(FORMATS[found].detect) >= set(keys) and all(f"'{key}'" in reason for key in FORMATS[found].detect)
    if len(keys) > 1:  # a part of the keys must not be enough, unless it is another format's whole
        fewer = set(keys[1:])
        other = [n for n, entry in KEYED.items() if fewer.issuperset(entry.detect)]
        if not other and not fewer & {"instruction", "text", "conversations"}:
            with pytest.raises(RecordError, match="cannot tell the format"):
                told(tmp_path, [sample(tuple(fewer))] * 2)


@pytest.mark.parametrize("name", [name for name in KEYED if any("." in key for key in KEYED[name].detect)])
def test_a_file_that_is_one_object_is_told_by_what_lies_in_it(tmp_path: Path, name: str) -> None:
    found, reason = told(tmp_path, sample(KEYED[name].detect))
    assert found == name and reason.startswith("the file is one object with '")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"conversations": TALK, "image": "a.png"}, "llava"),
        ({"conversations": TALK, "image": "a.png", "id": "allava_1"}, "allava"),
        ({"conversations": TALK, "src_image": "a.png"}, "lamm"),
        ({"conversations": [{"from": "human", "value": "<image> as text"}, TALK[1]]}, "sharegpt"),
    ],
)
def test_conversations_are_told_apart(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    assert told(tmp_path, [row])[0] == name


def test_a_literal_marker_beside_pictured_rows_is_allava_s(tmp_path: Path) -> None:
    quoting = {"conversations": [{"from": "human", "value": "what does <image> mean?"}, TALK[1]]}
    found, reason = told(tmp_path, [{"conversations": TALK, "image": "a.png"}, quoting])
    assert found == "allava" and "1 without 'image'" in reason


def test_names_that_decide_are_not_opened() -> None:
    assert detect("absent/00000.TAR", FORMATS)[0] == "img2dataset"
    assert detect("absent/rows.parquet", FORMATS)[0] == "parquet"


@pytest.mark.parametrize(
    ("rows", "remedy"),
    [
        ([{"text": "a book", "url": "u"}], "no question and no answer"),
        ([{"segments": []}], "write messages"),
        ([{"nobody": 1}], "Name the format"),
        ([], "Name the format"),
        ({"version": 1, "data": [{"instruction": "q", "output": "a"}]}, "If its rows lie under 'data'"),
        ([{"prompt": "p", "answers": [{"answer": "a"}], "turns": 1}], "Name the format"),  # a count of turns: Nectar
    ],
)
def test_what_fits_nothing_is_refused_with_what_to_do(tmp_path: Path, rows: list[Any], remedy: str) -> None:
    with pytest.raises(RecordError) as caught:
        told(tmp_path, rows)
    assert remedy in (caught.value.remedy or "") and caught.value.where == str(tmp_path / "rows.json")


def test_a_config_is_sent_to_its_files(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="a config is no file of records"):
        told(tmp_path, "data:\n  train: []\n", "run.yaml")


def test_the_error_lists_every_format_that_has_keys() -> None:
    assert all(f"({name})" in expected(FORMATS) for name in KEYED)
