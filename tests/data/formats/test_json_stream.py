"""A list read through a small window equals the list loaded whole, and each value can be read at its bytes."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import json_stream
from mmit.data.formats.common import json_rows
from mmit.data.formats.json_stream import list_items, list_places
from mmit.errors import RecordError

LETTERS = string.printable + 'äß€漢😀\\"\u2028'


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {f"k{i}]": some_value(rng, depth + 1) for i in range(rng.randrange(4))}
    text = "".join(rng.choices(LETTERS, k=rng.randrange(30)))
    return (None, rng.random() < 0.5, rng.randrange(-(10**9), 10**9), rng.random() * 1e9, text)[kind]


@pytest.mark.parametrize("seed", range(40))
def test_values_and_their_bytes(tmp_path, seed):
    rng = random.Random(seed)
    values = [some_value(rng) for _ in range(rng.randrange(30))]
    text = json.dumps(values, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
    path = tmp_path / "list.json"
    path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + rng.choice(["", " \r\n"]).encode() + text.encode() + b"\n ")
    data = path.read_bytes()
    for block in (7, 64, 1 << 20):
        items = list(list_items(str(path), block=block))
        assert [value for _, _, value in items] == values
        assert [json.loads(data[begin:end]) for begin, end, _ in items] == values
    assert list(list_places(str(path))) == [(begin, end) for begin, end, _ in items]


@pytest.mark.parametrize(
    "text", ['[1, 2,\n {"a": tru}, 3]', "[1\n, 2", '[1, "open]\n', "[1, 2]\n x", "[1 2]", '["a",\n\n "b" "c"]', "[1,]"]
)
def test_the_place_of_an_error_is_that_of_the_whole_file(tmp_path, text):
    path = tmp_path / "list.json"
    path.write_text("[" + "0,\n" * 50 + text[1:])
    try:
        json.loads(path.read_text())
        raise AssertionError
    except json.JSONDecodeError as error:
        line = error.lineno
        column, problem = error.colno, error.msg
    for block in (5, 1 << 20):
        with pytest.raises(RecordError, match="not JSON") as refused:
            list(list_items(str(path), block=block))
        assert refused.value.where == f"{path}:{line}"
        # From Python 3.13 on, json points at a comma with nothing behind it, the reader of streams at what follows.
        places = {column, column + ("trailing comma" in problem)}
        assert any(f"column {place}" in refused.value.problem for place in places)


def test_an_error_is_found_without_reading_on(tmp_path, monkeypatch):
    path = tmp_path / "list.json"
    path.write_text('[{"a": 1}, {"a": nope}, ' + '{"b": 2}, ' * 10_000 + "{}]")
    taken, more = [], json_stream._Window.more
    monkeypatch.setattr(json_stream._Window, "more", lambda self, size: (taken.append(size), more(self, size)))
    with pytest.raises(RecordError, match="column"):
        list(list_items(str(path), block=64))
    assert sum(taken) < 1000


def test_what_is_no_utf8_is_refused_with_its_file(tmp_path):
    path = tmp_path / "list.json"
    path.write_bytes(b'["a", "\xff"]')
    with pytest.raises(RecordError, match="UTF-8|utf-8"):
        list(list_items(str(path)))


def test_a_key_twice_is_an_error_of_its_row(tmp_path: Path) -> None:
    """Python keeps the last without a word; rows before and behind are read."""
    rows = ['{"a": 1}', '{"turns": [{"value": "x", "value": "y"}]}', '{"a": 2}', '{"b": 1, "b": 1}']
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(rows))
    whole.write_text("[" + ",\n".join(rows) + "]")
    for path in (lines, whole):
        values = [value for _, value in json_rows(str(path))]
        assert values[0] == {"a": 1} and values[2] == {"a": 2}
        assert "has the key 'value' twice" in values[1].problem and "'b' twice" in values[3].problem
