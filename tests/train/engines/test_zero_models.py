"""Language models of many kinds under DeepSpeed: two ranks equal one process, whatever the model makes of its rows."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import ConfigError
from mmit.models.llm import why_not_4bit
from mmit.train.checkpoint import model as checkpoint
from mmit.train.resolve import check_divided, check_zero3
from mmit.train.run import run
from tests.models.small_llms import family
from tests.models.test_families import pair
from tests.test_plugins import PROJECTOR
from tests.tiny_run import two_layers as tiny_config
from tests.train.launch import start_ranks

TRAIN = {"steps": 3, "rows_per_step": 4, "precision": "fp32"}
# name -> (family, whether its records share rows, sections)
CASES = {
    "experts": ("qwen3_moe", True, {"train": {**TRAIN, "router_loss": 0.01}}),
    "state": ("mamba2", True, {}),
    "padded": ("falcon", False, {}),
    "own": ("llama", True, {"model": {"projector": {"kind": "zero_bridges:Doubled", "options": {}}}}),
}


def tiny(folder, place, name, sections, **more):
    """A config whose language model is a small one of a family."""
    sections = {"train": TRAIN, **sections, **more, "run": {"dir": str(folder / place)}}
    config = tiny_config(folder, **{k: v for k, v in sections.items() if k != "model"})
    raw = config.model_dump()
    raw["model"] |= sections.get("model", {})
    if name is not None:
        count = len(AutoTokenizer.from_pretrained(config.model.llm.name))
        raw["model"]["llm"]["random_init"] = family(name) | {"vocab_size": count}
    return type(config).from_dict(raw)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name, told", [("qwen3_moe", "experts"), ("mamba2", "running state"), ("llama", None)])
def test_what_zero3_cannot_divide_is_refused(name, told):
    vlm = pair(name)[1]
    if told is None:
        return check_divided(vlm)
    with pytest.raises(ConfigError, match=told) as error:
        check_divided(vlm)
    assert "zero2" in error.value.remedy


def test_it_is_refused_before_weights_are_read(tmp_path):
    config = tiny_config(tmp_path, engine={"deepspeed": "zero3"})
    raw = config.model_dump()
    raw["model"]["llm"] |= {"name": str(tmp_path / "described"), "random_init": None}
    AutoConfig.for_model(**family("qwen3_moe")).save_pretrained(tmp_path / "described")  # and no weights
    described = type(config).from_dict(raw)
    with pytest.raises(ConfigError, match="experts") as refused:
        check_zero3(described, world=SimpleNamespace(deepspeed=True))
    assert "zero2" in refused.value.remedy
    check_zero3(described, world=SimpleNamespace(deepspeed=False))


def test_weights_in_4_bits_are_refused_before_they_are_read(tmp_path):
    tune = {"llm": {"mode": "qlora", "lr": 1e-3, "options": {}}}
    config = tiny_config(tmp_path, engine={"deepspeed": "zero3"}, tune=tune)
    with pytest.raises(ConfigError, match="4-bit") as refused:
        check_zero3(config, world=SimpleNamespace(deepspeed=True))
    assert refused.value.where == "tune.llm.mode" and "zero2" in refused.value.remedy
    check_zero3(config, world=SimpleNamespace(deepspeed=False))
    two = tiny_config(tmp_path, engine={"deepspeed": "zero2"}, tune=tune)
    check_zero3(two, world=SimpleNamespace(deepspeed=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_packing_is_settled_and_two_ranks_equal_one_process(stage, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    (tmp_path / "zero_bridges.py").write_text(PROJECTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "zero_bridges", raising=False)  # that of another case, whose folder is gone
    configs = []
    cases = {case: told for case, told in CASES.items() if stage == "zero2" or case not in ("experts", "state")}
    for case, (name, _, sections) in cases.items():
        assert run(tiny(tmp_path, f"{case}-one", name, sections)) == 0
        two = tiny(tmp_path, f"{case}-two", name, sections, engine={"deepspeed": stage})
        configs.append(tmp_path / f"{case}.yaml")
        configs[-1].write_text(two.to_yaml())
    env = {"PYTHONPATH": f"{tmp_path}:{checkpoint.__file__.rpartition('/mmit/')[0]}"}
    start_ranks(["-m", "tests.train.run_many", *map(str, configs)], ranks=2, timeout=300, env=env)
    for case, (_, packed, _) in cases.items():
        assert losses(tmp_path / f"{case}-two") == pytest.approx(losses(tmp_path / f"{case}-one"), abs=1e-4), case
        kept = yaml.safe_load((tmp_path / f"{case}-two" / "config.yaml").read_text())
        assert kept["data"]["packing"] is packed, case
        one, two = (
            checkpoint.load_model(tmp_path / f"{case}-{x}", device="cpu", allow_code=True) for x in ("one", "two")
        )
        assert two.vlm.state_dict().keys() == one.vlm.state_dict().keys(), case


@pytest.mark.slow
def test_weights_of_4_bits_train_on_two_ranks(tmp_path):
    pytest.importorskip("deepspeed")
    if (reason := why_not_4bit()) is not None:
        pytest.skip(reason)
    base = tiny_config(tmp_path, run={"dir": str(tmp_path / "base")}, tune={"llm": {"mode": "full", "lr": 1e-4}})
    assert run(type(base).from_dict(base.model_dump() | {"train": {**base.train.model_dump(), **TRAIN}})) == 0
    held = checkpoint.checkpoints(tmp_path / "base")[-1] / "llm"
    AutoTokenizer.from_pretrained(base.model.llm.name).save_pretrained(held)
    tune = {"llm": {"mode": "qlora", "lr": 1e-2, "options": {"r": 4}}}
    for place, engine in (("one", {}), ("two", {"deepspeed": "zero2"})):
        config = tiny_config(tmp_path, run={"dir": str(tmp_path / place)}, tune=tune, train=TRAIN, engine=engine)
        raw = config.model_dump()
        raw["model"]["llm"] |= {"name": str(held), "random_init": None}
        (tmp_path / f"{place}.yaml").write_text(type(config).from_dict(raw).to_yaml())
    for place, ranks in (("one", 1), ("two", 2)):
        start_ranks(["-m", "tests.train.run_many", str(tmp_path / f"{place}.yaml")], ranks=ranks, timeout=300)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)

    # Evaluation loads the weights in 4 bits again, on each rank.
    records = str(tmp_path / "data" / "train.jsonl")
    (tmp_path / "task.yaml").write_text(f"name: t\nrecords: {records}\nmetric: exact\nmax_new_tokens: 6\n")
    asked = ["eval", str(tmp_path / "two"), "--task", str(tmp_path / "task.yaml"), "--device", "cpu", "--no-baselines"]
    for ranks in (1, 2):
        out = ["--batch-size", "1", "--out", str(tmp_path / f"answers-{ranks}")]
        start_ranks(["-m", "mmit", *asked, *out], ranks=ranks, timeout=300)
    alone, shared = (
        sorted((tmp_path / f"answers-{n}" / "answers-tuned.jsonl").read_bytes().splitlines()) for n in (1, 2)
    )
    assert shared == alone and len(alone) > 2


@pytest.mark.slow
def test_adapted_experts_are_saved_resumed_and_merged_under_zero2(tmp_path):
    """PEFT's target_parameters: one adapter for all experts of a layer, on two ranks."""
    pytest.importorskip("deepspeed")
    options = {"r": 2, "alpha": 4, "experts": True}
    sections = {
        "train": {**TRAIN, "steps": 4, "save_every": 2},
        "tune": {"projector": {"mode": "full", "lr": 1e-2}, "llm": {"mode": "lora", "lr": 1e-2, "options": options}},
    }
    assert run(tiny(tmp_path, "one", "qwen3_moe", sections)) == 0
    two = tiny(tmp_path, "two", "qwen3_moe", sections, engine={"deepspeed": "zero2"})
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    (tmp_path / "again.yaml").write_text(
        two.model_copy(update={"run": two.run.model_copy(update={"resume": "auto"})}).to_yaml()
    )
    env = {"PYTHONPATH": checkpoint.__file__.rpartition("/mmit/")[0]}
    start_ranks(["-m", "tests.train.run_many", str(tmp_path / "two.yaml")], ranks=2, timeout=300, env=env)
    whole = losses(tmp_path / "two")
    assert whole == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    before = checkpoint.load_model(tmp_path / "two", device="cpu").vlm.llm.state_dict()
    adapted = [name for name in before if "experts" in name and "lora_B" in name]
    assert adapted and all(before[name].abs().sum() > 0 for name in adapted)
    shutil.rmtree(checkpoint.checkpoints(tmp_path / "two")[-1])
    (tmp_path / "two" / "finished.json").unlink(missing_ok=True)
    start_ranks(["-m", "tests.train.run_many", str(tmp_path / "again.yaml")], ranks=2, timeout=300, env=env)
    assert losses(tmp_path / "two")[-2:] == whole[-2:]
    after = checkpoint.load_model(tmp_path / "two", device="cpu").vlm.llm.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for form in ("llava-hf", "mmit", "peft"):
        done = CliRunner().invoke(app, ["export", str(tmp_path / "two"), "-f", form, "--out", str(tmp_path / form)])
        assert done.exit_code == 0, (form, done.output, done.exception)


def test_a_misspelt_name_is_told_on_one_device_too(tmp_path):
    config = tiny_config(tmp_path, engine={"deepspeed": "zero9"})
    with pytest.raises(ConfigError, match="no DeepSpeed config 'zero9'"):
        check_zero3(config, world=SimpleNamespace(deepspeed=False))
    elsewhere = tiny_config(tmp_path, engine={"deepspeed": str(tmp_path / "mine.json")})
    check_zero3(elsewhere, world=SimpleNamespace(deepspeed=False))
