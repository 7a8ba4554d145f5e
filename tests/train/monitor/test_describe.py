"""run.json: what a start was, and which earlier starts still count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmit.train.monitor import describe
from mmit.train.monitor.describe import note_start
from mmit.train.monitor.run_files import RUN, read_json

FACTS: dict[str, Any] = {"hardware": {"ranks": 2}, "steps": 9}


def steps(folder: Path) -> list[int]:
    return [start["step"] for start in read_json(folder / RUN, RUN)["starts"]]


def test_starts_that_a_resume_went_behind_are_forgotten(tmp_path: Path) -> None:
    for step in (0, 4, 8):
        note_start(tmp_path, FACTS, step=step)
    assert steps(tmp_path) == [0, 4, 8]
    note_start(tmp_path, FACTS, step=5)
    assert steps(tmp_path) == [0, 4, 5]  # the course from 8 on was left
    note_start(tmp_path, {**FACTS, "steps": 7}, step=0)
    assert steps(tmp_path) == [0] and read_json(tmp_path / RUN, RUN)["steps"] == 7


def test_each_source_has_its_units_and_tokens() -> None:
    sources = [SimpleNamespace(name=name, origin=f"{name}.jsonl", __len__=lambda: 0) for name in "ab"]
    data: Any = SimpleNamespace(sources=[Sized(source, 3) for source in sources])
    scan: Any = SimpleNamespace(
        source=np.array([0, 1, 1]), length=np.array([5, 7, 9]), records=6, bad=[1], supervised=8, pictures=2
    )
    found = describe._data(data, scan)
    assert [(s["name"], s["path"], s["records"], s["units"], s["tokens"]) for s in found.pop("sources")] == [
        ("a", "a.jsonl", 3, 1, 5),
        ("b", "b.jsonl", 3, 2, 16),
    ]
    assert found == {"records": 6, "bad": 1, "supervised": 8, "pictures": 2}


class Sized:
    """A source of so many records."""

    def __init__(self, facts: Any, count: int) -> None:
        self.name, self.origin, self.count = facts.name, facts.origin, count

    def __len__(self) -> int:
        return self.count


def test_the_first_difference_from_the_template_is_named_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    records = {n: SimpleNamespace(where=f"row {n}") for n in range(40)}
    data: Any = SimpleNamespace(record=lambda n, outline: records[n], split_turns=False)
    scan: Any = SimpleNamespace(record=np.repeat(np.arange(40), 2))
    asked: list[str] = []

    def difference(record: Any, chat: Any) -> str:
        asked.append(record.where)
        return "a space" if record.where == "row 2" else ""

    chat: Any = None
    monkeypatch.setattr(describe, "difference", difference)
    describe._compare(data, scan, chat, told.append)
    assert told == ["row 2 is not what the chat template writes: a space"] and asked == ["row 0", "row 1", "row 2"]
    monkeypatch.setattr(describe, "difference", lambda record, chat: asked.append(record.where))
    asked.clear()
    describe._compare(data, scan, chat, told.append)
    assert len(asked) == describe.FIRST // 2  # of two units a record
