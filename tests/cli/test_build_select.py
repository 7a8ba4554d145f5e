"""`mmit build select`: the best, their control, and configs that cannot be built."""

from __future__ import annotations

import json

import pytest

from mmit.records import read_jsonl, write_jsonl
from tests.build.test_select import record, run
from tests.teachers.server import Server


def test_the_command_keeps_the_best_and_writes_the_control(tmp_path):
    write_jsonl([record(n) for n in range(20)], tmp_path / "in.jsonl")

    def judge(body) -> str:
        n = int(body["messages"][0]["content"].rpartition("answer ")[2])
        return "who knows" if n == 7 else f"Score: {1 + n % 5}"

    with Server(judge) as server:
        settings = {"records": "in.jsonl", "teacher": {"open": f"{server.url}#m", "terms": "MIT"}}
        settings |= {"keep": {"least": 4}, "control": True}
        assert "20 requests" in run(tmp_path, "--dry-run", **settings)
        said = run(tmp_path, **settings)
        run(tmp_path, **settings)
        assert server.served == 20
    assert "s: 8 records" in said and "drawn at random" in said
    best = list(read_jsonl(tmp_path / "out/records/s.jsonl"))
    assert [r.meta["build"]["score"] for r in best] == [4.0, 5.0] * 4
    assert best[0].meta["build"]["scored_by"] == "m" and best[0].meta["build"]["score_request"]
    assert len(list(read_jsonl(tmp_path / "out/control/records/s.jsonl"))) == 8
    stated = json.loads((tmp_path / "out/build.json").read_text())
    assert stated["in"] == 20 and stated["dropped"] == {"the score is too low": 11, "no score in the judge's reply": 1}


def test_diversity_alone_needs_no_teacher(tmp_path):
    write_jsonl([record(n, text="Name some rivers of it") for n in range(4)], tmp_path / "in.jsonl")
    said = run(tmp_path, records="in.jsonl", score={"by": "none"}, diversity={"rouge_l": 0.7})
    assert "s: 1 records" in said and "dropped 3: too near to a better one (ROUGE-L)" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score": {"by": "jugde"}}, "did you mean 'judge'"),
        ({"score": {"scale": [5, 1]}}, "score.scale"),
        ({"keep": {"share": 2}}, "keep.share"),
        ({"keep": {"least": "much"}}, "least is 'much'"),
        ({"keep": {"order": "hihgest"}}, "did you mean 'highest'"),
        ({"diversity": {"rouge": 1}}, "did you mean 'rouge_l'"),
        ({"control": "yes"}, "control"),
        ({"records": None}, "'records' is missing"),
        ({"score": {"by": "none"}}, "a teacher, but no score"),
        ({"keep": {"least": 9}}, "nothing was kept: the score is too low (1)"),
    ],
)
def test_configs_that_cannot_be_built(tmp_path, settings, said):
    write_jsonl([record(1)], tmp_path / "in.jsonl")
    with Server(lambda body: "Score: 3") as server:
        given = {"records": "in.jsonl", "teacher": {"open": f"{server.url}#m", "terms": "MIT"}} | settings
        assert said in run(tmp_path, code=2, **given)
