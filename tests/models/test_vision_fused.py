"""Fused towers: features side by side, each tower with its own constants and size; whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mmit
from mmit.errors import ConfigError, ModelError
from mmit.models.vision import build_vision
from mmit.train.run import run
from tests.models.test_vision_layers import dino, towers
from tests.tiny_run import tiny_config
from tests.train.test_tiled_runs import losses, noise, pictures


def two(folder: Path, **second: Any) -> list[dict[str, Any]]:
    if not (folder / "dino").exists():
        dino("dinov2_with_registers", folder / "dino")
        towers("siglip", folder / "siglip")
    other = {"kind": "hf", "name": str(folder / "siglip"), **second}
    return [{"kind": "hf", "name": str(folder / "dino"), "layer": -2}, other]


def test_features_lie_side_by_side(tmp_path: Path) -> None:
    told = two(tmp_path, layer=[-1, 1])
    fused = build_vision("fused", "", towers=told)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    apart = [build_vision(**tower) for tower in told]
    assert apart[0].mean != apart[1].mean  # each normalises with its own constants
    torch.testing.assert_close(fused(pixels), torch.cat([t(pixels) for t in apart], dim=-1), atol=1e-6, rtol=0)
    assert fused.dim == 16 + 32 and fused.grid == (4, 4) and not fused(pixels).requires_grad
    other = build_vision("fused", "", towers=told[::-1])
    assert fused.fingerprint() != other.fingerprint()


def test_a_tower_of_a_smaller_size_sees_the_picture_scaled(tmp_path: Path) -> None:
    config = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    large = {"kind": "hf", "name": {**config, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}}
    fused = build_vision("fused", "", towers=[*two(tmp_path)[:1], large])
    assert fused.image_size == (32, 32) and fused.grid == (4, 4)
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)  # one colour is one colour at every size
    alone = build_vision(**two(tmp_path)[0])(flat[:, :, :16, :16])
    torch.testing.assert_close(fused(flat)[..., :16], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t[:1], "1 towers"),
        (lambda t: [], "0 towers"),
        (lambda t: [t[0], {**t[1], "image_size": 24}], "different grids"),
        (lambda t: [t[0], {**t[1], "kind": "clip"}], "unknown vision kind"),
        (lambda t: [{**t[0], "layer": 9}, t[1]], "layer 9 does not exist"),
    ],
)
def test_towers_that_do_not_fit_are_refused(tmp_path: Path, change: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build_vision("fused", "", towers=change(two(tmp_path)))


def config_of(folder: Path, *, vision: dict[str, Any] | None = None, **sections: Any) -> Any:
    config = tiny_config(folder)
    pictures(folder)
    told = {"kind": "fused", "fit": "resize", "towers": two(folder), **(vision or {})}
    model = {**config.model.model_dump(), "vision": told, "projector": {"kind": "fused_mlp"}}
    sections.setdefault("train", {"steps": 3, "rows_per_step": 2, "micro_rows": 2, "precision": "fp32"})
    return tiny_config(folder, model=model, **sections)


def test_a_run_learns_and_its_cache_changes_nothing(tmp_path: Path) -> None:
    assert run(config_of(tmp_path)) == 0
    first = losses(tmp_path / "run")
    assert first[-1] < first[0]
    again = config_of(tmp_path, vision={"cache": "memory"}, run={"dir": str(tmp_path / "cached")})
    assert run(again) == 0
    assert losses(tmp_path / "cached") == pytest.approx(first, rel=1e-5)
    model = mmit.load(tmp_path / "run", device="cpu")
    assert isinstance(model.chat(noise(20, 30), "What is it?", max_new_tokens=3), str)


def test_towers_named_from_here_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two(tmp_path)
    monkeypatch.chdir(tmp_path)
    towers = [{"kind": "hf", "name": name} for name in ("dino", "siglip")]
    assert run(config_of(tmp_path, vision={"towers": towers}, train={"steps": 1, "precision": "fp32"})) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert mmit.load(tmp_path / "run", device="cpu").vlm.vision is not None


@pytest.mark.parametrize("mode", ["full", "lora", "layernorm"])
def test_both_towers_are_trained_stored_and_read(tmp_path: Path, mode: str) -> None:
    options = {"r": 2, "alpha": 4} if mode == "lora" else {}
    tune = {"vision": {"mode": mode, "lr": 1e-2, "options": options}, "llm": {"mode": "frozen"}}
    assert run(config_of(tmp_path, tune=tune)) == 0
    tuned = mmit.load(tmp_path / "run", device="cpu").vlm.vision
    fresh = mmit.load(tmp_path / "run", device="cpu", untuned=True).vlm.vision
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert tuned is not None and fresh is not None
    before, after = fresh(pixels), tuned(pixels)
    assert not torch.equal(before[..., :16], after[..., :16]) and not torch.equal(before[..., 16:], after[..., 16:])


@pytest.mark.parametrize(
    ("vision", "told"),
    [
        ({"name": "x"}, "has no name of its own"),
        ({"kind": "hf"}, "give the name"),
        ({"kind": "hf", "name": "x"}, "towers is for kind fused"),
        ({"image_size": 16}, "set them under towers"),
    ],
)
def test_a_section_that_mixes_one_and_several_is_refused(tmp_path: Path, vision: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=told):
        run(config_of(tmp_path, vision=vision))
