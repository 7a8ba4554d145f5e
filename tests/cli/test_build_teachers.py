"""Builds that ask teachers, from the command line: budgets, replays, and configs that cannot be built."""

from __future__ import annotations

import pytest

from tests.build.test_outputs import run, teacher, write
from tests.teachers.server import Server


def test_a_full_budget_exits_with_3_and_the_build_goes_on(tmp_path):
    with Server(lambda body: "A " + body["messages"][-1]["content"]) as server:
        config = write(tmp_path, teacher=teacher(server, in_flight=1), budget={"requests": 5})
        said = run("outputs", config, "--out", tmp_path / "out", code=3)
        assert "the budget is spent: 5 of 5 requests; 7 requests are not asked yet" in said
        assert "not finished" in run("status", tmp_path / "out")
        config = write(tmp_path, teacher=teacher(server, in_flight=4))
        run("outputs", config, "--out", tmp_path / "out")
        assert server.served == 12
        config = write(tmp_path, teacher=teacher(server), system="Be brief.")
        assert "another config" in run("outputs", config, "--out", tmp_path / "out", code=2)


def test_a_lenient_replay_drops_and_counts_what_is_not_recorded(tmp_path):
    with Server(lambda body: "A " + body["messages"][-1]["content"]) as server:
        run("outputs", write(tmp_path, 5, teacher=teacher(server)), "--out", tmp_path / "out")
        live = write(tmp_path, 8, teacher=teacher(server))
        assert "--lenient is for replayed teachers" in run(
            "outputs", live, "--out", tmp_path / "x", "--lenient", code=2
        )
    config = write(tmp_path, 8, teacher={"open": "replay:out/journal.jsonl", "terms": "MIT"})
    assert "is not in the journal" in run("outputs", config, "--out", tmp_path / "again", code=2)
    said = run("outputs", config, "--out", tmp_path / "again", "--lenient")
    assert "outputs-replay: 5 records" in said and "dropped 3: not in the replayed journal" in said
    assert "3 requests are not in the replayed journal" in said
    journal = (tmp_path / "again/journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + 5  # a fuller recording may answer the rest later


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rows": {"path": "rows.jsonl"}}, "terms that are not allowed: LicenseRef-unknown"),
        ({"fields": {"instruction": "instructions"}}, "did you mean 'instruction'"),
        ({"draw": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"choose": [1, 2, 3]}, "choose"),
        ({"budget": {"tokens": 0}}, "budget"),
        ({"teachers": "x"}, "did you mean 'teacher'"),
    ],
)
def test_configs_that_cannot_be_built(tmp_path, settings, said):
    with Server() as server:
        config = write(tmp_path, 2, teacher=teacher(server), **settings)
        assert said in run("outputs", config, "--out", tmp_path / "out", code=2)
