"""The Perceiver resampler: against its formula, blind to nothing of the grid, and as many tokens for any image."""

from __future__ import annotations

import pytest
import torch

from mmit.errors import ModelError
from mmit.models.resampler import Resampler, ResamplerBlock


def resampler(**more: object) -> Resampler:
    torch.manual_seed(0)
    options = {"vision_dim": 8, "llm_dim": 6, "grid": (2, 3), "prefix": 1, "queries": 4, "depth": 2, "heads": 2}
    return Resampler(**(options | more)).eval()  # type: ignore[arg-type]


def test_a_block_is_attention_to_features_and_latents_then_feed_forward() -> None:
    torch.manual_seed(0)
    block = ResamplerBlock(8, heads=2)
    latents, features = torch.randn(3, 4, 8), torch.randn(3, 7, 8)
    attention = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([block.q.weight, block.kv.weight]))
        attention.out_proj.weight.copy_(block.proj.weight)
    normed = block.norm_latents(latents)
    seen = torch.cat([block.norm_features(features), normed], dim=1)
    expected = latents + attention(normed, seen, seen, need_weights=False)[0]
    torch.testing.assert_close(block(latents, features), expected + block.feed_forward(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_image_becomes_as_many_tokens_and_none_sees_another(batch: int) -> None:
    projector, features = resampler(), torch.randn(batch, 7, 8)
    out = projector(features)
    assert out.shape == (batch, 4, 6) and projector.tokens == 4
    torch.testing.assert_close(out[-1:], projector(features[-1:]), atol=1e-6, rtol=1e-5)


def test_the_place_of_a_feature_counts() -> None:
    projector, features = resampler(), torch.randn(1, 7, 8)
    turned = features.flip(1)
    assert not torch.allclose(projector(features), projector(turned), atol=1e-3)
    with torch.no_grad():
        projector.places.zero_()  # attention alone cannot tell
    torch.testing.assert_close(projector(features), projector(turned), atol=1e-6, rtol=1e-5)


def test_every_weight_gets_a_gradient() -> None:
    projector = resampler().train()
    projector(torch.randn(2, 7, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do() -> None:
    with pytest.raises(ModelError, match="3 heads do not divide the vision width 8") as caught:
        resampler(heads=3)
    assert "[1, 2, 4, 8]" in (caught.value.remedy or "")
    with pytest.raises(ModelError, match="queries is 0"):
        resampler(queries=0)
