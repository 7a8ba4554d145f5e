"""TinyLLaVA's layout, made here under its documented key names, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import ModelError
from mmit.interop.foreign import is_foreign, read_foreign
from mmit.models.projectors import build_projector
from mmit.models.vlm import VLM
from mmit.train.checkpoint.model import load_model
from tests.interop.test_llava import compare, parts
from tests.tiny_run import write_records


def make(folder: Path, *, tower: str = "clip", **changes: Any) -> tuple[Any, Any, Path]:
    vlm, tokenizer, projector = parts(folder, tower=tower)
    if changes.get("connector_type") == "linear":
        eye, width = vlm.vision, vlm.llm.get_input_embeddings().weight.shape[1]
        assert eye is not None
        layer: Any = build_projector("linear", vision_dim=eye.dim, llm_dim=width, grid=eye.grid, prefix=eye.prefix)
        vlm = VLM(vlm.llm, vision=eye, projector=layer)
        projector = {k.replace("layers.0.", "mm_projector."): v for k, v in layer.state_dict().items()}
    out = folder / "tiny"
    out.mkdir()
    told = {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "connector_type": "mlp2x_gelu",
        "vision_model_name_or_path": str(folder / "tower"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "pad",
        "text_config": json.loads((folder / "base" / "config.json").read_text()),
        **changes,
    }
    (out / "config.json").write_text(json.dumps(told))
    tokenizer.save_pretrained(out)
    weights = load_file(folder / "tower" / "model.safetensors")
    state = {f"language_model.{k}": v for k, v in vlm.llm.state_dict().items()}
    state |= {f"vision_tower._vision_tower.{k}": v for k, v in weights.items()}
    state |= {k.replace("mm_projector.", "connector._connector."): v for k, v in projector.items()}
    torch.save(state, out / "pytorch_model.bin")
    return vlm, tokenizer, out


def test_a_whole_folder(tmp_path: Path) -> None:
    vlm, tokenizer, out = make(tmp_path)
    assert is_foreign(out)
    compare(read_foreign(out, chat="vicuna_v1"), vlm, tokenizer)
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "connector._connector.4.weight": torch.zeros(1)}, out / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"left over: layers\.4\.weight"):
        read_foreign(out, chat="vicuna_v1")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"connector_type": "resampler"}, "connector_type is 'resampler'"),
        ({"vision_model_name_or_path2": "dino"}, "one vision tower"),
        ({"text_config": {"model_type": "openelm"}}, "model_type 'openelm'"),
    ],
)
def test_what_mmit_does_not_compute_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    _, _, out = make(tmp_path, **changes)
    with pytest.raises(ModelError, match=problem):
        read_foreign(out, chat="vicuna_v1")


def test_a_linear_connector(tmp_path: Path) -> None:
    vlm, tokenizer, out = make(tmp_path, connector_type="linear")
    compare(read_foreign(out, chat="vicuna_v1"), vlm, tokenizer)
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    del state["connector._connector.bias"]
    torch.save(state, out / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"1 missing: layers\.0\.bias"):
        read_foreign(out, chat="vicuna_v1")


def test_siglip_is_read_where_all_its_tokens_are_kept(tmp_path: Path) -> None:
    vlm, tokenizer, out = make(tmp_path, tower="siglip", vision_feature_select_strategy="cls_patch")
    compare(read_foreign(out, chat="vicuna_v1"), vlm, tokenizer)


def test_siglip_loses_a_patch_under_patch_and_is_refused(tmp_path: Path) -> None:
    _, _, out = make(tmp_path, tower="siglip")
    with pytest.raises(ModelError, match="siglip_vision_model.*first token is a patch.*'patch' drops the first token"):
        read_foreign(out, chat="vicuna_v1")


@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu"])
def test_training_starts_from_it(tmp_path: Path, connector: str) -> None:
    vlm, tokenizer, out = make(tmp_path, connector_type=connector)
    data = write_records(tmp_path / "data", count=3, text_only=1)
    told = [f"data.train.0.path={data}", f"run.dir={tmp_path / 'run'}", "train.epochs=null", "train.steps=2"]
    rates = ["tune.llm.mode=lora", "tune.llm.lr=1e-3", "tune.projector.lr=1e-3", "data.workers=0"]
    result = CliRunner().invoke(app, ["train", "--from", str(out), "--chat", "vicuna_v1", *told, *rates])
    assert result.exit_code == 0, result.output
    compare(load_model(tmp_path / "run" / "start", device="cpu"), vlm, tokenizer)
    tuned = load_model(tmp_path / "run", device="cpu").vlm.projector
    assert tuned is not None and vlm.projector is not None
    assert not torch.equal(next(tuned.parameters()), next(vlm.projector.parameters()))


def test_options_of_a_start_want_a_start(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml"), "--base", "some/llm"])
    assert result.exit_code == 2 and "--from" in result.output
