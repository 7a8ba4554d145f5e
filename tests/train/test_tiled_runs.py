"""Runs whose pictures are cut into tiles: rows, features, checkpoints and answers all agree on crops and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import mmit
from mmit.data.packing import build_row
from mmit.data.shards.writer import build_shards
from mmit.errors import ConfigError
from mmit.records import Image, Record, Text, Turn, read_jsonl, write_jsonl
from mmit.train.run import run
from tests.tiny_run import tiny_config

TILES = {
    "any_resolution": {"fit": "any_resolution", "tiles": {"pinpoints": [[16, 32], [32, 16], [32, 32]]}},
    "dynamic": {"fit": "dynamic", "tiles": {"max_tiles": 4}},
}


def noise(width: int, height: int) -> PIL.Image.Image:
    drawn = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(drawn)


def pictures(folder: Path) -> None:
    """Replace the run's pictures by patterns of many shapes."""
    records = []
    for i, record in enumerate(read_jsonl(folder / "data" / "train.jsonl")):
        for image in record.images:
            noise(16 + 9 * (i % 5), 16 + 11 * (i % 3)).save(image.source)
        records.append(record)
    write_jsonl(records, folder / "data" / "train.jsonl")


def config_of(folder: Path, mode: str, *, cache: str = "off", **sections):
    config = tiny_config(folder, **sections)
    pictures(folder)
    vision = {**config.model.vision.model_dump(), **TILES[mode], "cache": cache}
    return tiny_config(folder, model={**config.model.model_dump(), "vision": vision}, **sections)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", TILES)
def test_a_run_on_tiles_learns_and_its_cache_changes_nothing(tmp_path, mode):
    data = {"pack_tokens": 160, "max_length": 160}
    base = config_of(tmp_path, mode).data.model_dump()
    given = {"data": {**base, **data}, "train": {"steps": 4, "rows_per_step": 2, "precision": "fp32"}}
    assert run(config_of(tmp_path, mode, **given)) == 0
    first = losses(tmp_path / "run")
    assert first[-1] < first[0]
    for cache in ("memory", "disk"):
        again = config_of(tmp_path, mode, cache=cache, run={"dir": str(tmp_path / cache)}, **given)
        assert run(again) == 0
        assert losses(tmp_path / cache) == first
    model = mmit.load(tmp_path / "run", device="cpu")
    assert model.preparation.tiled
    assert (model.vlm.projector.line_end is not None) == (mode == "any_resolution")
    if mode == "any_resolution":
        fresh = mmit.load(tmp_path / "run", device="cpu", untuned=True)
        assert not torch.equal(model.vlm.projector.line_end, fresh.vlm.projector.line_end)
    shapes = [(20, 50), (50, 20), (16, 16), (40, 40)]
    asked = [Record((Turn("user", (Image(noise(*size)), Text("What is it?"))),)) for size in shapes]
    together = model.generate(asked, max_new_tokens=6)
    assert together == [model.generate([one], max_new_tokens=6)[0] for one in asked]
    assert len(model.generate(asked, max_new_tokens=2, blank_images=True)) == 4


def test_rows_of_tiles_give_each_record_its_own_logits(tmp_path):
    """Packed equals alone although every picture takes another number of tokens."""
    assert run(config_of(tmp_path, "any_resolution", train={"steps": 1, "rows_per_step": 1, "precision": "fp32"})) == 0
    model = mmit.load(tmp_path / "run", device="cpu")
    asked = [r for r in read_jsonl(tmp_path / "data" / "train.jsonl")][:14]
    packed = model.score(asked, ["red", "a long green answer"], batch_size=64)
    alone = [model.score([one], ["red", "a long green answer"])[0] for one in asked]
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(alone), atol=1e-4, rtol=1e-5)
    prompts = [model.prompt_maker().question(record, n) for n, record in enumerate(asked)]
    widths = {s.widths for p in prompts for s in p.samples if s.images}
    assert len(widths) > 2
    row = build_row([s for p in prompts for s in p.samples])
    assert len(row.image_positions) == sum(spread_tokens(p) for p in prompts)


def spread_tokens(prompt) -> int:
    return sum(shown.spread.tokens for shown in prompt.pictures.values())


def test_shards_plan_tiles_from_their_index(tmp_path):
    """The index knows every picture's size, so measuring a run reads no picture."""
    given = {"train": {"steps": 3, "rows_per_step": 2, "precision": "fp32"}}
    assert run(config_of(tmp_path, "dynamic", **given)) == 0
    shards = tmp_path / "shards"
    build_shards(read_jsonl(tmp_path / "data" / "train.jsonl"), shards)
    data = {**config_of(tmp_path, "dynamic").data.model_dump(), "train": [{"path": str(shards)}]}
    again = config_of(tmp_path, "dynamic", run={"dir": str(tmp_path / "from-shards")}, data=data, **given)
    assert run(again) == 0
    assert losses(tmp_path / "from-shards") == losses(tmp_path / "run")


def test_a_projector_without_a_grid_is_refused_by_name(tmp_path):
    config = config_of(tmp_path, "any_resolution")
    model = {**config.model.model_dump(), "projector": {"kind": "resampler", "options": {"queries": 4, "heads": 2}}}
    with pytest.raises(ConfigError, match="model.vision.*4 tokens are no grid"):
        run(tiny_config(tmp_path, model=model))
