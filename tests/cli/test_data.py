"""`mmit data import`: rows of other formats, and what is left out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import good, mmit


def llava_rows(folder: Path) -> list[dict[str, Any]]:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    text = [{"from": "human", "value": "Hi <image>"}, {"from": "gpt", "value": "Hello."}]
    return [{"id": "a", "image": "0.png", "conversations": talk}, {"id": "b", "image": [], "conversations": text}]


def test_a_llava_file_is_imported_and_trained_on(fresh):
    rows = fresh / "data" / "llava.json"
    rows.write_text(json.dumps(llava_rows(fresh)))
    result = good("data", "import", "auto", rows, "--out", fresh / "data" / "out.jsonl", "--licence", "MIT")
    assert "format: llava (" in result.stdout
    assert "2 records (1 without images), 2 answers, 1 different image" in result.stdout
    first = json.loads((fresh / "data" / "out.jsonl").read_text().splitlines()[0])
    assert first["licence"] == "MIT" and first["turns"][0]["parts"][0] == {"image": "0.png"}
    good("train", fresh / "config.yaml", f"data.train.0.path={fresh / 'data' / 'out.jsonl'}", "train.steps=1")


def test_import_leaves_bad_rows_out_only_when_asked(fresh):
    missing = {"id": "gone", "image": "gone.png", "conversations": llava_rows(fresh)[0]["conversations"]}
    rows, out = fresh / "data" / "llava.json", fresh / "out.jsonl"
    rows.write_text(json.dumps([*llava_rows(fresh), missing]))
    result = mmit("data", "import", "llava", rows, "--out", out)
    assert result.exit_code == 2 and "gone.png" in result.stderr and not out.exists()
    result = good("data", "import", "llava", rows, "--out", out, "--skip-bad")
    assert "1 bad row left out" in result.stdout and f"{rows}:3 (gone)" in result.stdout
    assert len(out.read_text().splitlines()) == 2
    listed = json.loads((fresh / "out.bad.jsonl").read_text())
    assert "gone.png" in listed["problem"] and listed["where"]
    rows.write_text(json.dumps([missing]))
    before = out.read_bytes()
    result = mmit("data", "import", "llava", rows, "--out", out, "--skip-bad")
    assert result.exit_code == 2 and "no usable row" in result.stderr and out.read_bytes() == before


def test_easy_vqa_is_imported_from_its_package(tmp_path):
    pytest.importorskip("easy_vqa")
    result = good("data", "import", "easy-vqa", "--split", "test", "--out", tmp_path / "test.jsonl")
    assert "1,000 records (0 without images), 9,673 answers" in result.stdout
    result = mmit("data", "import", "easy-vqa", "--out", tmp_path / "x.jsonl")
    assert result.exit_code == 2 and "--split" in result.stderr
    result = mmit("data", "import", "easy-vqa", "x.json", "--split", "test", "--out", tmp_path / "x.jsonl")
    assert result.exit_code == 2 and "PATH" in result.stderr


def test_a_file_in_place_of_the_format(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    result = mmit("data", "import", "assets/llava_mixed.json", "--out", tmp_path / "x.jsonl")
    assert result.exit_code and "mmit data import auto assets/llava_mixed.json" in result.output
    assert "auto" not in mmit("data", "import", "llva", "--out", tmp_path / "x.jsonl").output.split("valid:")[0]
