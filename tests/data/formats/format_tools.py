"""What the tests of the importers share: files written as the official ones are, and records shown short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmit.data.formats import import_file
from mmit.errors import RecordError
from mmit.records import Part, Record, Text, read_jsonl, write_jsonl


def shape(record: Record) -> list[tuple[str, list[str]]]:
    """Return the turns with images written as [path]."""
    return [(turn.role, [shown(part) for part in turn.parts]) for turn in record.turns]


def shown(part: Part) -> str:
    return part.text if isinstance(part, Text) else f"[{part.source!s}]"


def texts(record: Record) -> list[list[str]]:
    """Return the parts of each turn, images as [path]."""
    return [parts for _, parts in shape(record)]


def write(path: Path, value: Any, *, lines: bool = False) -> Path:
    """Write JSON, or JSONL of a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value, indent=1), "utf-8")
    return path


def imported(path: Path, format: str, **options: Any) -> list[Record]:
    """Import a whole file, and check that every record survives being written and read."""
    records = list(import_file(path, format, **options))
    copy = path.with_name("copy.jsonl")
    write_jsonl(records, copy)
    again = list(read_jsonl(copy))
    assert [r.to_json()["meta"] for r in again] == [r.to_json()["meta"] for r in records]
    assert [(r.id, r.source, r.row, r.licence) for r in again] == [(r.id, r.source, r.row, r.licence) for r in records]
    assert [[t.text for t in r.turns] for r in again] == [[t.text for t in r.turns] for r in records]
    return records


def bad_rows(path: Path, format: str, **options: Any) -> list[RecordError]:
    """Return the errors of the rows that cannot be imported; each names the file and a remedy."""
    bad: list[RecordError] = []
    list(import_file(path, format, on_bad=bad.append, **options))
    for error in bad:
        assert error.where.startswith(f"{path}:") and error.problem and error.remedy, str(error)
    return bad


def talk(*values: str, **keys: Any) -> dict[str, Any]:
    speakers = ["human", "gpt"] * len(values)
    turns = [{"from": s, "value": v} for s, v in zip(speakers, values, strict=False)]
    return {"id": "x1", "conversations": turns, **keys}


def ask(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "a"}]}


def url(value: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": value, "detail": "low"}}
