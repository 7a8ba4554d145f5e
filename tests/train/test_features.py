"""Cached features are bitwise those of the tower; the cache knows when a picture changed."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from mmit.data.preparation import ImagePreparation
from mmit.errors import ConfigError
from mmit.models.vision import build_vision
from mmit.records import Image
from mmit.train.features import CachePlan, compute_features, forecast_bytes

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


class Counting(ImagePreparation):
    """Notes what it decodes."""

    def pixels(self, image, *, where=""):
        seen.append(image.source)
        return super().pixels(image, where=where)


seen = []
EYE = Counting((16, 16), "resize", "bicubic", (0, 0, 0), tokens=4)


@pytest.fixture
def pictures(tmp_path):
    for i in range(5):
        PIL.Image.new("RGB", (16, 16), (40 * i, 10, 200 - 30 * i)).save(tmp_path / f"{i}.png")
    return {f"k{i}": Image(str(tmp_path / f"{i}.png")) for i in range(5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_to_computing_also_from_disk(pictures, tmp_path, dtype):
    torch.manual_seed(0)
    tower = build_vision("hf", CLIP, dtype=dtype)
    arguments = {"folder": tmp_path / "cache", "count": 5}
    direct = tower(torch.cat([EYE.pixels(i) for i in pictures.values()]))
    memory = compute_features(tower, pictures.items(), EYE, CachePlan(kind="memory", **arguments))
    written = compute_features(tower, pictures.items(), EYE, CachePlan(kind="disk", **arguments))
    seen.clear()
    read = compute_features(tower, pictures.items(), EYE, CachePlan(kind="disk", **arguments))
    assert not seen
    for cache in (memory, written, read):
        assert torch.equal(cache.get(list(pictures)), direct)
        assert "k3" in cache and "other" not in cache
    assert forecast_bytes(tower, 5) == direct.numel() * direct.element_size()


def test_changed_bytes_are_computed_again(pictures, tmp_path):
    tower = build_vision("hf", CLIP)
    arguments = {"kind": "disk", "folder": tmp_path / "cache", "count": 5}
    old = compute_features(tower, pictures.items(), EYE, CachePlan(**arguments)).get(["k0", "k1"])
    PIL.Image.new("RGB", (16, 16), (255, 255, 0)).save(pictures["k1"].source)
    new = compute_features(tower, pictures.items(), EYE, CachePlan(**arguments)).get(["k0", "k1"])
    assert torch.equal(old[0], new[0]) and not torch.equal(old[1], new[1])


def test_equal_pictures_are_run_once(pictures, tmp_path):
    seen.clear()
    twice = {**pictures, "again": Image(pictures["k0"].source)}
    tower = build_vision("hf", CLIP)
    cache = compute_features(tower, twice.items(), EYE, CachePlan(6, kind="memory", folder=tmp_path))
    assert len(seen) == 5 and torch.equal(*cache.get(["k0", "again"]))


def test_a_cache_that_would_be_too_large_is_refused_before_anything_is_computed(pictures, tmp_path):
    with pytest.raises(ConfigError, match="cache=off"):
        compute_features(
            build_vision("hf", CLIP),
            pictures.items(),
            EYE,
            CachePlan(5, kind="disk", folder=tmp_path, max_bytes=10),
        )


def test_runs_share_a_folder_and_lose_nothing_of_each_other(pictures, tmp_path):
    tower = build_vision("hf", CLIP)
    names = list(pictures)
    arguments = {"kind": "disk", "folder": tmp_path / "cache", "count": 5}
    first = {name: pictures[name] for name in names[:3]}
    second = {name: pictures[name] for name in names[2:]}
    kept = compute_features(tower, first.items(), EYE, CachePlan(**arguments)).get(names[:3])
    compute_features(tower, second.items(), EYE, CachePlan(**arguments))
    seen.clear()
    again = compute_features(tower, pictures.items(), EYE, CachePlan(**arguments))
    assert not seen and torch.equal(again.get(names[:3]), kept)
    assert len(list((tmp_path / "cache").glob("*/*.bin"))) == 1


def test_an_index_whose_features_are_gone_is_computed_again(pictures, tmp_path):
    tower = build_vision("hf", CLIP)
    arguments = {"kind": "disk", "folder": tmp_path / "cache", "count": 5}
    direct = compute_features(tower, pictures.items(), EYE, CachePlan(**arguments)).get(list(pictures))
    for file in (tmp_path / "cache").glob("*/*.bin"):
        file.unlink()
    assert torch.equal(
        compute_features(tower, pictures.items(), EYE, CachePlan(**arguments)).get(list(pictures)), direct
    )
