"""Single parts as files of other projects: LLaVA's projector under any prefix, constants of pictures, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig

from mmit.errors import ModelError
from mmit.models.interop.hf_parts import read_llava_projector, write_adapter, write_llava, write_tower_config
from mmit.models.projectors import build_projector

SHAPE: dict[str, Any] = {"vision_dim": 6, "llm_dim": 4, "grid": (2, 2)}


def saved(path: Path, prefix: str, **tensors: torch.Tensor) -> Path:
    torch.save({f"{prefix}mm_projector.{key}": value for key, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_projector_is_read_under_any_prefix(tmp_path: Path, kind: str, prefix: str) -> None:
    projector = build_projector(kind, **SHAPE)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    names = ("weight", "bias") if kind == "linear" else ("0.weight", "0.bias")  # a single layer has no number
    given = dict(zip(names, (weight, bias), strict=True))
    if kind == "mlp":
        given |= {"2.weight": torch.randn(4, 4), "2.bias": torch.randn(4)}
    read_llava_projector(saved(tmp_path / "p.bin", prefix, **given), projector)
    features = torch.randn(1, 4, 6)
    expected = features @ weight.T + bias
    if kind == "mlp":
        expected = torch.nn.functional.gelu(expected) @ given["2.weight"].T + given["2.bias"]
    torch.testing.assert_close(projector(features), expected)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    projector = build_projector("linear", **SHAPE)
    before = projector.state_dict()["layers.0.weight"].clone()
    with pytest.raises(ModelError, match=r"(?s)does not fit.*missing.*bias.*weight") as caught:
        read_llava_projector(saved(tmp_path / "a.bin", "", weight=torch.zeros(4, 5)), projector)
    assert "mm_projector_type" in caught.value.remedy
    torch.save({"mm_projector.weight": torch.zeros(4, 6), "lm_head.weight": torch.zeros(1)}, tmp_path / "b.bin")
    with pytest.raises(ModelError, match="more than a projector.*lm_head.weight"):
        read_llava_projector(tmp_path / "b.bin", projector)
    assert torch.equal(before, projector.state_dict()["layers.0.weight"])


def test_the_end_of_a_line_is_llavas_image_newline(tmp_path: Path) -> None:
    projector, end = build_projector("linear", line_end=True, **SHAPE), torch.randn(4)
    tensors = {"mm_projector.weight": torch.zeros(4, 6), "mm_projector.bias": torch.zeros(4)}
    torch.save({**tensors, "model.image_newline": end}, tmp_path / "p.bin")
    read_llava_projector(tmp_path / "p.bin", projector)
    assert torch.equal(projector.state_dict()["line_end"], end)


def test_what_llavas_code_cannot_read_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    def vlm(kind: str = "llama", tower: str = "hf", projector: Any = None) -> Any:
        llm = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        eye = SimpleNamespace(kind=tower, name="eye")
        return SimpleNamespace(llm=llm, vision=eye, projector=projector or build_projector("linear", **SHAPE))

    for made, fit, told in (
        (vlm("qwen2"), "pad", "no class for a 'qwen2' model"),
        (vlm(tower="timm"), "pad", "CLIP towers .* not timm eye with fit: pad"),
        (vlm(), "resize", "with fit: resize"),
        (
            vlm(projector=build_projector("resampler", queries=2, heads=2, **SHAPE)),
            "pad",
            "no projector like Resampler",
        ),
        (vlm(projector=build_projector("mlp", norm=True, **SHAPE)), "pad", "no projector like MLP with a norm"),
    ):
        with pytest.raises(ModelError, match=told):
            write_llava(tmp_path, made, tokenizer=None, tower_name="eye", base="llm", fit=fit, max_length=8)
    with pytest.raises(ModelError, match="has no adapter"):
        write_adapter(tmp_path, vlm(), base="llm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (None, {"size": {"height": 8, "width": 12}}),
        ({"patch": 4, "max_pixels": 640}, {"max_patches": 40, "max_pixels": 640, "size": {}}),
        ({"patch": 4, "max_pixels": 640, "max_side": 32}, {"max_patches": 40, "size": {"max_height": 32}}),
        ({"patch": 4, "min_pixels": 64, "max_edge": 32}, {"min_pixels": 64, "size": {"longest_edge": 32}}),
    ],
)
def test_limits_of_pictures_are_written_under_the_names_they_are_read_by(tmp_path: Path, rule: Any, kept: Any) -> None:
    CLIPVisionConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "eye")
    told = {"image_size": (8, 12), "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    tower: Any = SimpleNamespace(**told, native=rule)
    write_tower_config(tmp_path / "out", str(tmp_path / "eye"), tower)
    stated = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert kept.items() <= stated.items()
    assert (stated["image_mean"], stated["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) and stated["resample"] == 2
