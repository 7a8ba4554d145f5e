"""Preference methods on ranks that divide rows unevenly, under ZeRO: the run of one process, number by number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
from mmit.config import Config
from mmit.train.run import run
from tests.tiny_run import two_layers as tiny_config
from tests.train.launch import start_ranks
from tests.train.preference_bench import write_pairs


def config(folder: Path, method: str, name: str, **engine: str) -> Config:
    """Three rows a step: one of two ranks has nothing to do in its second micro-batch, and looks at no picture."""
    data = write_pairs(folder / method, kind=method, count=6)
    train = {"steps": 4, "rows_per_step": 3, "eval_every": 2, "precision": "fp32", "objective": {"kind": method}}
    place = {"train": [{"path": str(data)}], "eval": [{"path": str(data)}], "max_length": 128, "pack_tokens": 128}
    return tiny_config(folder, run={"dir": str(folder / name)}, data=place, train=train, engine=engine)


def told(folder: Path) -> list[tuple[float, float]]:
    """Loss and KTO's estimate of each step, and of what was measured on held-out records."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["loss"], row.get("kl", 0.0)) for row in rows if "loss" in row]
    return steps + [(row["eval"]["eval_loss"], row["eval"].get("eval_kl", 0.0)) for row in rows if row.get("eval")]


@pytest.mark.slow
def test_ranks_take_the_steps_of_one_process(tmp_path):
    cases = {"kto": ("zero2", "zero3"), "orpo": ("zero0", "zero3")}
    files = []
    for kind, stages in cases.items():
        assert run(config(tmp_path, kind, f"{kind}-alone")) == 0
        for stage in stages:
            path = tmp_path / f"{kind}-{stage}.yaml"
            path.write_text(config(tmp_path, kind, f"{kind}-{stage}", kind="deepspeed", deepspeed=stage).to_yaml())
            files.append(str(path))
    start_ranks(
        ["-m", "tests.train.run_many", *files], ranks=2, timeout=900
    )  # the first start compiles an extension of DeepSpeed
    for kind, stages in cases.items():
        alone = told(tmp_path / f"{kind}-alone")
        assert len(alone) == 6
        for stage in stages:
            for mine, theirs in zip(told(tmp_path / f"{kind}-{stage}"), alone, strict=True):
                assert mine == pytest.approx(theirs, abs=2e-5), stage
