"""A run that starts from another's weights: what does not fit is named, what differs is told."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from mmit.errors import CheckpointError, ConfigError
from mmit.train.run import run
from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    assert run(tiny_config(folder, train={"steps": 1, "rows_per_step": 2, "precision": "fp32"})) == 0
    return folder


def later(earlier, tmp_path, **sections):
    for part in ("data", "tokenizer", "vision"):
        if not (tmp_path / part).exists():
            os.symlink(earlier / part, tmp_path / part)
    place = {"dir": str(tmp_path / "run"), "init_from": str(earlier / "run")}
    return tiny_config(tmp_path, run=place, train={"steps": 1, "rows_per_step": 2, "precision": "fp32"}, **sections)


def model(earlier, **parts):
    return {**tiny_config(earlier).model.model_dump(), **parts}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"projector": {"kind": "linear", "options": {}}}}, "projector is mlp, this config's is linear"),
        ({"model": {"vision": None}}, "vision is .*, this config's is none"),
        ({"tune": {"llm": {"mode": "full", "lr": 1e-3}}}, "adapter around the LLM .*mode 'full' cannot go on"),
        ({"tune": {"llm": {"mode": "ia3", "lr": 1e-3}}}, "mode 'ia3' cannot go on"),
    ],
)
def test_a_part_that_cannot_be_meant_is_named_before_loading(earlier, tmp_path, change, told):
    if "model" in change:
        change = {"model": model(earlier, **change["model"])}
    with pytest.raises(ConfigError, match=told) as error:
        run(later(earlier, tmp_path, **change))
    assert "run.init_from" in error.value.where and error.value.remedy


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run with LoRA in the encoder, and none in the LLM."""
    folder = tmp_path_factory.mktemp("adapted")
    tune = {"vision": {"mode": "lora", "lr": 1e-2}, "llm": {"mode": "frozen"}}
    assert run(tiny_config(folder, tune=tune, train={"steps": 1, "rows_per_step": 2, "precision": "fp32"})) == 0
    return folder


@pytest.mark.parametrize("mode", ["full", "bitfit"])
def test_an_adapter_in_the_encoder_is_not_taken_for_the_encoder(adapted, tmp_path, mode):
    """The adapter froze what was to be trained: the run ended with the encoder it had begun with."""
    tune = {"vision": {"mode": mode, "lr": 1e-2}, "llm": {"mode": "frozen"}}
    with pytest.raises(
        ConfigError, match=rf"adapter around the encoder \(tune.vision.mode=lora\).*mode '{mode}'"
    ) as error:
        run(later(adapted, tmp_path, tune=tune))
    assert "set tune.vision.mode=lora, or merge the adapter into the encoder first" in error.value.remedy


@pytest.mark.parametrize("mode", ["lora", "frozen"])
def test_an_adapter_in_the_encoder_goes_on_or_stays(adapted, tmp_path, mode):
    vision = {"mode": "lora", "lr": 1e-2} if mode == "lora" else {"mode": "frozen"}
    assert run(later(adapted, tmp_path, tune={"vision": vision, "llm": {"mode": "frozen"}})) == 0
    name = "checkpoints/step-000001/vision_adapter/adapter_model.safetensors"
    before, after = (load_file(folder / "run" / name) for folder in (adapted, tmp_path))
    assert any(not torch.equal(before[key], after[key]) for key in before) == (mode == "lora")


def test_another_size_is_told_and_then_refused_with_the_tensor(earlier, tmp_path, capsys):
    changed = model(earlier, projector={"kind": "mlp", "options": {"depth": 3}})
    with pytest.raises(CheckpointError, match="projector.safetensors: does not fit the model"):
        run(later(earlier, tmp_path, model=changed))
    assert "model.projector.options was {'depth': 2} there and is {'depth': 3} here" in " ".join(
        capsys.readouterr().err.split()
    )


def test_an_adapter_of_another_size_is_told_too(earlier, tmp_path, capsys):
    tune = {"llm": {"mode": "lora", "lr": 1e-2, "options": {"r": 2}}}
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: does not fit the model"):
        run(later(earlier, tmp_path, tune=tune))
    said = " ".join(capsys.readouterr().err.split())
    assert "run.init_from: tune.llm.options was {'r': 4" in said and "there and is {'r': 2" in said


def test_what_fits_starts(earlier, tmp_path):
    assert run(later(earlier, tmp_path)) == 0
