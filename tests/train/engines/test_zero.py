"""A run that moves between engines, ZeRO stages and numbers of ranks takes the same steps of the same records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
from mmit.train.checkpoint import folders
from mmit.train.run import run
from tests.tiny_run import two_layers as tiny_config
from tests.train.launch import ROOT, start_ranks


def at_step(run_dir: Path, step: int) -> None:
    """Take a run back: remove the checkpoints after `step`."""
    for found in folders.checkpoints(run_dir):
        if folders.step_of(found) > step:
            shutil.rmtree(found)
    (run_dir / "finished.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("stage", "course"),
    [
        pytest.param("zero2", [1, 2, 1], marks=pytest.mark.slow),
        pytest.param("zero2", [2, 4, 2], marks=pytest.mark.long),
        pytest.param("zero3", [1, 4, 2], marks=pytest.mark.long),
        pytest.param("zero3", [4, 1, 4], marks=pytest.mark.long),
        pytest.param("zero1", [4, 2, 1], marks=pytest.mark.long),
        pytest.param("zero2_offload", [2, 1, 2], marks=pytest.mark.long),
    ],
)
def test_a_run_moves_between_engines_and_numbers_of_ranks(tmp_path, stage, course):
    """Two steps with each number of ranks in `course`: as many as one process takes alone, and the same ones."""
    train = {"steps": 6, "rows_per_step": 4, "save_every": 2, "keep_last": 9, "precision": "fp32"}

    def config(name: str):
        place = {"dir": str(tmp_path / name), "resume": "auto"}
        return tiny_config(tmp_path, run=place, train=train, engine={"deepspeed": stage})

    assert run(config("straight")) == 0
    (tmp_path / "moved.yaml").write_text(config("moved").to_yaml())
    arguments = [str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "moved.yaml")]
    for leg, ranks in enumerate(course):
        if ranks == 1:
            assert run(config("moved")) == 0
        else:
            start_ranks(arguments, ranks=ranks, timeout=240)
        at_step(tmp_path / "moved", 2 * (leg + 1))
        assert folders.newest(tmp_path / "moved").name == f"step-{2 * (leg + 1):06d}"
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "moved")
    ]
    assert len(rows[0]) == len(rows[1]) == 6
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert all(ours[k] == theirs[k] for k in ("step", "epoch", "tokens", "supervised"))
