"""`mmit data stats`: of a config and of files."""

from __future__ import annotations

import json

import PIL.Image

from tests.cli.commands import good


def test_stats_of_a_config(untrained, tmp_path):
    result = good("data", "stats", untrained / "config.yaml", "--out", tmp_path / "stats")
    assert "12 different images" in result.stdout and "commonest: " in result.stdout
    data = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert data["whole"]["records"] == 16 and data["whole"]["tokens"]["count"] == 28  # pairs are samples
    with PIL.Image.open(tmp_path / "stats" / "lengths.png") as picture:
        assert picture.format == "PNG"


def test_stats_of_several_files(untrained):
    files = [untrained / "data" / name for name in ("train.jsonl", "test.jsonl")]
    result = good("data", "stats", *files)
    assert "held out" in result.stdout and "│ all " in result.stdout and " 18 " in result.stdout
    options = ["--tokenizer", untrained / "tokenizer", "--chat", "vicuna_v1"]
    assert "counts as one token" in good("data", "stats", files[0], *options).stdout
