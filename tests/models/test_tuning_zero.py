"""Tuning methods under DeepSpeed: two ranks equal one process, and what they save is whole."""

from __future__ import annotations

import json

import pytest
import torch

from mmit.errors import ConfigError
from mmit.train.checkpoint import model as checkpoint
from mmit.train.parts import _partition
from mmit.train.run import run
from tests.models.tuned_models import logits
from tests.tiny_run import two_layers as tiny_config
from tests.train.launch import start_ranks

METHODS = {
    "dora": {
        "llm": {"mode": "lora", "options": {"r": 4, "dora": True}},
        "vision": {"mode": "lora", "lr": 1e-3, "options": {"dora": True}},
    },
    "houlsby": {"llm": {"mode": "houlsby", "options": {"size": 3}}, "vision": {"mode": "lora", "lr": 1e-3}},
    "soft_prompt": {"llm": {"mode": "soft_prompt"}, "vision": {"mode": "layernorm", "lr": 1e-3}},
    "prefix": {"llm": {"mode": "prefix"}},
    "bitfit": {"llm": {"mode": "bitfit", "options": {"insert_biases": True}}},
    "lora+": {"llm": {"mode": "lora", "options": {"r": 4, "lr_ratio": 8}}},
}


@pytest.mark.long
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_equal_one_process(tmp_path, stage):
    train = {"steps": 3, "rows_per_step": 4, "precision": "fp32"}
    configs = []
    methods = {m: t for m, t in METHODS.items() if m != "dora" or stage == "zero2"}  # refused under ZeRO-3
    for method, tune in methods.items():
        options = {"tune": tune, "train": train}
        assert run(tiny_config(tmp_path, run={"dir": str(tmp_path / f"{method}-one")}, **options)) == 0
        place = {"dir": str(tmp_path / f"{method}-two")}
        configs.append(tmp_path / f"{method}.yaml")
        configs[-1].write_text(tiny_config(tmp_path, run=place, engine={"deepspeed": stage}, **options).to_yaml())
    start_ranks(["-m", "tests.train.run_many", *map(str, configs)], ranks=2, timeout=900)
    for method in methods:
        lines = ((tmp_path / f"{method}-{x}" / "metrics.jsonl").read_text().splitlines() for x in ("one", "two"))
        one, two = ([json.loads(line)["loss"] for line in found] for found in lines)
        assert two == pytest.approx(one, abs=1e-5), method
        alone, together = (checkpoint.load_model(tmp_path / f"{method}-{x}", device="cpu").vlm for x in ("one", "two"))
        torch.testing.assert_close(logits(together), logits(alone), atol=2e-3, rtol=0)


@pytest.mark.parametrize("component", ["vision", "llm"])
def test_dora_under_zero3_is_refused_before_anything_is_loaded(tmp_path, component):
    tune = {component: {"mode": "lora", "lr": 1e-3, "options": {"dora": True}}}
    with pytest.raises(ConfigError, match="zero2") as error:
        _partition(tiny_config(tmp_path, engine={"deepspeed": "zero3"}, tune=tune))
    assert error.value.where == f"tune.{component}.options.dora"


def test_qlora_under_zero3_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="zero2") as error:
        _partition(tiny_config(tmp_path, engine={"deepspeed": "zero3"}, tune={"llm": {"mode": "qlora"}}))
    assert error.value.where == "tune.llm.mode"
