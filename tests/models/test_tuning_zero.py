"""Tuning methods under DeepSpeed: two ranks equal one process, and what they save is whole."""

from __future__ import annotations

import json

import pytest
import torch

from mmit.train import checkpoint
from mmit.train.run import run
from tests.models.tuned_models import logits
from tests.tiny_run import tiny_config
from tests.train.launch import start_ranks

METHODS = {
    "houlsby": {"llm": {"mode": "houlsby", "options": {"size": 3}}, "vision": {"mode": "lora", "lr": 1e-3}},
    "soft_prompt": {"llm": {"mode": "soft_prompt"}, "vision": {"mode": "layernorm", "lr": 1e-3}},
    "prefix": {"llm": {"mode": "prefix"}},
    "bitfit": {"llm": {"mode": "bitfit", "options": {"insert_biases": True}}},
    "lora+": {"llm": {"mode": "lora", "options": {"r": 4, "dora": True, "lr_ratio": 8}}},
}


@pytest.mark.long
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_equal_one_process(tmp_path, stage):
    train = {"steps": 3, "rows_per_step": 4, "precision": "fp32"}
    configs = []
    for method, tune in METHODS.items():
        options = {"tune": tune, "train": train}
        assert run(tiny_config(tmp_path, run={"dir": str(tmp_path / f"{method}-one")}, **options)) == 0
        place = {"dir": str(tmp_path / f"{method}-two")}
        configs.append(tmp_path / f"{method}.yaml")
        configs[-1].write_text(tiny_config(tmp_path, run=place, engine={"deepspeed": stage}, **options).to_yaml())
    start_ranks(["-m", "tests.train.run_many", *map(str, configs)], ranks=2, timeout=900)
    for method in METHODS:
        lines = ((tmp_path / f"{method}-{x}" / "metrics.jsonl").read_text().splitlines() for x in ("one", "two"))
        one, two = ([json.loads(line)["loss"] for line in found] for found in lines)
        assert two == pytest.approx(one, abs=1e-5), method
        alone, together = (checkpoint.load_model(tmp_path / f"{method}-{x}", device="cpu").vlm for x in ("one", "two"))
        torch.testing.assert_close(logits(together), logits(alone), atol=2e-3, rtol=0)
