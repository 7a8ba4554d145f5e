"""transformers' encoders: hidden states by their number, constants of the checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from mmit.errors import ModelError
from mmit.models.vision import build_vision
from tests.models.test_vision import CLIP, DIMS, SIGLIP, noise, pictures


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def normalised(tower, pixels):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    return (pixels.float() / 255 - mean) / std


@pytest.fixture(scope="module", params=["clip", "siglip"])
def both_towers(request, tmp_path_factory):
    """A family, its two-tower model and the folder it is in, as published checkpoints are."""
    text = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, **DIMS}
    vision = CLIP if request.param == "clip" else SIGLIP
    config_class, model_class = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }[request.param]
    torch.manual_seed(0)
    model = noise(model_class(config_class(vision_config=vision, text_config=text))).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.mark.parametrize("layer", [1, 3, -4, -2, -1])
def test_hf_tower_is_the_hidden_state_of_that_number(both_towers, layer):
    family, model, folder = both_towers
    tower = build_vision("hf", str(folder), layer=layer)
    pixels = pictures()
    states = model.vision_model(normalised(tower, pixels), output_hidden_states=True).hidden_states
    expected = states[layer][:, 1:] if family == "clip" else states[layer]
    torch.testing.assert_close(tower(pixels), expected.detach(), atol=1e-5, rtol=0)
    assert tower.grid == (4, 4) and tower.tokens == 16 and tower.dim == 16


def test_constants_come_from_the_encoder(tmp_path):
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path)
    assert build_vision("hf", str(tmp_path)).mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    facts = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "size": {"height": 9},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    tower = build_vision("hf", str(tmp_path))
    assert (tower.mean, tower.std, tower.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**facts, "rescale_factor": 1 / 127.5}))
    with pytest.raises(ModelError, match="not scaled by 1/255"):
        build_vision("hf", str(tmp_path))
    assert build_vision("hf", SIGLIP).mean == HALF["mean"]
    assert build_vision("timm", "tiny_siglip").std == HALF["std"]
    assert build_vision("open_clip", "tiny-clip").std == pytest.approx((0.269, 0.261, 0.276), abs=1e-3)
