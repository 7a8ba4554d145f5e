"""Files of the shapes that other trainers publish go all the way: import auto, check, show, inspect, ten steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.records import read_jsonl
from tests.cli.commands import good, mmit
from tests.tiny_run import tiny_config


def talk(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": said, **keys}


def shares(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer} | keys]}


# Shape -> (rows that are read, rows that are refused, what a reader must be told at import and check).
SHAPES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "llama-factory-mllm": (
        [
            talk("<image>Which colour?", "Red.", images=["a.png"]),
            talk("And <image> or <image>?", "One.", images=["a.png", "b.png"]),
        ],
        [talk("<video>Who wins?", "Nobody.", videos=["race.mp4"])],
        ["3 images", "'videos' is a video"],
    ),
    "llama-factory-kto": (
        [talk("q", "good", label=True, score=1)],
        [talk("q", "good", label=True, kto_tag=False)],
        ["kept in meta only: score (1 row)", "which contradict each other"],
    ),
    "ms-swift": (
        [
            {"query": "q", "response": "a", "history": [["q0", "a0"]], "system": "Be brief.", "channel": "c"},
            {"query": "<image>q", "response": "a", "images": ["b.png"]},
        ],
        [{"query": "q", "response": "a", "rejected_response": "a"}],
        ["1 system turn", "kept in meta only: channel (1 row)", "chosen and the rejected answer are equal"],
    ),
    "axolotl": (
        [shares("q", "a", weight=1), shares("q", "b c", train=False)],
        [shares("q", "a", train_detail=[{"begin_offset": 0, "end_offset": 9, "train": True}])],
        ["0 on 1 assistant turn", "train_detail has 0 to 9"],
    ),
    "qwen-vl": (
        [shares("<image>\nLocate it.", "(1,2),(3,4)") | {"image": "a.png"}],
        [shares("<video>\nWhat?", "x") | {"video": "v.mp4"}],
        ["1 image", "'video' is a video"],
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory) -> tuple[Path, list[str], int, int]:
    rows, refused, told = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    for name, colour in (("a", "red"), ("b", "blue")):
        PIL.Image.new("RGB", (24, 24), colour).save(folder / f"{name}.png")
    many = [*rows, *refused] + rows * 5
    (folder / "demo.json").write_text(json.dumps(many))
    return folder / "demo.json", told, len(rows) * 6, len(refused)


def test_import_and_check_tell_the_same(shape, tmp_path) -> None:
    path, told, records, refused = shape
    out = tmp_path / "mine.jsonl"
    imported = good("data", "import", "auto", path, "--skip-bad", "--out", out)
    checked = mmit("data", "check", path)
    assert checked.exit_code == 1 and "bad-row" in checked.stdout
    assert len(list(read_jsonl(out))) == records and f"{refused} bad row" in imported.stdout
    for line in told:
        line = line.replace("(1 row)", "(6 rows)").replace("1 assistant", "6 assistant").replace("1 image", "6 image")
        line = line.replace("3 images", "18 images").replace("1 system", "6 system")
        assert line in " ".join(imported.stdout.split())
        assert all(word in checked.stdout for word in line.split())
    assert "read: " in imported.stdout and "read: " in checked.stdout


@pytest.mark.slow
def test_ten_steps(shape, tmp_path) -> None:
    path, *_ = shape
    out = tmp_path / "data" / "train.jsonl"
    good("data", "import", "auto", path, "--skip-bad", "--image-root", path.parent, "--out", out)
    run = {"dir": str(tmp_path / "run"), "on_bad_record": "skip", "max_bad_fraction": 0.6}
    config = tiny_config(tmp_path, train={"steps": 10, "rows_per_step": 2, "precision": "fp32"}, run=run)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    good("data", "show", tmp_path / "config.yaml", "--out", tmp_path / "show.html")
    good("inspect", out, "--config", tmp_path / "config.yaml")
    good("train", "--config", tmp_path / "config.yaml")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 10
