"""Runs on encoders of native resolution: rows, features, checkpoints, exports and answers agree on units and tokens."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import mmit
from mmit.cli import app
from mmit.config import Config
from mmit.errors import ConfigError
from mmit.models.vision_native import native_class
from mmit.records import Image, Record, Text, Turn
from mmit.train.run import run
from tests.models.test_vision_native import CLASSES, KINDS
from tests.tiny_run import tiny_config
from tests.train.test_tiled_runs import losses, noise, pictures

RANGE = {"min_pixels": 64, "max_pixels": 1024}
LIMITS = {"qwen2": RANGE, "qwen2.5": RANGE, "qwen3": RANGE, "pixtral": {"max_edge": 48}}
RUN = [kind for kind in KINDS if kind != "qwen2"]  # which is read as qwen2.5 is
SHAPES = [(20, 50), (50, 20), (16, 16), (300, 2000)]


def save_tower(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    native_class(CLASSES[kind])(AutoConfig.for_model(**KINDS[kind])).save_pretrained(folder)
    return folder


def config_of(folder: Path, kind: str, *, vision: dict[str, Any] | None = None, **sections: Any) -> Config:
    config = tiny_config(folder)
    pictures(folder)
    tower = folder / f"tower-{kind}"
    if not tower.exists():
        save_tower(kind, tower)
    native = LIMITS.get(kind, {"max_pixels": 1024})
    told = {"kind": "hf", "name": str(tower), "fit": "native", "native": native, **(vision or {})}
    sections.setdefault("train", {"steps": 3, "rows_per_step": 2, "micro_rows": 2, "precision": "fp32"})
    data = {**config.data.model_dump(), "max_length": 256, "pack_tokens": 256}
    model = {**config.model.model_dump(), "vision": told, **sections.pop("model", {})}
    return tiny_config(folder, **{"model": model, "data": data, **sections})


@functools.cache
def asked() -> list[Record]:
    return [Record((Turn("user", (Image(noise(*size)), Text("What is it?"))),)) for size in SHAPES]


@pytest.mark.parametrize("kind", RUN)
def test_a_run_learns_and_its_cache_changes_nothing(kind: str, tmp_path: Path) -> None:
    assert run(config_of(tmp_path, kind)) == 0
    first = losses(tmp_path / "run")
    assert first[-1] < first[0]
    for cache in ("memory", "disk") if kind == "qwen2.5" else ("disk",):
        again = config_of(tmp_path, kind, vision={"cache": cache}, run={"dir": str(tmp_path / cache)})
        assert run(again) == 0
        assert losses(tmp_path / cache) == pytest.approx(first, rel=1e-5)
    model = mmit.load(tmp_path / "run", device="cpu")
    together = model.generate(asked(), max_new_tokens=4)
    assert together == [model.generate([one], max_new_tokens=4)[0] for one in asked()]
    # 300 x 2,000 pixels go through whole, and each shape takes another number of tokens.
    prompts = [model.prompt_maker().question(record, n) for n, record in enumerate(asked())]
    assert len({prompt.samples[0].widths for prompt in prompts}) >= (2 if kind == "naflex" else 3)
    packed = model.score(asked(), ["red", "a long green answer"], batch_size=64)
    alone = [model.score([one], ["red", "a long green answer"])[0] for one in asked()]
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(alone), atol=1e-4, rtol=1e-5)
    assert len(model.generate(asked(), max_new_tokens=2, blank_images=True)) == len(SHAPES)


@pytest.mark.parametrize(
    ("kind", "mode"), [("qwen2.5", "full"), ("qwen3", "lora"), ("moonvit", "full"), ("naflex", "lora")]
)
def test_a_trained_tower_is_stored_read_and_resumed(kind: str, mode: str, tmp_path: Path) -> None:
    tune = {
        "vision": {"mode": mode, "lr": 1e-3, "options": {"r": 2, "alpha": 4} if mode == "lora" else {}},
        "projector": {"mode": "full", "lr": 1e-2},
        "llm": {"mode": "frozen"},
    }
    train = {"steps": 4, "rows_per_step": 2, "micro_rows": 2, "precision": "fp32", "save_every": 2}
    assert run(config_of(tmp_path, kind, tune=tune, train=train)) == 0
    whole = losses(tmp_path / "run")
    model = mmit.load(tmp_path / "run", device="cpu")
    fresh = mmit.load(tmp_path / "run", device="cpu", untuned=True)
    before, after = (dict(m.vlm.vision.state_dict()) for m in (fresh, model))
    moved = [key for key, value in after.items() if key not in before or not torch.equal(value, before[key])]
    assert moved
    first = tmp_path / "run" / "checkpoints" / "step-000002"
    half = config_of(tmp_path, kind, tune=tune, train=train, run={"dir": str(tmp_path / "half"), "resume": str(first)})
    assert run(half) == 0
    assert losses(tmp_path / "half")[-2:] == whole[-2:]


def test_rows_without_pictures_train_beside_a_trained_tower(tmp_path: Path) -> None:
    tune = {"vision": {"mode": "full", "lr": 1e-3}, "llm": {"mode": "frozen"}}
    train = {"steps": 6, "rows_per_step": 1, "precision": "fp32"}
    config = config_of(tmp_path, "qwen3", tune=tune, train=train)
    data = {**config.data.model_dump(), "pack_tokens": 128, "max_length": 128}
    assert run(config_of(tmp_path, "qwen3", tune=tune, train=train, data=data)) == 0


@pytest.mark.parametrize("kind", ["qwen3", "naflex"])
def test_projectors_join_the_patches_of_a_unit(kind: str, tmp_path: Path) -> None:
    native = {"max_pixels": 1024, "merge": 2} if kind == "naflex" else LIMITS[kind]
    model = {"projector": {"kind": "pixel_shuffle_mlp", "options": {"factor": 2}}}
    assert run(config_of(tmp_path, kind, vision={"native": native}, model=model)) == 0
    loaded = mmit.load(tmp_path / "run", device="cpu")
    spread = loaded.preparation.spread(Image(noise(64, 32)))
    assert loaded.vlm.image_tokens == 1 and spread.tokens == spread.crops
    assert loaded.chat(noise(40, 24), "What is it?", max_new_tokens=2) is not None


@pytest.mark.parametrize("stated", [True, False])
def test_a_whole_export_keeps_the_limits(stated: bool, tmp_path: Path) -> None:
    """Those of the config, and those of the tower's own preprocessor_config.json."""
    tower, vision = save_tower("qwen3", tmp_path / "tower-qwen3"), {}
    if not stated:
        (tower / "preprocessor_config.json").write_text(
            json.dumps({"size": {"shortest_edge": 64, "longest_edge": 1024}, "image_mean": [0.4, 0.5, 0.6]})
        )
        vision = {"native": {}}
    assert run(config_of(tmp_path, "qwen3", vision=vision)) == 0
    out = tmp_path / "whole"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(out), "-f", "mmit"])
    assert done.exit_code == 0, done.output
    (tmp_path / "tower-qwen3").rename(tmp_path / "gone")
    ours, moved = mmit.load(tmp_path / "whole", device="cpu"), json.loads((out / "mmit.json").read_text())
    assert ours.image["native"] == moved["image"]["native"] and ours.image["native"]["max_pixels"] == 1024
    assert ours.vlm.vision is not None and ours.vlm.vision.native == ours.image["native"]
    assert ours.vlm.vision.mean == ((0.5, 0.5, 0.5) if stated else (0.4, 0.5, 0.6))
    assert ours.chat(noise(30, 30), "What?", max_new_tokens=3) is not None


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("qwen2.5", "frozen"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("naflex", "full"), ("moonvit", "full")]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("qwen3", "full"), ("qwen3", "lora")]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("pixtral", "full"), ("qwen2", "full")]),
    ],
)
def test_the_dry_run_counts_units(kind: str, mode: str, tmp_path: Path) -> None:
    options = {"r": 2, "alpha": 4} if mode == "lora" else {}
    tune = {"vision": {"mode": mode, "lr": None if mode == "frozen" else 1e-3, "options": options}}
    config = config_of(tmp_path, kind, tune=tune)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("kind", ["qwen3", "clip"])
def test_a_fit_of_the_other_kind_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "clip":
        config = tiny_config(tmp_path)
        vision = {**config.model.vision.model_dump(), "fit": "native"}  # type: ignore[union-attr]
        config = tiny_config(tmp_path, model={**config.model.model_dump(), "vision": vision})
        told = "takes pictures of one size"
    else:
        config, told = config_of(tmp_path, kind, vision={"fit": "pad"}), "takes pictures of any size"
    with pytest.raises(ConfigError, match=f"model.vision: fit is .*{told}"):
        run(config)


def test_word_alignment_says_that_it_needs_one_size(tmp_path: Path) -> None:
    align = {"captions": str(tmp_path / "data" / "captions.jsonl")}
    with pytest.raises(ConfigError, match="align"):
        run(config_of(tmp_path, "qwen3", align=align))
