"""The card of a data set: the hub reads it, every record is counted, nothing of this machine is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
from huggingface_hub import DatasetCard
from typer.testing import CliRunner

from mmit.cli import app
from mmit.records import Image, Record, write_jsonl
from mmit.yamlio import dump_yaml


def command(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return " ".join(result.output.split())


def records(folder: Path) -> Path:
    """Three records of two sources, one of them with a picture beside the file and one with a picture elsewhere."""
    folder.mkdir(parents=True)
    (folder.parent / "elsewhere").mkdir()
    for name in (folder / "a.png", folder.parent / "elsewhere" / "b.png"):
        PIL.Image.new("RGB", (20, 24), (1, 2, 3)).save(name)
    here, there = Image(str(folder / "a.png")), Image(str(folder.parent / "elsewhere" / "b.png"))
    rows = [
        Record.triple("What?", "A picture.", images=[here], id="1", source="a|b", licence="CC-BY-4.0 AND MIT"),
        Record.triple("What?", "A picture.", images=[there], id="2", source="a|b", licence="ODbL-1.0"),
        Record.triple("Why?", "Because.", id="3", source=str(folder / "other.json")),
    ]
    write_jsonl(rows, folder / "train.jsonl")
    return folder / "train.jsonl"


def test_imported_data_has_a_card_that_the_hub_reads(tmp_path: Path) -> None:
    data = records(tmp_path / "mine")
    said = command("data", "card", data, "--name", "My pictures")
    assert "1 images lie outside" in said and "b.png" in said
    found = DatasetCard((tmp_path / "mine" / "README.md").read_text())
    head = found.data.to_dict()
    assert head["pretty_name"] == "My pictures" and head["size_categories"] == ["n<1K"]
    assert head["license"] == ["cc-by-4.0", "mit", "odbl", "unknown"]
    assert head["task_categories"] == ["image-text-to-text", "text-generation"]
    assert head["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": ["train.jsonl"]}]}]
    assert r"| a\|b | 2 | 0 | 2 |" in found.text and "| other.json | 1 | 1 | 1 |" in found.text
    assert "| CC-BY-4.0 AND MIT | 1 |" in found.text and "| not stated | 1 |" in found.text
    assert "licence of some records is not known" in found.text and "3 conversations, 1 of them" in found.text
    assert "| width of an image | 20 | 20 | 20 | 20 |" in found.text
    assert str(tmp_path) not in found.content
    again = (tmp_path / "mine" / "README.md").read_text()
    assert "is there already" in command("data", "card", data, code=2)
    assert (tmp_path / "mine" / "README.md").read_text() == again


def test_a_build_has_its_recipe_on_the_card(tmp_path: Path) -> None:
    table = "\n".join(["text,label", *(f"A text {i},{('bad', 'good')[i % 2]}" for i in range(40)), ",good"])
    (tmp_path / "rows.csv").write_text(table + "\n")
    ask = {"id": "a", "input": "{{ text }}\nGood?", "target": "{{ label }}"}
    bank = {"task": "mood", "licence": "CC0-1.0", "fields": ["text", "label"], "choices": ["bad", "good"]}
    (tmp_path / "bank.yaml").write_text(dump_yaml({**bank, "templates": [ask]}))
    rows = {"path": str(tmp_path / "rows.csv"), "licence": "CC-BY-4.0"}
    (tmp_path / "build.yaml").write_text(dump_yaml({"rows": rows, "bank": "bank.yaml"}))
    command("build", "annotated", tmp_path / "build.yaml", "--out", tmp_path / "out")
    command("data", "card", tmp_path / "out")
    found = DatasetCard((tmp_path / "out" / "README.md").read_text())
    facts = json.loads((tmp_path / "out" / "build.json").read_text())
    assert found.data.license == ["cc-by-4.0", "cc0-1.0"] and found.data.pretty_name == "out"
    (files,) = found.data.to_dict()["configs"][0]["data_files"]
    assert files == {"split": "train", "path": ["records/mood.jsonl"]}
    accepted, dropped = facts["accepted"]["mood"], sum(facts["dropped"].values())
    assert accepted + dropped == 41 and f"| mood | {accepted} | 1 | no |" in found.text
    assert "bank: bank.yaml" in found.text and "path: rows.csv" in found.text
    assert all(digest in found.text for digest in facts["inputs"].values()) and facts["inputs"]
    assert str(tmp_path) not in found.content


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    data = records(tmp_path / "mine")
    assert "mmit build wrote" in command("data", "card", tmp_path / "mine", code=2)
    assert "does not lie in" in command("data", "card", data, tmp_path / "other.jsonl", code=2)
    assert not (tmp_path / "mine" / "README.md").exists()
