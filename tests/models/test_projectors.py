import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.errors import ModelError
from mmit.models.projectors import PROJECTORS, build_projector, space_to_depth
from tests.examples import examples

DIMS = {"vision_dim": 6, "llm_dim": 8}
KINDS = {
    "linear": {},
    "mlp": {"depth": 3},
    "fused_mlp": {"widen": 2},
    "pixel_shuffle_mlp": {"factor": 2},
    "avg_pool_mlp": {"side": 2},
    "resampler": {"queries": 5, "depth": 2, "heads": 2},
    "deepstack_mlp": {"levels": 3},
}


def test_every_kind_is_tested_here():
    assert set(KINDS) == set(PROJECTORS)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(15), deadline=None)
@given(blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)), batch=st.integers(0, 3))
def test_tokens_stated_are_tokens_produced(kind, norm, blocks, batch):
    grid = (2 * blocks[0], 2 * blocks[1])
    projector = build_projector(kind, grid=grid, norm=norm, **DIMS, **KINDS[kind])
    assert projector.tokens_in == grid[0] * grid[1]
    out = projector(torch.randn(batch, projector.tokens_in, 6))
    assert out.shape == (batch, projector.tokens, 8 * (1 + projector.deep))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind, norm):
    torch.manual_seed(0)
    projector = build_projector(kind, grid=(4, 4), norm=norm, **DIMS, **KINDS[kind])
    projector(torch.randn(2, 16, 6)).square().sum().backward()
    for name, weight in projector.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@given(blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)), factor=st.integers(1, 4), dim=st.integers(1, 3))
@settings(max_examples=examples(40), deadline=None)
def test_pixel_shuffle_moves_every_number_and_loses_none(blocks, factor, dim):
    grid = (blocks[0] * factor, blocks[1] * factor)
    features = torch.arange(grid[0] * grid[1] * dim).reshape(1, -1, dim)
    out = space_to_depth(features, grid, factor)
    assert out.shape == (1, blocks[0] * blocks[1], factor * factor * dim)
    assert torch.equal(out.flatten().sort().values, features.flatten())


def test_pixel_shuffle_gathers_neighbours():
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    features = torch.stack([rows, columns], dim=-1).reshape(1, 24, 2)
    out = space_to_depth(features, (4, 6), 2).reshape(2, 3, 4, 2)
    # Token (1, 2) holds rows 2..3 and columns 4..5, row by row.
    assert out[1, 2].tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


def test_average_pool_is_the_mean_of_its_window():
    projector = build_projector("avg_pool_mlp", grid=(4, 6), side=(2, 3), depth=1, **DIMS)
    features = torch.randn(2, 24, 6)
    windows = torch.nn.functional.adaptive_avg_pool2d(features.transpose(1, 2).reshape(2, 6, 4, 6), (2, 3))
    expected = projector.layers(windows.flatten(2).transpose(1, 2))
    torch.testing.assert_close(projector(features), expected)
    assert build_projector("avg_pool_mlp", grid=(4, 4), tokens=4, **DIMS).tokens == 4


def test_mlp_has_the_keys_of_llava():
    keys = set(build_projector("mlp", grid=(2, 2), **DIMS).state_dict())
    assert keys == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    assert set(build_projector("linear", grid=(2, 2), **DIMS).state_dict()) == {
        "layers.0.weight",
        "layers.0.bias",
    }


def test_resampler_knows_where_a_feature_lies():
    projector = build_projector("resampler", grid=(2, 2), queries=3, heads=2, **DIMS)
    features = torch.randn(1, 4, 6)
    assert not torch.allclose(projector(features), projector(features.flip(1)), atol=1e-4)


def test_class_token_passes_where_the_grid_is_not_reshaped():
    for kind in ("linear", "mlp", "resampler"):
        projector = build_projector(kind, grid=(2, 2), prefix=1, **DIMS, **KINDS[kind])
        assert projector(torch.randn(1, 5, 6)).shape == (1, projector.tokens, 8)
    with pytest.raises(ModelError, match="select: patch"):
        build_projector("avg_pool_mlp", grid=(2, 2), prefix=1, side=1, **DIMS)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_follow_the_generator_or_the_global_seed(kind):
    def build(generator=None):
        return build_projector(kind, grid=(4, 4), generator=generator, **DIMS, **KINDS[kind]).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (build(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    torch.manual_seed(1)
    one = build()
    torch.manual_seed(1)
    assert all(torch.equal(value, one[key]) for key, value in build().items())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mpl", {}, "did you mean 'mlp'"),
        ("mlp", {"dept": 2}, "did you mean 'depth'"),
        ("linear", {"depth": 2}, "valid: norm"),
        ("mlp", {"depth": 0}, "depth is 0"),
        ("pixel_shuffle_mlp", {"factor": 4}, r"grid of 6 x 9 .*\nvalid factors: \[1, 3\]"),
        ("avg_pool_mlp", {"side": 4}, r"4 x 4 does not divide the grid of 6 x 9\nvalid rows: \[1, 2, 3, 6\]"),
        ("avg_pool_mlp", {}, "either side or tokens"),
        ("avg_pool_mlp", {"tokens": 8}, "nearest: 9"),
        ("resampler", {"heads": 4}, r"valid heads: \[1, 2, 3, 6\]"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(kind, options, message):
    with pytest.raises(ModelError, match=message):
        build_projector(kind, grid=(6, 9), **DIMS, **options)


def test_features_of_another_shape_are_refused_with_both_shapes():
    projector = build_projector("linear", grid=(2, 3), **DIMS)
    with pytest.raises(ModelError, match=r"\(1, 7, 6\), the projector takes \(B, 6, 6\) for a grid of 2 x 3"):
        projector(torch.zeros(1, 7, 6))
