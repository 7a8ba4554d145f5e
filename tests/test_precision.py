"""`train.precision=auto`: what it takes on which machine, and that everything after a run follows it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mmit
from mmit import cores, precision
from mmit.config import load_config
from mmit.errors import ConfigError
from mmit.train.engines.world import World
from mmit.train.resolve import planned, resolve_precision
from mmit.train.run import run
from tests import fresh
from tests.tiny_run import tiny_config

CPU = torch.device("cpu")


def fake(monkeypatch: pytest.MonkeyPatch, *, fast: bool) -> None:
    """A machine whose bf16 products are twice as fast as fp32 ones, or take five times as long."""
    monkeypatch.setattr(precision, "_flag", lambda name: True)
    monkeypatch.setattr(precision, "half_speed", lambda kind, name: 2.0 if fast else 0.2)


def test_the_speed_of_bf16_is_measured_where_the_flag_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, fast=True)
    assert precision.choose(CPU) == ("bf16", "bf16 products run 2 times as fast as fp32 products here (measured)")
    assert precision.warning(CPU, "bf16") is None
    fake(monkeypatch, fast=False)
    assert precision.choose(CPU) == ("fp32", "bf16 products run 5 times slower than fp32 products here (measured)")
    assert "5 times slower" in (precision.warning(CPU, "bf16") or "")
    assert precision.warning(CPU, "fp32") is None
    monkeypatch.setattr(precision, "_flag", lambda name: False)
    assert precision.choose(CPU) == ("fp32", "this CPU has no bf16 units")


def test_a_measurement_is_a_positive_ratio_and_leaves_the_process_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert precision.half_speed("cpu", "bf16") > 0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("major, name", [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_a_gpu_is_asked_for_its_capability(monkeypatch: pytest.MonkeyPatch, major: int, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    choice = precision.choose(torch.device("cuda"))
    assert choice.name == name and f"capability {major}.0" in choice.reason
    assert precision.fast_half(torch.device("cuda"), "fp16")[0]


def test_a_run_continued_on_another_kind_of_machine_keeps_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"steps": 2, "rows_per_step": 2, "precision": "auto", "schedule": "constant", "warmup": 0}
    for fast, began, other in ((True, "bf16", "fp32"), (False, "fp32", "bf16")):
        folder = tmp_path / began
        fake(monkeypatch, fast=fast)
        assert run(tiny_config(folder, train=train)) == 0
        assert f"train.precision is {began}: bf16 products run" in capsys.readouterr().err
        fake(monkeypatch, fast=not fast)
        again = {"dir": str(folder / "run"), "resume": "auto"}
        assert run(tiny_config(folder, run=again, train={**train, "steps": 3})) == 0
        said = capsys.readouterr().err
        assert f"train.precision stays {began}" in said and f"a new run would take {other} here" in said
        assert load_config(folder / "run" / "config.yaml").train.precision == began


def test_ranks_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Two(World):
        def most(self, mine: str, order: Any) -> str:
            return order[-1]  # the other rank cannot

    fake(monkeypatch, fast=True)
    said: list[str] = []
    config = tiny_config(tmp_path, train={"steps": 1, "precision": "auto"})
    found = resolve_precision(config, None, world=Two(0, 2, CPU, deepspeed=True), say=said.append)
    assert found.train.precision == "fp32" and "another rank" in said[0]


def test_a_forecast_takes_the_format_of_the_devices_it_is_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, fast=False)
    config = tiny_config(tmp_path, train={"steps": 1, "precision": "auto"})
    assert planned(config, cuda=True).train.precision == "bf16"
    assert planned(config, cuda=False).train.precision == "fp32"
    asked = tiny_config(tmp_path, train={"steps": 1, "precision": "fp32"})
    assert planned(asked, cuda=True).train.precision == "fp32"


def test_what_is_trained_and_loaded_without_bf16_units(tmp_path: Path) -> None:
    """oneDNN and ATen are told that the CPU has AVX2 alone, as most laptops and desktops."""
    bounds = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    clean = {k: v for k, v in os.environ.items() if k not in cores.WAITING}
    done = fresh.run_module("tests.precision_case", tmp_path, env=clean | bounds)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["waiting"] == [None] * len(cores.WAITING)  # set by programs alone, see test_cores.py
    assert found["units"] == "AVX2" and found["choice"] == "fp32"
    assert found["auto"]["config"] == found["auto"]["run"] == "fp32"
    assert found["bf16"]["config"] == found["bf16"]["run"] == "bf16"
    assert found["auto"]["features"] != found["bf16"]["features"]
    assert "train.precision is fp32: this CPU has no bf16 units" in done.stderr
    (warned,) = [line for line in done.stderr.splitlines() if "warning: train.precision" in line]
    assert "times slower than fp32 products on this device (measured)" in warned
    assert found["loaded auto"] == {"dtypes": ["torch.float32"], "notes": []}
    assert found["loaded bf16"]["dtypes"] == ["torch.float32"]
    assert found["loaded bf16"]["notes"] == ["trained in bf16, loaded in fp32: this CPU has no bf16 units"]
    assert "torch.bfloat16" in found["loaded asked"]["dtypes"] and not found["loaded asked"]["notes"]
    assert len(found["warned"]) == 1 and "times slower" in found["warned"][0]


def test_a_model_trained_in_bf16_is_loaded_in_bf16_where_that_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, fast=True)
    config = tiny_config(tmp_path, train={"steps": 1, "precision": "auto"})
    assert run(config) == 0
    model = mmit.load(config.run.dir)
    assert model.vlm.llm.dtype == torch.bfloat16 and not model.notes


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.precision"):
        tiny_config(tmp_path, train={"steps": 1, "precision": "bf61"})
