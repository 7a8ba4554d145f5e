"""TinyLLaVA's layout, made here under its documented key names, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from mmit.errors import ModelError
from mmit.interop.foreign import is_foreign, read_foreign
from tests.interop.test_read_llava import compare, parts


def make(folder: Path, **changes: Any) -> tuple[Any, Any, Path]:
    vlm, tokenizer, projector = parts(folder)
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
    tower = load_file(folder / "tower" / "model.safetensors")
    state = {f"language_model.{k}": v for k, v in vlm.llm.state_dict().items()}
    state |= {f"vision_tower._vision_tower.{k}": v for k, v in tower.items()}
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


def test_a_siglip_tower_loses_a_patch_there_and_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8))
    tower.save_pretrained(tmp_path / "siglip")
    _, _, out = make(tmp_path, vision_model_name_or_path=str(tmp_path / "siglip"))
    with pytest.raises(ModelError, match="siglip_vision_model.*first token is a patch"):
        read_foreign(out, chat="vicuna_v1")
