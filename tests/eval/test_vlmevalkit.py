"""scripts/vlmevalkit.py: a task's TSV holds its questions, pictures and answers; messages become turns."""

from __future__ import annotations

import base64
import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmit.errors import RecordError
from mmit.eval.tasks import load_task
from mmit.records import Image, Text
from tests.eval.benchmarks import CASES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "vlmevalkit.py"


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mmit_vlmevalkit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported(kit: ModuleType, name: str, folder: Path) -> list[dict[str, str]]:
    CASES[name][0](Path(load_task(name, data_root=folder).folder or ""))
    out = folder / "LMUData" / f"{name}.tsv"
    assert kit.main(["export", name, "--data-root", str(folder), "--out", str(out)]) == 0
    csv.field_size_limit(sys.maxsize)
    with open(out, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_multiple_choice_comes_back_as_it_went(kit: ModuleType, tmp_path: Path) -> None:
    (row,) = exported(kit, "scienceqa_img", tmp_path)
    file = tmp_path / "scienceqa" / "images" / "test" / "7" / "image.png"
    assert base64.b64decode(row.pop("image")) == file.read_bytes()
    assert row == {
        "index": "0",
        "question": "Context: Look.\nWhich?",
        "A": "dog",
        "B": "cat",
        "answer": "B",
        "category": "natural science",
    }


def test_yes_or_no_has_no_options(kit: ModuleType, tmp_path: Path) -> None:
    rows = exported(kit, "pope", tmp_path)
    assert list(rows[0]) == ["index", "image", "question", "answer", "category"]
    assert [row["answer"] for row in rows] == ["yes", "no"] * 3 and rows[0]["question"].endswith("?")


def test_the_frames_of_pandas_agree(kit: ModuleType, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    exported(kit, "seedbench_img", tmp_path)
    frame = pandas.read_csv(tmp_path / "LMUData" / "seedbench_img.tsv", sep="\t")  # how VLMEvalKit reads it
    assert frame["D"].tolist() == ["option d"] and frame["answer"].tolist() == ["B"]


def test_what_has_no_place_is_refused(kit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["textvqa"][0](tmp_path / "textvqa")
    options = ["--data-root", str(tmp_path), "--out", str(tmp_path / "x.tsv")]
    assert kit.main(["export", "textvqa", *options]) == 2
    told = capsys.readouterr().err
    assert "not one answer in words" in told and "34602" in told
    assert kit.main(["export", "textqa", *options]) == 2
    assert "did you mean 'textvqa'" in capsys.readouterr().err


def test_messages(kit: ModuleType) -> None:
    message: list[dict[str, Any]] = [{"type": "image", "value": "a.png"}, {"type": "text", "value": "What?"}]
    (turn,) = kit.conversation(message)
    assert turn.parts == (Image("a.png"), Text("What?"))
    with pytest.raises(RecordError, match="type 'video'"):
        kit.conversation([{"type": "video", "value": "a.mp4"}])
