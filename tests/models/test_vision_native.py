"""Towers of native resolution give what transformers' own classes give, whatever else is in the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from mmit.data.preparation import ImagePreparation, grids_of
from mmit.errors import ModelError
from mmit.models.vision import VisionTower, build_vision
from mmit.models.vision_native import native_class
from mmit.records import Image

DIMS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
QWEN2: dict[str, Any] = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 20,
    **DIMS,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_vl_vision",
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
    "out_hidden_size": 20,
    **DIMS,
}
MOONVIT: dict[str, Any] = {
    "model_type": "kimi_k25_vision",
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 6,
    "pos_emb_width": 6,
    **DIMS,
}
NAFLEX: dict[str, Any] = {
    "model_type": "siglip2_vision_model",
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "num_patches": 36,
    **DIMS,
}
QWEN: dict[str, Any] = {
    "model_type": "qwen2_vl_vision",
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "embed_dim": 16,
    "hidden_size": 20,
    "mlp_ratio": 2,
}
PIXTRAL: dict[str, Any] = {
    "model_type": "pixtral",
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 64,
    **DIMS,
}
KINDS = {
    "qwen2": QWEN,
    "qwen2.5": QWEN2,
    "qwen3": QWEN3,
    "moonvit": MOONVIT,
    "naflex": NAFLEX,
    "pixtral": PIXTRAL,
}
# The towers of models with experts and of Qwen3.5: classes of their own around the same parts.
MORE = {
    "qwen3-moe": QWEN3 | {"model_type": "qwen3_vl_moe_vision"},
    "qwen3.5": {k: v for k, v in QWEN3.items() if k != "deepstack_visual_indexes"} | {"model_type": "qwen3_5_vision"},
    "qwen3.5-moe": {k: v for k, v in QWEN3.items() if k != "deepstack_visual_indexes"}
    | {"model_type": "qwen3_5_moe_vision"},
}
MORE = {kind: options for kind, options in MORE.items() if options["model_type"] in transformers.CONFIG_MAPPING}
CLASSES = {
    "qwen3-moe": "Qwen3VLMoeVisionModel",
    "qwen3.5": "Qwen3_5VisionModel",
    "qwen3.5-moe": "Qwen3_5MoeVisionModel",
    "qwen2": "Qwen2VisionTransformerPretrainedModel",
    "pixtral": "PixtralVisionModel",
    "qwen2.5": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3": "Qwen3VLVisionModel",
    "moonvit": "Kimi_K25VisionModel",
    "naflex": "Siglip2VisionModel",
}
RANGE = {"min_pixels": 256, "max_pixels": 4096}
LIMITS = dict.fromkeys(MORE, RANGE) | {"qwen2": RANGE, "qwen2.5": RANGE, "qwen3": RANGE, "pixtral": {"max_edge": 60}}
PICTURES = [(40, 24), (16, 90), (8, 8), (33, 47)]


def tower_of(kind: str, folder: Any = None, **options: Any) -> VisionTower:
    native = LIMITS.get(kind, {"max_pixels": 4096})
    return build_vision("hf", str(folder) if folder else (KINDS | MORE)[kind], native=native, **options)


def folder_of(kind: str, folder: Any) -> Any:
    """Save a random model of the class; return it as transformers loads it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**(KINDS | MORE)[kind])
    model = native_class(CLASSES[kind])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


def pictures() -> list[Image]:
    draw = np.random.default_rng(0)
    return [Image(PIL.Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8))) for w, h in PICTURES]


def prepared(tower: VisionTower, images: list[Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Units and grids of pictures."""
    preparation = preparation_of(tower)
    grids = grids_of(preparation.spread(image) for image in images)
    assert grids is not None
    return torch.cat([preparation.pixels(image) for image in images]), grids


def preparation_of(tower: VisionTower) -> ImagePreparation:
    assert tower.native is not None
    common: dict[str, Any] = {"mode": "native", "interpolation": tower.interpolation, "fill": (0, 0, 0)}
    common |= {"native": tower.native}
    return ImagePreparation(tower.image_size, tokens=tower.tokens, grid=tower.grid, **common)


@torch.no_grad()
def reference(kind: str, model: Any, tower: VisionTower, units: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Features of one picture, by transformers' class from its pixels (T, D), row by row of the picture."""
    rows, columns = grid.tolist()
    side, patch, f = tower.image_size[0], tower.native["patch"], tower.native["merge"]  # type: ignore[index]
    whole = units.view(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)
    pixels = (whole.float() / 255 - torch.tensor(tower.mean).view(3, 1, 1)) / torch.tensor(tower.std).view(3, 1, 1)
    high, wide = rows * f, columns * f
    cut = pixels.view(3, high, patch, wide, patch)
    frame = torch.tensor([[1, high, wide]])
    if kind == "naflex":
        flat = cut.permute(1, 3, 2, 4, 0).reshape(1, high * wide, -1)
        shape = torch.tensor([[high, wide]])
        out = model(flat, torch.ones(1, high * wide, dtype=torch.long), shape, output_hidden_states=True)
        return out.hidden_states[-2][0]
    if kind == "pixtral":
        return model(pixels[None]).last_hidden_state[0]
    if kind == "moonvit":
        return model(cut.permute(1, 3, 0, 2, 4).reshape(-1, 3, patch, patch), grid_thw=frame).last_hidden_state
    blocks = pixels.view(3, rows, f, patch, columns, f, patch).permute(1, 4, 2, 5, 0, 3, 6)
    flat = blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(high * wide, -1)
    seen: list[torch.Tensor] = []
    # What goes into the published merger: in the order of windows, which it undoes by units.
    handle = model.merger.register_forward_hook(lambda _, given, out: seen.extend((given[0], out)))
    merged = model(flat, grid_thw=frame).pooler_output
    handle.remove()
    back = [int((seen[1] - row).abs().sum(-1).argmin()) for row in merged]
    units_ = seen[0].view(rows * columns, f * f, -1)[back]
    return units_.view(rows, columns, f, f, -1).transpose(1, 2).flatten(0, 3)


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_features_are_those_of_transformers_class(kind: str, tmp_path: Any) -> None:
    model = folder_of(kind, tmp_path)
    tower = tower_of(kind, tmp_path)
    images = pictures()
    units, grids = prepared(tower, images)
    features = tower(units, grids)
    assert features.shape == (len(units), tower.tokens, tower.dim) and len(units) == int(grids.prod(1).sum())
    f = tower.native["merge"]  # type: ignore[index]
    counts = grids.prod(1).tolist()
    for own, crops, grid in zip(features.split(counts), units.split(counts), grids, strict=True):
        expected = reference(kind, model, tower, crops, grid)
        rows, columns = grid.tolist()
        raster = own.view(rows, columns, f, f, -1).transpose(1, 2).flatten(0, 3)
        torch.testing.assert_close(raster, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("layer", [None, 1, [-1, 1]])
def test_pictures_of_one_call_do_not_see_each_other(kind: str, layer: Any) -> None:
    tower = tower_of(kind, layer=layer)
    units, grids = prepared(tower, pictures())
    counts = grids.prod(1).tolist()
    alone = [tower(crops, grid[None]) for crops, grid in zip(units.split(counts), grids, strict=True)]
    torch.testing.assert_close(tower(units, grids), torch.cat(alone), atol=1e-5, rtol=0)
    # A unit alone is no part of a picture, so grids are really used.
    assert (tower(units) - torch.cat(alone)).abs().max() > 1e-3
    changed = units.clone()
    changed[: counts[0]] = 255 - changed[: counts[0]]
    assert torch.equal(tower(changed, grids)[counts[0] :], tower(units, grids)[counts[0] :])


@pytest.mark.parametrize("kind", list(KINDS))
def test_several_layers_are_the_layers_alone_side_by_side(kind: str, tmp_path: Any) -> None:
    folder_of(kind, tmp_path)
    both = tower_of(kind, tmp_path, layer=[-2, 1])
    units, grids = prepared(both, pictures())
    apart = [tower_of(kind, tmp_path, layer=layer)(units, grids) for layer in (-2, 1)]
    torch.testing.assert_close(both(units, grids), torch.cat(apart, dim=-1), atol=1e-6, rtol=0)
    assert both.dim == 32


@pytest.mark.parametrize("kind", ["qwen2.5", "qwen3"])
def test_the_vision_part_of_a_whole_model_is_read(kind: str, tmp_path: Any) -> None:
    text: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 20,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 1]},
    }
    config_class, model_class = {
        "qwen2.5": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
        "qwen3": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    }[kind]
    vision = {key: value for key, value in KINDS[kind].items() if key != "model_type"}
    torch.manual_seed(0)
    whole = model_class(config_class(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    tower = tower_of(kind, tmp_path)
    units, grids = prepared(tower, pictures()[:1])
    own = tower(units, grids)
    part = whole.model.visual
    part.save_pretrained(tmp_path / "part")
    torch.testing.assert_close(own, tower_of(kind, tmp_path / "part")(units, grids), atol=0, rtol=0)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("count", [24, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_header_tells_the_tokens_that_the_tower_gives(kind: str, count: int, tmp_path: Any) -> None:
    tower = tower_of(kind)
    assert tower.native is not None
    preparation = preparation_of(tower)
    draw = np.random.default_rng(5)
    for first in range(0, count, 25):
        told, units, grids = [], [], []
        for n in range(first, min(first + 25, count)):
            width, height = (int(2 ** draw.uniform(1, 8)) for _ in range(2))
            path = tmp_path / f"{n % 25}.png"
            PIL.Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
            spread = preparation.spread(Image(str(path)))  # opens the header alone
            told.append(spread.crops * tower.tokens)
            pixels = preparation.pixels(Image(str(path)))
            units.append(pixels)
            grids.append(spread.grid)
            assert len(pixels) == spread.crops, (width, height)
        features = tower(torch.cat(units), torch.tensor(grids))
        assert features.isfinite().all() and features.shape[:2].numel() == sum(told)


def test_frequencies_stay_float32_in_a_half_precision_tower() -> None:
    tower = tower_of("qwen2.5", dtype=torch.bfloat16)
    assert tower.dtype == torch.bfloat16
    assert tower.encoder.model.rotary_pos_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_trained_tower_gets_gradients_and_a_frozen_one_none(kind: str) -> None:
    tower = tower_of(kind)
    units, grids = prepared(tower, pictures()[:2])
    assert not tower(units, grids).requires_grad
    tower.unfreeze()
    tower(units, grids).square().sum().backward()
    missing = [name for name, weight in tower.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not missing


def test_naflex_units_can_hold_several_patches() -> None:
    tower = build_vision("hf", NAFLEX, native={"max_pixels": 4096, "merge": 2})
    single = build_vision("hf", NAFLEX, native={"max_pixels": 4096})
    single.load_state_dict(tower.state_dict())
    image = [Image(PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)))]
    units, grids = prepared(tower, image)
    rows, columns = grids[0].tolist()
    patches = units.view(rows, columns, 3, 2, 4, 2, 4).permute(0, 3, 1, 5, 2, 4, 6).reshape(-1, 3, 4, 4)
    fine = single(patches, grids * 2).view(rows, 2, columns, 2, -1).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(tower(units, grids), fine.reshape(len(units), 4, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("qwen3", {"image_size": 32}, "image_size"),
        ("qwen3", {"select": "cls_patch"}, "CLS"),
        ("qwen3", {"native": {"max_patches": 3}}, "unknown option 'max_patches'"),
        ("moonvit", {"native": {"min_pixels": 3}}, "unknown option 'min_pixels'"),
        ("qwen2.5", {"native": {"merge": 3}}, "unknown option 'merge'"),
        ("qwen3", {"layer": 4}, "layer 4 does not exist"),
        ("qwen3", {"layer": [1, 1]}, "layer is"),
        ("naflex", {"layer": []}, "layer is"),
        ("qwen3", {"normalize": True}, "norm"),
    ],
)
def test_options_that_a_native_tower_lacks_are_refused(kind: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build_vision("hf", KINDS[kind], **options)


def test_native_limits_are_refused_by_a_tower_of_one_size() -> None:
    clip = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2, **DIMS}
    with pytest.raises(ModelError, match="pictures of one size"):
        build_vision("hf", {**clip, "image_size": 16, "patch_size": 4}, native={"max_pixels": 100})


def test_pixels_without_their_grids_are_refused() -> None:
    tower = tower_of("qwen3")
    units, grids = prepared(tower, pictures())
    with pytest.raises(ModelError, match="units, but pixels of"):
        tower(units, grids[:2])
