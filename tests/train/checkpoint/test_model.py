"""What a checkpoint says of itself, on folders without a model: where its encoder is, and tensors that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.config import Config, VisionConfig
from mmit.errors import CheckpointError, ConfigError
from mmit.train.checkpoint import model as reading
from mmit.train.checkpoint.model import _holds_untuned_tower, compare, image_preparation, no_untuned, own_code

IN_THE_FOLDER = "the encoder is in the folder, and its weights before training are not"
MODEL = {"vision": {"kind": "hf", "name": "tower"}, "llm": {"name": "llm"}}


def config_of(vision: str = "frozen", **model: Any) -> Config:
    tune = {"llm": {"mode": "lora", "lr": 1e-3}, "vision": {"mode": vision, "lr": None if vision == "frozen" else 1e-3}}
    raw = {"model": MODEL | model, "tune": tune, "data": {"train": [{"path": "a.jsonl"}]}, "run": {"dir": "run"}}
    return Config.from_dict({**raw, "train": {"steps": 1}}, where="a test")


def checkpoint(folder: Path, *, vision: str, files: list[str], **meta: Any) -> Path:
    (folder / "config.yaml").write_text(config_of(vision).to_yaml())
    (folder / "mmit.json").write_text(json.dumps(meta))
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("vision", "files", "why"),
    [
        ("frozen", [], ""),  # named, and loaded from where it came
        ("frozen", ["vision/config.json", "vision.safetensors"], ""),  # an export: as it was
        ("lora", ["vision/config.json", "vision.safetensors"], ""),  # beside its adapter
        ("full", ["vision/config.json", "vision.safetensors"], IN_THE_FOLDER),
        ("layernorm", ["vision/config.json", "vision.safetensors"], IN_THE_FOLDER),
        (
            "full",
            ["vision/config.json", "vision/model.safetensors", "vision.safetensors"],
            "",
        ),  # imported, then trained
    ],
)
def test_weights_before_training_are_found_or_missed(tmp_path: Path, vision: str, files: list[str], why: str) -> None:
    assert no_untuned(checkpoint(tmp_path, vision=vision, files=files)) == why


def test_merged_weights_are_none_of_those_before_training(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, vision="frozen", files=["vision/config.json", "vision.safetensors"], merged=True)
    assert no_untuned(folder).startswith("merged: ")
    assert not _holds_untuned_tower(config_of(), folder)  # an adapter of the encoder may have been folded in


def test_a_model_whose_folder_is_removed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "find", lambda folder: Path(folder))  # and then it is gone
    with pytest.raises(CheckpointError, match="was removed while it was read"):
        reading.load_model(tmp_path / "step-000001", device="cpu")


def test_all_tensors_that_do_not_fit_are_in_one_error() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    with pytest.raises(CheckpointError) as error:
        compare(expected, {"a": torch.zeros(2), "b": torch.zeros(5), "d": torch.zeros(1)}, Path("x.safetensors"))
    assert error.value.problem == "does not fit the model: missing c; left over d; b is (5,), the model has (3,)"
    compare(expected, {name: tensor + 1 for name, tensor in expected.items()}, Path("x.safetensors"))


def test_code_of_the_users_own_is_asked_for_part_by_part() -> None:
    config = config_of(projector={"kind": "mine:Projector"})
    named = own_code(config, {"chat": {"name": "mine:talk"}})
    assert named["model.projector.kind"] == "mine:Projector" and named["model.chat.format"] == "mine:talk"
    # A template is data, rendered in a sandbox: what its format is called imports nothing.
    assert own_code(config, {"chat": {"name": "mine:talk", "template": ""}})["model.chat.format"] is None


@pytest.mark.parametrize(("native", "fit", "takes"), [(None, "native", "one size"), ({"merge": 2}, "pad", "any size")])
def test_a_fit_that_the_encoder_does_not_take_is_refused(native: Any, fit: Any, takes: str) -> None:
    tower: Any = SimpleNamespace(native=native)
    with pytest.raises(ConfigError, match=f"fit is {fit}, and this vision encoder takes pictures of {takes}"):
        image_preparation(tower, VisionConfig(kind="hf", name="tower", fit=fit))
    assert image_preparation(None, None) == {}
