"""A study in miniature: coloured images, a bank with three wordings, a tiny model."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from mmit.cli import main
from mmit.yamlio import dump_yaml
from tests.tiny_run import COLOURS, tiny_config

BANK = """\
task: colour
cluster: attributes
licence: MIT
fields: [image, id, colour]
choices: [red, green, blue, black]
templates:
  - {id: a, input: "{{ image }}What color is it?", target: "{{ colour }}"}
  - {id: b, input: "{{ image }}Name the color.", target: "{{ colour }}"}
  - {id: c, input: "{{ image }}Which color?", target: "{{ colour }}", split: held_out}
"""


def write_world(folder: Path, **study: Any) -> Path:
    """Write rows, bank, build, training config and study; returns the study's file. `study` replaces keys of it."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = tiny_config(folder).model_dump(exclude_defaults=True)
    raw["data"] = {"train": [{"path": "none.jsonl"}], "max_length": 128, "pack_tokens": 160, "workers": 0}
    (folder / "base.yaml").write_text(dump_yaml(raw))
    for split in ("train", "test"):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "colour", "id"])
            for number in range(24):
                name = list(COLOURS)[number % len(COLOURS)]
                PIL.Image.new("RGB", (20, 20 + number), COLOURS[name]).save(folder / f"{split}{number}.png")
                rows.writerow([f"{split}{number}.png", name, number])
    (folder / "bank.yaml").write_text(BANK)
    build = {"rows": {"path": "train.csv", "images": ["image"], "licence": "MIT"}, "bank": "bank.yaml"}
    (folder / "build.yaml").write_text(dump_yaml(build))
    settings = {
        "study": "templates",
        "question": "Do more wordings help?",
        "base": "base.yaml",
        "build": "build.yaml",
        "config": {"train.steps": 2},
        "arms": {"one": {"build.templates.count": 1}, "two": {"build.templates.count": 2}},
        "seeds": [0, 1],
        "questions": {"unseen": {"build": {"rows.path": "test.csv", "templates.split": "held_out"}, "limit": 8}},
        "controls": False,
    }
    settings |= study
    path = folder / "study.yaml"
    path.write_text(dump_yaml({key: value for key, value in settings.items() if value is not None}))
    return path


def here(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command in this process: what a study does by a process of its own, without its start."""
    told = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            main(words)
        except SystemExit as end:
            code = end.code or 0
    with open(log, "a") as file:
        file.write(told.getvalue())
    return int(code)
