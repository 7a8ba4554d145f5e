"""What every projector rests on: the check of shapes, the order of channels, and numbers that cannot work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmit.errors import ModelError
from mmit.models.projector_base import (
    Projector,
    check_counts,
    common_divisors,
    divides,
    divisors,
    mlp,
    space_to_depth,
)


class Same(Projector):
    def project(self, features: torch.Tensor) -> torch.Tensor:
        return features


def same(**more: object) -> Same:
    options = {"vision_dim": 4, "llm_dim": 4, "grid": (2, 3), "prefix": 1, "tokens": 7, "norm": False}
    return Same(**(options | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 8, 4), (2, 7, 3), (7, 4), (1, 2, 7, 4)])
def test_features_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        same()(torch.zeros(shape))
    assert str(shape) in caught.value.problem and "(B, 7, 4) for a grid of 2 x 3" in caught.value.problem


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_number_of_images_is_taken(batch: int) -> None:
    assert same()(torch.zeros(batch, 7, 4)).shape == (batch, 7, 4)


def test_the_norm_comes_first_and_only_where_it_is_asked_for() -> None:
    features = torch.randn(2, 7, 4) * 5 + 3
    assert torch.equal(same()(features), features)
    assert torch.allclose(same(norm=True)(features), nn.functional.layer_norm(features, (4,)), atol=1e-6)
    assert not dict(same().named_parameters())


def test_the_end_of_a_line_is_a_parameter_with_room_for_every_level() -> None:
    projector = same()
    assert projector.line_end is None and "line_end" not in projector.state_dict()
    projector.deep = 2
    projector.add_line_end()
    assert projector.state_dict()["line_end"].shape == (3 * 4,)


def test_an_mlp_has_its_depth_and_llava_s_layout() -> None:
    torch.manual_seed(0)
    layers = mlp(3, 5, depth=2)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.GELU, nn.Linear]  # LLaVA's mlp2x_gelu: keys 0 and 2
    x = torch.randn(2, 3)
    first, second = layers[0], layers[2]
    expected = nn.functional.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert torch.allclose(layers(x), expected, atol=1e-6)
    assert len(mlp(3, 5, depth=1)) == 1 and len(mlp(3, 5, depth=4)) == 7


@pytest.mark.parametrize(("grid", "factor"), [((4, 4), 2), ((2, 6), 2), ((6, 3), 3), ((3, 3), 1)])
def test_space_to_depth_keeps_every_patch_in_its_block(grid: tuple[int, int], factor: int) -> None:
    height, width = grid
    features = torch.arange(height * width * 2).view(1, height * width, 2)
    out = space_to_depth(features, grid, factor)
    assert out.shape == (1, height * width // factor**2, 2 * factor**2)
    block = 0
    for top in range(0, height, factor):
        for left in range(0, width, factor):
            rows = [features[0, (top + i) * width + left + j] for i in range(factor) for j in range(factor)]
            assert torch.equal(out[0, block], torch.cat(rows))
            block += 1


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_a_count_is_a_whole_number_from_one_up(value: object) -> None:
    with pytest.raises(ModelError, match="depth is "):
        check_counts(depth=value)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="llm_dim is "):
        same(llm_dim=value)


def test_a_grid_that_is_not_divided_is_refused() -> None:
    divides(2, 3, grid=(4, 6), what="2 x 3", remedy="r")
    for rows, columns in ((3, 3), (2, 4)):
        with pytest.raises(ModelError, match="does not divide the grid of 4 x 6"):
            divides(rows, columns, grid=(4, 6), what="it", remedy="r")
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert common_divisors((12, 18)) == [1, 2, 3, 6]
