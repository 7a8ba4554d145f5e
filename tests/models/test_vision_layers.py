"""Several layers joined along features, and DINO through transformers and timm, against the libraries themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers

from mmit.errors import ModelError
from mmit.models.vision import VisionTower, build_vision
from tests.models.test_vision import CLIP, SIGLIP, noise, pictures
from tests.models.test_vision_hf import normalised

DINO: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
# model_type -> config, class, tokens in front of the patches.
DINOS: dict[str, tuple[Any, Any, int]] = {
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, 1),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel, 5),
    "dinov3_vit": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, 3),
}


def dino(kind: str, folder: Path) -> Any:
    config_class, model_class, front = DINOS[kind]
    extra = {"num_register_tokens": front - 1} if front > 1 else {}
    torch.manual_seed(0)
    model = noise(model_class(config_class(**DINO, **extra))).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", list(DINOS))
@pytest.mark.parametrize("layer", [1, -2, -1])
def test_dino_is_the_hidden_state_of_that_number(kind: str, layer: int, tmp_path: Path) -> None:
    model, front = dino(kind, tmp_path), DINOS[kind][2]
    tower = build_vision("hf", str(tmp_path), layer=layer)
    pixels = pictures()
    # With the final norm out of the way: what a version calls the last hidden state is normed or not.
    name = "norm" if kind == "dinov3_vit" else "layernorm"
    own, bare = getattr(model, name), torch.nn.Identity()
    setattr(model, name, bare)
    states = model(normalised(tower, pixels), output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), states[layer][:, front:].detach(), atol=1e-5, rtol=0)
    assert tower.grid == (4, 4) and tower.tokens == 16 and tower.mean == (0.485, 0.456, 0.406)
    with_cls = build_vision("hf", str(tmp_path), layer=layer, select="cls_patch")
    both = with_cls(pixels)
    torch.testing.assert_close(both[:, 1:], tower(pixels), atol=1e-6, rtol=0)
    torch.testing.assert_close(both[:, 0], states[layer][:, 0].detach(), atol=1e-5, rtol=0)
    setattr(model, name, own)
    normed = build_vision("hf", str(tmp_path), layer=-1, normalize=True)
    expected = model(normalised(tower, pixels)).last_hidden_state[:, front:]
    torch.testing.assert_close(normed(pixels), expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(DINOS))
def test_dino_takes_another_image_size(kind: str, tmp_path: Path) -> None:
    model, front = dino(kind, tmp_path), DINOS[kind][2]
    tower = build_vision("hf", str(tmp_path), layer=-2, image_size=24)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    states = model(normalised(tower, pixels), output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), states[-2][:, front:].detach(), atol=1e-5, rtol=0)
    assert tower.grid == (6, 6)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_dino_through_timm_reads_patches_alone(name: str) -> None:
    assert name in timm.list_models()
    tower = build_vision("timm", name, layer=-2, image_size=56 if "14" in name else 64)
    pixels = torch.randint(0, 256, (2, 3, *tower.image_size), dtype=torch.uint8)
    model = tower.encoder.model
    expected = model.forward_intermediates(
        normalised(tower, pixels),
        indices=[len(model.blocks) - 1],
        norm=False,
        intermediates_only=True,
        output_fmt="NLC",
    )[0]
    torch.testing.assert_close(tower(pixels), expected.detach(), atol=1e-5, rtol=0)
    assert tower.tokens == 16 and not tower(pixels).requires_grad


def towers(kind: str, folder: Path, **options: Any) -> VisionTower:
    """The same weights at whatever layer."""
    if kind in ("clip", "siglip"):
        config_class, model_class, vision = {
            "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, CLIP),
            "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, SIGLIP),
        }[kind]
        if not folder.exists():
            torch.manual_seed(0)
            config = config_class(**{k: v for k, v in vision.items() if k != "model_type"})
            noise(model_class(config)).save_pretrained(folder)
        return build_vision("hf", str(folder), **options)
    if kind in DINOS:
        if not folder.exists():
            dino(kind, folder)
        return build_vision("hf", str(folder), **options)
    torch.manual_seed(0)
    library, name = kind.split(":")
    return build_vision(library, name, weights=False, **options)


ALL = ["clip", "siglip", "dinov2_with_registers", "dinov3_vit", "timm:test_vit", "open_clip:tiny-clip"]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
def test_several_layers_are_the_layers_side_by_side(kind: str, select: str, tmp_path: Path) -> None:
    if kind == "siglip" and select == "cls_patch":
        pytest.skip("SigLIP has no class token")
    options: dict[str, Any] = {"select": select}
    both = towers(kind, tmp_path / "m", layer=[-1, 1, -2], **options)
    pixels = torch.randint(0, 256, (2, 3, *both.image_size), dtype=torch.uint8)
    alone = [towers(kind, tmp_path / "m", layer=layer, **options) for layer in (-1, 1, -2)]
    for tower in alone:  # random weights of a cut model: the same where both have them
        tower.load_state_dict(both.state_dict(), strict=False)
    torch.testing.assert_close(both(pixels), torch.cat([t(pixels) for t in alone], dim=-1), atol=1e-5, rtol=0)
    assert both.dim == 3 * alone[0].dim and both.tokens == alone[0].tokens and both.layer == (-1, 1, -2)


def test_layers_change_the_fingerprint(tmp_path: Path) -> None:
    prints = {towers("clip", tmp_path / "m", layer=layer).fingerprint() for layer in (-1, [-1, -2], [-2, -1], [-1])}
    assert len(prints) == 3  # a list of one is that one


@pytest.mark.parametrize(
    ("kind", "name", "layer", "told"),
    [
        ("timm", "test_efficientnet", [0, 1], "several layers"),
        ("open_clip", "tiny-resnet", [0, 1], "several layers"),
        ("timm", "test_vit", [1, 9], "layer 9 does not exist"),
        ("timm", "test_vit", [1, 1], "layer is"),
    ],
)
def test_layers_that_cannot_be_joined_are_refused(kind: str, name: str, layer: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build_vision(kind, name, layer=layer)
