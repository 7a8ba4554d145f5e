"""Vision towers as vision models of transformers: the same features from what was written, or a named reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmit.errors import ModelError
from mmit.models.interop.hf_parts import write_tower
from mmit.models.interop.hf_towers import held_towers, hf_tower, read_blocks
from mmit.models.vision import VisionTower, build_vision
from tests.models.test_vision import SIGLIP, noise, pictures


def dinov2(registers: int) -> Any:
    """An architecture of timm's: DINOv2's, with so many register tokens."""

    def make(
        pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **more: Any
    ) -> Any:
        dims: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        options = {"init_values": 0.1, "reg_tokens": registers, "no_embed_class": bool(registers), **dims, **more}
        facts = {"input_size": (3, 16, 16), "interpolation": "bicubic", "num_classes": 0}
        return timm.models.build_model_with_cfg(
            VisionTransformer, make.__name__, False, pretrained_cfg=facts, **options
        )

    make.__name__, make.__module__ = f"tiny_dinov2_{registers}", __name__
    return timm.models.register_model(make)


dinov2(0), dinov2(2)


def same_from_the_folder(tower: VisionTower, converted: Any, folder: Path) -> None:
    """What was written is read as a tower of kind hf, and gives the features of the tower it was made from."""
    image = {"size": tower.image_size, "interpolation": "bicubic", "mean": tower.mean, "std": tower.std}
    write_tower(folder, *converted, image=image)
    again = build_vision("hf", str(folder), layer=-1, normalize=False)
    pixels = pictures(size=tower.image_size[0])
    assert (again.mean, again.std) == (tower.mean, tower.std)
    torch.testing.assert_close(again(pixels), tower(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("open_clip", "tiny-clip-quickgelu", {"layer": 2}),
        ("timm", "tiny_siglip", {"layer": 3}),
        ("hf", SIGLIP, {"layer": 2, "image_size": 24}),  # its positions are interpolated once, and written so
    ],
)
def test_features_are_those_of_the_tower(tmp_path: Path, kind: str, name: Any, changes: dict[str, Any]) -> None:
    tower = build_vision(kind, name, normalize=False, **changes)
    noise(tower.encoder)
    config, tensors = hf_tower(tower)
    assert config.num_hidden_layers == max(read_blocks(tower)) == changes["layer"]  # the blocks that run, no other
    same_from_the_folder(tower, (config, tensors), tmp_path / "out")


def test_what_sets_a_tower_apart_is_named() -> None:
    tower = build_vision("timm", "tiny_siglip", normalize=False)
    block = tower.encoder.model.blocks[0]

    def refused(reason: str) -> None:
        with pytest.raises(ModelError, match=reason) as caught:
            hf_tower(tower)
        assert caught.value.where == "vision tower timm tiny_siglip" and "--format mmit" in caught.value.remedy

    hf_tower(tower)
    block.ls1, block.attn.q_norm = nn.LayerNorm(16), nn.LayerNorm(8)
    refused("it has layer scale, norms on queries and keys, unlike SigLIP")
    block.ls1 = block.attn.q_norm = nn.Identity()
    block.mlp.act = nn.ReLU()
    refused("its activation is ReLU")
    tower.image_size = (16, 24)
    refused("pictures of 16 x 24, and LLaVA's are square")
    tower.normalize = True
    refused("read after the final norm")
    tower.normalize, tower.image_size, tower.encoder = False, (16, 16), nn.Identity()
    refused("its network is of the class Identity")


# Beside registers, timm's class token has no position of its own here.
@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_is_held_with_its_registers(tmp_path: Path, registers: int) -> None:
    tower = build_vision("timm", f"tiny_dinov2_{registers}", normalize=False)
    noise(tower.encoder)
    (converted,) = held_towers(tower)
    assert converted[0].model_type == ("dinov2_with_registers" if registers else "dinov2")
    same_from_the_folder(tower, converted, tmp_path / "out")
