"""Tuning methods under DeepSpeed: two ranks equal one process, and what they save is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmit.train import checkpoint
from mmit.train.run import run
from tests.models.tuned_models import logits
from tests.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "houlsby": {"llm": {"mode": "houlsby", "options": {"size": 3}}, "vision": {"mode": "lora", "lr": 1e-3}},
    "soft_prompt": {"llm": {"mode": "soft_prompt"}, "vision": {"mode": "layernorm", "lr": 1e-3}},
    "prefix": {"llm": {"mode": "prefix"}},
    "bitfit": {"llm": {"mode": "bitfit", "options": {"insert_biases": True}}},
    "lora+": {"llm": {"mode": "lora", "options": {"r": 4, "dora": True, "lr_ratio": 8}}},
}


@pytest.mark.long
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_process(tmp_path, stage, method):
    train = {"steps": 3, "rows_per_step": 4, "precision": "fp32"}
    options = {"tune": METHODS[method], "train": train}
    assert run(tiny_config(tmp_path, run={"dir": str(tmp_path / "one")}, **options)) == 0
    config = tiny_config(tmp_path, run={"dir": str(tmp_path / "two")}, engine={"deepspeed": stage}, **options)
    (tmp_path / "two.yaml").write_text(config.to_yaml())
    bin_folder = Path(sys.executable).parent
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"
    command = [str(bin_folder / "deepspeed"), "--num_gpus", "2", "--master_port", str(29600 + os.getpid() % 300)]
    command += [str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / x / "metrics.jsonl").read_text().splitlines()]
        for x in ("one", "two")
    )
    assert two == pytest.approx(one, abs=1e-5)
    alone, together = (checkpoint.load_model(tmp_path / x, device="cpu").vlm for x in ("one", "two"))
    torch.testing.assert_close(logits(together), logits(alone), atol=2e-3, rtol=0)
