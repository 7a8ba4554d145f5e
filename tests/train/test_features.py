"""Cached features are bitwise those of the tower; the cache knows when a picture changed."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from mmit.data.images import fit, load_rgb
from mmit.errors import ConfigError
from mmit.models.vision import build_vision
from mmit.records import Image
from mmit.train.features import compute_features, forecast_bytes

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def load(image, where):
    return fit(load_rgb(image, where=where), (16, 16))


@pytest.fixture
def pictures(tmp_path):
    for i in range(5):
        PIL.Image.new("RGB", (16, 16), (40 * i, 10, 200 - 30 * i)).save(tmp_path / f"{i}.png")
    return {f"k{i}": Image(str(tmp_path / f"{i}.png")) for i in range(5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_to_computing_also_from_disk(pictures, tmp_path, dtype):
    torch.manual_seed(0)
    tower = build_vision("hf", CLIP, dtype=dtype)
    arguments = {"folder": tmp_path / "cache", "preparation": {"mode": "resize"}, "count": 5}
    direct = tower(torch.stack([load(i, "") for i in pictures.values()]))
    memory = compute_features(tower, pictures.items(), load, kind="memory", **arguments)
    written = compute_features(tower, pictures.items(), load, kind="disk", **arguments)

    def never(image, where):
        raise AssertionError("was on disk")

    read = compute_features(tower, pictures.items(), never, kind="disk", **arguments)
    for cache in (memory, written, read):
        assert torch.equal(cache.get(list(pictures)), direct)
        assert "k3" in cache and "other" not in cache
    assert forecast_bytes(tower, 5) == direct.numel() * direct.element_size()


def test_changed_bytes_are_computed_again(pictures, tmp_path):
    tower = build_vision("hf", CLIP)
    arguments = {"kind": "disk", "folder": tmp_path / "cache", "preparation": {}, "count": 5}
    old = compute_features(tower, pictures.items(), load, **arguments).get(["k0", "k1"])
    PIL.Image.new("RGB", (16, 16), (255, 255, 0)).save(pictures["k1"].source)
    new = compute_features(tower, pictures.items(), load, **arguments).get(["k0", "k1"])
    assert torch.equal(old[0], new[0]) and not torch.equal(old[1], new[1])


def test_equal_pictures_are_run_once(pictures, tmp_path):
    seen = []

    def counting(image, where):
        seen.append(image)
        return load(image, where)

    twice = {**pictures, "again": Image(pictures["k0"].source)}
    cache = compute_features(
        build_vision("hf", CLIP), twice.items(), counting, count=6, kind="memory", folder=tmp_path, preparation={}
    )
    assert len(seen) == 5 and torch.equal(*cache.get(["k0", "again"]))


def test_a_cache_that_would_be_too_large_is_refused_before_anything_is_computed(pictures, tmp_path):
    with pytest.raises(ConfigError, match="cache=off"):
        compute_features(
            build_vision("hf", CLIP),
            pictures.items(),
            load,
            count=5,
            kind="disk",
            folder=tmp_path,
            preparation={},
            max_bytes=10,
        )
