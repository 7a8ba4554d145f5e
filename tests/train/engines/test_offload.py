"""Optimizer and parameters offloaded to the CPU and to a disk: stepped on two ranks, saved, resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")
from mmit.config import Config
from mmit.errors import ConfigError
from mmit.train import parts
from mmit.train.checkpoint import folders
from mmit.train.engines.deepspeed_engine import check_deepspeed
from mmit.train.engines.world import World
from mmit.train.engines.zero import complete, deepspeed_options
from mmit.train.monitor.heartbeat import Heartbeat
from mmit.train.run import run
from tests.tiny_run import two_layers as tiny_config
from tests.train.checkpoint.test_ranks_saving import tensors
from tests.train.engines.test_zero import at_step
from tests.train.launch import ROOT, start_ranks
from tests.train.test_run import losses


def config_of(folder: Path, name: str, engine: str) -> Config:
    """An LLM wide enough that DeepSpeed writes it to disk, which it does from 1 MiB a tensor on; tuned fully."""
    model: dict[str, Any] = tiny_config(folder).model.model_dump()
    model["llm"]["random_init"] |= {"hidden_size": 256, "intermediate_size": 2048}
    train = {"steps": 4, "rows_per_step": 4, "precision": "fp32", "save_every": 2, "keep_last": 9, "threads": 1}
    tune = {"llm": {"mode": "full", "lr": 1e-3}, "projector": {"mode": "full", "lr": 1e-2}}
    place = {"dir": str(folder / name), "resume": "auto"}
    return tiny_config(folder, run=place, model=model, train=train, tune=tune, engine={"deepspeed": engine})


def nvme(folder: Path) -> dict[str, Any]:
    """The JSON of ours, with a folder that exists."""
    options = deepspeed_options("zero3_nvme")
    for section in ("offload_optimizer", "offload_param"):
        options["zero_optimization"][section]["nvme_path"] = str(folder)
    return options


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero2_offload", "zero3_offload", "zero3_nvme"])
def test_offloaded_ranks_step_as_one_process_and_resume_exactly(tmp_path, engine):
    disk = tmp_path / "disk"
    disk.mkdir()
    if engine == "zero3_nvme":
        try:
            check_deepspeed(complete(nvme(disk), precision="fp32", clip=1.0))
        except ConfigError as error:
            pytest.skip(str(error))
        engine = str(tmp_path / "nvme.json")
        Path(engine).write_text(json.dumps(nvme(disk)))
    assert run(config_of(tmp_path, "one", "zero0")) == 0
    (tmp_path / "two.yaml").write_text(config_of(tmp_path, "two", engine).to_yaml())
    arguments = [str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "two.yaml")]
    start_ranks(arguments, ranks=2, timeout=900)  # the first start compiles DeepSpeed's extension for disks
    straight = losses(tmp_path / "two")
    assert straight == pytest.approx(losses(tmp_path / "one"), abs=1e-5) and straight[-1] < straight[0] - 1
    swapped = {path.name.partition("-")[0] for path in disk.rglob("*.swp")}
    assert not engine.endswith(".json") or {"exp_avg", "exp_avg_sq"} <= swapped
    last = tmp_path / "two" / "checkpoints" / "step-000004"
    folders.verify(last)
    whole = tensors(last)
    at_step(tmp_path / "two", 2)
    start_ranks(arguments, ranks=2, timeout=300)
    assert losses(tmp_path / "two") == straight and tensors(last) == whole


def test_a_disk_without_libaio_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    monkeypatch.setattr(type(builder), "has_function", lambda self, name, libraries: False)
    monkeypatch.setattr(parts, "assemble", lambda *args, **options: pytest.fail("the model was loaded"))
    (tmp_path / "nvme.json").write_text(json.dumps(nvme(tmp_path)))
    heart = Heartbeat(tmp_path, rank=0, world=1, stall=None, report=print)
    ranks = World(0, 1, torch.device("cpu"), deepspeed=True)
    with pytest.raises(ConfigError, match="apt install libaio-dev") as error:
        parts.build_model(
            parts.Start(config_of(tmp_path, "run", str(tmp_path / "nvme.json")), None, ranks, print, heart)
        )
    assert error.value.where == "engine.deepspeed.zero_optimization.offload_optimizer"
