"""ZeRO 0 to 3 x ranks x what is in the batch x how it is split: no hang, and one process' loss and gradients."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("deepspeed")
from tests.train.engines.zero_cases import chosen, write_data
from tests.train.launch import start_ranks


@pytest.mark.parametrize(
    ("ranks", "part"),
    [
        pytest.param(2, "diagonal", marks=pytest.mark.slow),
        pytest.param(2, "all", marks=pytest.mark.long),
        pytest.param(4, "all", marks=pytest.mark.long),
    ],
)
def test_ranks_equal_one_process(tmp_path, ranks, part):
    write_data(tmp_path)
    said = start_ranks(["-m", "tests.train.engines.zero_cases", str(tmp_path), part], ranks=ranks, timeout=1500)
    towers = [1, 1, 1, 2] if part == "diagonal" else [2] * 4
    cases = sum(n * len(chosen(stage, ranks, part)) for stage, n in enumerate(towers))
    others = 2 if part == "diagonal" else 4 + 4 + 3  # bad numbers, states, bad numbers in bf16
    for text in said:
        rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"stage"')]
        assert len(rows) == cases + others, text[-2000:]
        for row in rows:
            name = (row.pop("stage"), row.pop("case"))
            if "gradient" in row:
                assert row["gradient"] <= 1e-6 * max(row["scale"], 1) and row["loss"] <= 1e-6, (name, row)
                assert row["finite"], name
            else:
                assert all(row.values()), (name, row)
