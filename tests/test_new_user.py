"""As a new user would: the README's commands mix four formats, explain and train them; kill -9 loses nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from mmit.config import load_config
from tests.cli.test_data_shards import folder as raw_files  # noqa: F401  the fixture
from tests.test_readme import blocks
from tests.tiny_run import tiny_config
from tests.train.test_kill import consumed, end, start

RECIPE = "configs/train/mixture.yaml"
PATHS = ["data/llava", "data/alpaca.jsonl", "data/table.jsonl", "data/web"]


def mmit(folder: Path, command: str) -> str:
    words = [sys.executable, "-m", "mmit", *shlex.split(command)[1:]]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_four_formats_become_one_mixture(raw_files: Path) -> None:  # noqa: F811
    folder = raw_files
    (folder / "raw").mkdir()
    for name in ("llava.json", "alpaca.json", "table.csv", "00000.tar", "a.png"):
        (folder / name).rename(folder / "raw" / name)
    table = folder / "raw" / "table.csv"
    table.write_text(table.read_text().replace("told", "answer", 1))
    commands = blocks("Mix sources")
    assert len(commands) == 8 and commands[7] == f"mmit train --config {RECIPE}"
    for command in commands[:4]:
        mmit(folder, command)

    # The recipe's own sources, on a model that takes seconds.
    recipe = load_config(Path(__file__).resolve().parents[1] / RECIPE)
    assert [source.path for source in recipe.data.train] == PATHS
    sources = [{**source.model_dump(), "path": str(folder / source.path)} for source in recipe.data.train]
    data = {"train": sources, "max_length": 128, "pack_tokens": 160, "workers": 2}
    train = {"steps": None, "epochs": 3, "rows_per_step": 2, "precision": "fp32", "save_every": 2, "threads": 1}
    config = tiny_config(folder / "x", run={"dir": str(folder / "run"), "resume": "auto"}, data=data, train=train)
    (folder / "configs" / "train").mkdir(parents=True)
    (folder / RECIPE).write_text(config.to_yaml())
    told = [mmit(folder, command) for command in commands[4:7]]
    assert "0 errors" in told[0] and "18 records" in told[0]
    page = (folder / "data" / "mixture.html").read_text()
    assert "data:image/" in page and 'class="' in page
    told_of = (folder / "data" / "mixture-stats" / "stats.json").read_text()
    assert "18" in told[2] and all(name in told_of for name in ("llava", "alpaca", "table"))
    assert list((folder / "data" / "mixture-stats").glob("*.png"))
    mmit(folder, f"{commands[7]} run.dir={folder / 'straight'}")
    rows = [json.loads(line) for line in (folder / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["records"] for row in rows) == 3 * (5 + 4 + 2 * 3 + 6)

    killed = 0
    for _ in range(6):
        child = start(config)
        begun, there = time.monotonic(), len(list((folder / "run" / "checkpoints").glob("step-*")))
        while killed < 2 and time.monotonic() - begun < 60:
            saved = [path.name for path in (folder / "run" / "checkpoints").glob("step-*")]
            if len(saved) and (not there or max(saved) > "step-000004"):
                os.kill(child, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.005)
        if end(child) == 0:
            break
    assert killed >= 1 and (folder / "run" / "finished.json").exists(), (folder / "run" / "log.txt").read_text()[-2000:]
    seen = Counter(r for micros in consumed(folder / "run", 2).values() for rows in micros for r in rows)
    twice = {9, 10, 11}  # the table has weight 2
    assert seen == Counter({number: 6 if number in twice else 3 for number in range(18)})

    shards = sorted(str(path) for path in (folder / "data" / "llava").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == 5 and all(re.search("png", " ".join(sample)) for sample in samples)
