"""Rows of a Hugging Face data set, from a folder as `datasets` writes it: one rule for where paths start."""

from __future__ import annotations

import io
import json

import PIL.Image
import pytest
from typer.testing import CliRunner

from mmit.build import rows
from mmit.build.rows import open_rows
from mmit.cli import app
from mmit.errors import ConfigError
from mmit.records import Image, read_jsonl
from mmit.yamlio import dump_yaml


def test_a_data_set_starts_where_a_path_does(tmp_path, monkeypatch):
    """At the config's folder; one of the same name in the working directory is another data set."""
    asked = []
    monkeypatch.setattr(rows, "hf_rows", lambda name, **options: asked.append((name, options)) or iter(()))
    (tmp_path / "configs" / "sets" / "mine").mkdir(parents=True)
    (tmp_path / "sets" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    described = {"dataset": "sets/mine", "split": "test"}
    _, _, name = open_rows(described, folder="configs")
    assert asked.pop() == (name, {"split": "test"}) and name == "configs/sets/mine"
    open_rows({"dataset": "org/name"}, folder="configs")  # no folder anywhere: the hub's
    assert asked.pop() == ("org/name", {})
    for wrong in ("sets/there", "./mine", "../mine", "~/mine", str(tmp_path / "none"), "a/b/c"):
        with pytest.raises(ConfigError, match="no such folder") as error:
            open_rows({"dataset": wrong}, folder="configs")
        assert "config's folder" in error.value.remedy
    assert not asked


def test_pictures_of_a_data_set_start_at_its_folder_or_at_the_configs(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "hf_rows", lambda name, **options: iter([(1, {"image": "a.png"})]))
    for place in ("set", "pictures"):
        (tmp_path / place).mkdir()
        PIL.Image.new("RGB", (2, 2)).save(tmp_path / place / "a.png")
    described = {"dataset": "set", "images": ["image"]}
    for more, place in (({}, "set"), ({"image_root": "pictures"}, "pictures")):
        opened, _, _ = open_rows(described | more, folder=str(tmp_path))
        assert list(opened) == [(1, {"image": Image(str(tmp_path / place / "a.png"))})]


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["save_to_disk", "parquet"])
def test_a_real_data_set_becomes_records_with_its_pictures(tmp_path, monkeypatch, kept):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    cells = []
    for n in range(12):
        buffer = io.BytesIO()
        name = list(colours)[n % 3]
        PIL.Image.new("RGB", (8 + n, 8), colours[name]).save(buffer, "PNG")
        cells.append({"picture": {"bytes": buffer.getvalue(), "path": None}, "colour": name, "size": 8 + n})
    cells[5]["colour"] = None  # a row that fits no template
    table = datasets.Dataset.from_list(cells).cast_column("picture", datasets.Image())
    place = tmp_path / "sets" / "colours"
    if kept == "save_to_disk":
        table.save_to_disk(place)
    else:
        place.mkdir(parents=True)
        table.to_parquet(place / "train.parquet")
    bank = {
        "task": "colour",
        "licence": "CC0-1.0",
        "fields": ["picture", "colour"],
        "choices": list(colours),
        "templates": [{"id": "a", "input": "{{ picture }}Which colour?", "target": "{{ colour }}"}],
    }
    (tmp_path / "bank.yaml").write_text(dump_yaml(bank))
    described = {"dataset": "sets/colours", "images": ["picture"], "licence": "CC-BY-4.0"}
    (tmp_path / "build.yaml").write_text(dump_yaml({"rows": described, "bank": "bank.yaml"}))
    monkeypatch.chdir("/")
    done = CliRunner().invoke(app, ["build", "annotated", str(tmp_path / "build.yaml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    stated = json.loads((tmp_path / "out" / "build.json").read_text())
    assert (stated["in"], sum(stated["accepted"].values()), sum(stated["dropped"].values())) == (12, 11, 1)
    made = list(read_jsonl(tmp_path / "out" / "records" / "colour.jsonl"))
    assert [record.turns[1].text for record in made] == [cell["colour"] for cell in cells if cell["colour"]]
    assert {record.licence for record in made} == {"CC-BY-4.0 AND CC0-1.0"}
    for record in made:
        (image,) = record.images
        with PIL.Image.open(str(image.source)) as picture:
            assert picture.getpixel((0, 0)) == colours[record.turns[1].text]
    checked = CliRunner().invoke(app, ["data", "check", str(tmp_path / "out" / "mixture.yaml")])
    assert checked.exit_code == 0, checked.output
