"""Rows for the tools that look at data: in order with their errors, and samples that are even."""

from __future__ import annotations

import json

import pytest

from mmit.data.rows import read_rows, sample_rows
from mmit.errors import ConfigError, RecordError
from tests.data.lint.test_linter import sound


def test_rows_come_in_order_with_their_errors(tmp_path):
    good, bad = sound(4), '{"turns": []}'
    lines = [json.dumps(record.to_json()) for record in good]
    (tmp_path / "rows.jsonl").write_text("\n".join([bad, lines[0], lines[1], bad, lines[2], lines[3], bad]))
    kinds = [isinstance(row, RecordError) for row in read_rows(tmp_path / "rows.jsonl")]
    assert kinds == [True, False, False, True, False, False, True]
    assert len(list(read_rows(tmp_path / "rows.jsonl", limit=3))) == 3
    with pytest.raises(ConfigError, match="no such file"):
        next(read_rows(tmp_path / "gone.jsonl"))


def test_samples_are_even_and_repeatable():
    rows = sound(50)
    drawn, total = sample_rows(rows, 10, seed=3)
    assert total == 50 and len(drawn) == 10 and drawn == sample_rows(iter(rows), 10, seed=3)[0]
    assert [rows[number - 1] for number, _ in drawn] == [record for _, record in drawn]
    assert drawn != sample_rows(rows, 10, seed=4)[0]
    counts = [0] * 10
    for seed in range(600):
        for number, _ in sample_rows(rows[:10], 3, seed=seed)[0]:
            counts[number - 1] += 1
    assert max(counts) < 240 and min(counts) > 120  # 180 expected each
    assert sample_rows(rows[:4], 10, seed=0)[0] == list(enumerate(rows[:4], 1))
