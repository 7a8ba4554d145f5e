"""timm's encoders: stages as tokens, and measuring one without running it."""

from __future__ import annotations

import pytest
import timm
import torch

from mmit.models.vision import build_vision
from tests.models.test_vision import pictures
from tests.models.test_vision_hf import normalised


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("on_meta", [True, False])
def test_measuring_a_timm_encoder_puts_no_stand_in_for_cuda_in_place(on_meta, monkeypatch):
    def refuse(*args):
        raise NotImplementedError

    asked = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: asked.append(1))
    if not on_meta:
        monkeypatch.setattr(torch.func, "functional_call", refuse)
    assert build_vision("timm", "test_efficientnet").tokens
    assert not asked


def test_a_stage_is_flattened_row_by_row():
    for layer in (0, 2, -1):
        torch.manual_seed(1)
        tower = build_vision("timm", "test_efficientnet", layer=layer, image_size=64)
        torch.manual_seed(1)
        model = timm.create_model("test_efficientnet").eval()
        pixels = pictures(size=64)
        maps = model.forward_intermediates(normalised(tower, pixels), intermediates_only=True)[layer]
        assert maps.shape[1:] == (tower.dim, *tower.grid)
        torch.testing.assert_close(tower(pixels), maps.permute(0, 2, 3, 1).reshape(2, -1, tower.dim))
