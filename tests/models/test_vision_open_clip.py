"""open_clip's encoders: the same features as transformers', the constants of the weights."""

from __future__ import annotations

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mmit.models.vision import build_vision
from tests.models.test_vision import CLIP, noise, pictures


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def clip_to_hf(weights):
    """Name open_clip's VisionTransformer weights as transformers does."""
    out = {}
    for key, value in weights.items():
        key = key.replace("transformer.resblocks", "encoder.layers").replace("ln_pre", "pre_layrnorm")
        key = key.replace("ln_post", "post_layernorm").replace("ln_", "layer_norm").replace("attn.", "self_attn.")
        key = key.replace("mlp.c_fc", "mlp.fc1").replace("mlp.c_proj", "mlp.fc2")
        key = key.replace("conv1", "embeddings.patch_embedding")
        if key == "class_embedding":
            out[f"embeddings.{key}"] = value
        elif key == "positional_embedding":
            out["embeddings.position_embedding.weight"] = value
        elif "in_proj_" in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("in_proj_", f"{part}_proj.")] = piece
        elif key != "proj":
            out[key] = value
    return out


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("layer", "normalize"), [(1, False), (2, False), (-2, False), (-1, False), (-1, True)])
def test_open_clip_equals_hf_at_the_same_layer(quick, layer, normalize, tmp_path):
    """QuickGELU both ways: the same weights under the other activation give other features."""
    name = "tiny-clip-quickgelu" if quick else "tiny-clip"
    model = noise(open_clip.create_model(name))
    torch.save(model.state_dict(), tmp_path / "both.pt")
    save_file(
        {k: v.contiguous() for k, v in clip_to_hf(model.visual.state_dict()).items()},
        tmp_path / "hf.safetensors",
    )
    options = {"layer": layer, "normalize": normalize}
    ours = build_vision("open_clip", name, weights=str(tmp_path / "both.pt"), **options)

    def hf(act):
        config = {**CLIP, "hidden_act": act}
        return build_vision("hf", config, weights=str(tmp_path / "hf.safetensors"), **options)

    pixels = pictures()
    right, wrong = ("quick_gelu", "gelu") if quick else ("gelu", "quick_gelu")
    torch.testing.assert_close(ours(pixels), hf(right)(pixels), atol=1e-5, rtol=0)
    assert (ours(pixels) - hf(wrong)(pixels)).abs().max() > 1e-3


def test_a_siglip_file_given_by_path_gets_the_constants_of_siglip():
    from mmit.models.vision_open_clip import _agreed_constants

    assert _agreed_constants("ViT-B-16-SigLIP") == {
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
    }  # fmt: skip
