"""Architectures small enough for a test, known to timm and open_clip by name in every file here."""

import json

import open_clip
import pytest
import timm
from timm.models.vision_transformer import VisionTransformer

SIZE, BLOCKS = 16, 4
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@timm.models.register_model
def tiny_siglip(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
    dims = {"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depth": BLOCKS, "num_heads": 2}
    options = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", **dims, **kwargs}
    facts = {"input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "num_classes": 0, **HALF}
    return timm.models.build_model_with_cfg(VisionTransformer, "tiny_siglip", False, pretrained_cfg=facts, **options)


@pytest.fixture(scope="session", autouse=True)
def tiny_open_clip_models(tmp_path_factory):
    """Three open_clip architectures small enough for a test: CLIP, CLIP with QuickGELU, SigLIP."""
    folder = tmp_path_factory.mktemp("configs")
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    vit = {"image_size": SIZE, "patch_size": 4, "width": 16, "head_width": 8, "layers": BLOCKS}
    siglip = {"image_size": SIZE, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"}
    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    for name, vision, options in (
        ("tiny-clip", vit, {}),
        ("tiny-clip-quickgelu", vit, {"quick_gelu": True}),
        ("tiny-siglip", siglip, {"custom_text": True}),
        ("tiny-resnet", resnet, {}),
    ):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **options}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
