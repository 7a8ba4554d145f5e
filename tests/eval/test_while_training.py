"""Benchmarks inside a run: the scores of `mmit eval` on the same weights, and a run that is not disturbed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from mmit.cli import main
from mmit.errors import ConfigError, ImageError
from mmit.eval.while_training import task_scores
from mmit.train.resolve import check_zero3
from mmit.train.run import run
from mmit.yamlio import dump_yaml
from tests.tiny_run import DROPOUT, tiny_config
from tests.train.launch import ROOT, start_ranks


def write_task(folder, **keys) -> str:
    task = {"name": "own", "records": "data/train.jsonl", "metric": "exact", "max_new_tokens": 4, **keys}
    (folder / "own.yaml").write_text(dump_yaml(task))
    return str(folder / "own.yaml")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scores_are_those_of_mmit_eval_and_the_run_is_as_without(tmp_path):
    torch.set_num_threads(1)
    plain = tiny_config(tmp_path, tune=DROPOUT, run={"dir": str(tmp_path / "plain")}, train={"steps": 4})
    task = write_task(tmp_path)
    assert run(plain) == 0
    train = {"steps": 4, "eval_every": 2, "eval_tasks": [task], "eval_questions": 9}
    measured = tiny_config(tmp_path, tune=DROPOUT, run={"dir": str(tmp_path / "measured")}, train=train)
    assert run(measured, evaluate=task_scores([task], 9)) == 0
    losses, scores = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("plain", "measured"))
    assert losses == scores
    found = [row["eval"]["own"] for row in rows(tmp_path / "measured") if "eval" in row]
    assert len(found) == 2
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "measured"), "--task", task, "--limit", "9", "--no-baselines"])
    report = json.loads((tmp_path / "measured" / "eval" / "own" / "report.json").read_text())
    assert found[-1] == report["accuracy"]


def test_the_command_reads_the_tasks_before_it_trains(tmp_path, capsys):
    config = tiny_config(tmp_path).model_dump(exclude_defaults=True)
    config["train"]["eval_tasks"] = ["no_such_task"]
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(tmp_path / "run.yaml")])
    assert end.value.code == 2 and "no_such_task" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tasks_that_cannot_be_measured_here(tmp_path):
    with pytest.raises(ConfigError, match="needs a judge"):
        task_scores([write_task(tmp_path, metric="judge:llava_bench")], 5)
    task = write_task(tmp_path)
    tiny_config(tmp_path)
    with pytest.raises(ConfigError, match="two tasks have one name"):
        task_scores([task, task], 5)
    (tmp_path / "data" / "3.png").unlink()
    with pytest.raises(ImageError, match="cannot open the image"):
        task_scores([task], 99)


def test_zero3_is_refused_before_anything_is_loaded(tmp_path):
    config = tiny_config(tmp_path, train={"eval_tasks": ["pope"]}, engine={"deepspeed": "zero3"})
    with pytest.raises(ConfigError, match="ZeRO-3"):
        check_zero3(config, world=SimpleNamespace(deepspeed=True))


@pytest.mark.slow
def test_two_ranks_find_the_scores_of_one(tmp_path):
    pytest.importorskip("deepspeed")
    train = {"steps": 3, "rows_per_step": 2, "eval_every": 1, "eval_questions": 11}
    task = write_task(tmp_path)
    train["eval_tasks"] = [task]
    found = {}
    for name, ranks in (("one", 1), ("two", 2)):
        place = {"dir": str(tmp_path / name)}
        config = tiny_config(tmp_path, run=place, train=train, engine={"deepspeed": "zero2"})
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml())
        arguments = [str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / f"{name}.yaml")]
        start_ranks(arguments, ranks=ranks, timeout=240)
        found[name] = [row["eval"]["own"] for row in rows(tmp_path / name) if "eval" in row]
    assert found["one"] == found["two"] and len(found["one"]) == 3
