"""fp16 under ZeRO: the dynamic loss scale goes on where it stood."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("deepspeed")
from tests.tiny_run import two_layers as tiny_config
from tests.train.checkpoint.test_ranks_saving import tensors
from tests.train.engines.test_zero import at_step
from tests.train.launch import start_ranks
from tests.train.test_run import losses


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_scale_goes_on_where_it_stood(tmp_path, stage):
    """Doubled after every second good step, so that a scale which starts afresh shows."""
    options = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
    options["fp16"] = {"initial_scale_power": 8, "loss_scale_window": 2}
    (tmp_path / "ds.json").write_text(json.dumps(options))
    train = {"steps": 6, "rows_per_step": 4, "precision": "fp16", "save_every": 3, "keep_last": 9, "threads": 1}
    place = {"dir": str(tmp_path / "run"), "resume": "auto"}
    config = tiny_config(tmp_path, run=place, train=train, engine={"deepspeed": str(tmp_path / "ds.json")})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    run_dir, arguments = tmp_path / "run", ["-m", "tests.train.engines.fp16_case", str(tmp_path / "run.yaml")]
    start_ranks(arguments, ranks=2, timeout=240)
    last = run_dir / "checkpoints" / "step-000006"
    straight, whole = losses(run_dir), tensors(last)
    scales = [json.loads((p / "trainer" / "progress.json").read_text())["scaler"] for p in (last.parent).glob("step-*")]
    assert len({s["cur_scale"] for s in scales}) == 2 and all(s["cur_scale"] > 2**8 for s in scales)
    at_step(run_dir, 3)
    start_ranks(arguments, ranks=2, timeout=240)
    assert losses(run_dir) == straight and tensors(last) == whole
    assert json.loads((last / "trainer" / "progress.json").read_text())["scaler"] in scales
