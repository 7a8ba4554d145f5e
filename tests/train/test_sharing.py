"""Ranks share what comes before the first step: all hold bitwise what one process computes, and none computes twice."""

from __future__ import annotations

import json

import pytest
import torch

from tests.train.launch import start_ranks
from tests.train.share_cases import COUNT, write_pictures


@pytest.mark.slow
def test_features_and_projector_of_ranks_are_those_of_one_process(tmp_path):
    write_pictures(tmp_path / "pictures")
    rows: dict[int, list[dict]] = {}
    for ranks in (1, 2):
        said = start_ranks(["-m", "tests.train.share_cases", str(tmp_path)], ranks=ranks, timeout=240)
        rows[ranks] = [
            {row.pop("case"): row for row in map(json.loads, filter(lambda line: line[:1] == "{", text.splitlines()))}
            for text in said
        ]
    one = torch.load(tmp_path / "0-of-1.pt", weights_only=True)
    distinct = sorted({f"{i:02d}.png" for i in range(COUNT)} - {"22.png"})  # equal to the first
    for ranks, each in rows.items():
        for rank in range(ranks):
            here = torch.load(tmp_path / f"{rank}-of-{ranks}.pt", weights_only=True)
            assert here.keys() == one.keys() and all(torch.equal(here[k], one[k]) for k in one), (rank, ranks)
        for case in ("memory", "disk, empty", "disk, cut off on one node"):
            assert sorted(name for row in each for name in row[case]["decoded"]) == distinct, (case, ranks)
            assert all(len(row[case]["decoded"]) < len(distinct) for row in each) or ranks == 1
        lost = distinct if ranks > 1 else []
        assert sorted(name for row in each for name in row["disk, lost on one node"]["decoded"]) == lost
        for row in each:
            assert row["disk, full"]["decoded"] == row["disk, kept on every node"]["decoded"] == []
            assert all(facts.get("same", True) for facts in row.values())
            assert row["alignment"]["phases"] == ["word alignment", "sharing the projector"]
            assert "is not a caption" in row["bad captions"]["told"]
            assert "nowhere.png" in row["missing picture"]["told"]
            assert row["other bytes"]["told"]
            assert ranks == 1 or "do not see the same pictures" in row["other pictures"]["told"]
        assert len({row["missing picture"]["told"] for row in each}) == 1
        assert len({row["bad captions"]["told"] for row in each}) == 1
