"""Two ranks under ZeRO-2 and ZeRO-3 with all that goes on beside training: saves, evaluations, the best, heartbeats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

pytest.importorskip("deepspeed")
from mmit.train.checkpoint import folders
from mmit.train.monitor.heartbeat import read_beats
from tests.train.engines.test_zero import at_step
from tests.train.launch import ROOT, start_ranks
from tests.train.monitor.test_watching import config_of, told


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, as bytes."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                value = file.get_tensor(name)
                found[f"{path.relative_to(folder)}:{name}"] = value.contiguous().view(-1).numpy().tobytes()
    return found


@pytest.mark.parametrize(
    "stage", [pytest.param("zero2", marks=pytest.mark.long), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_resume_from_a_background_save_is_exact_with_everything_on(tmp_path, stage):
    train = {"rows_per_step": 4, "save_in_background": True, "keep_last": 9}
    config = config_of(tmp_path, "run", **train, keep_best={"metric": "eval_loss", "better": "lower"})
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": stage})})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    run_dir, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000008"
    arguments = [str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "run.yaml")]
    start_ranks(arguments, ranks=2, timeout=240)
    found = folders.checkpoints(run_dir)
    for folder in found:
        folders.verify(folder)
    best = json.loads((run_dir / "best.json").read_text())
    rows, straight = told(run_dir), tensors(last)
    scores = {row["step"]: row["eval"]["eval_loss"] for row in rows if "eval" in row}
    assert sorted(scores) == [2, 4, 6, 8] and best["value"] == min(scores.values())
    assert {folders.step_of(folder) for folder in found} >= {3, 6, 8, best["step"]}
    assert {b.phase for b in read_beats(run_dir).values()} == {"finished"} and len(read_beats(run_dir)) == 2
    assert len(straight) > 20

    at_step(run_dir, 3)
    shutil.rmtree(run_dir / "heartbeats")
    start_ranks(arguments, ranks=2, timeout=240)
    assert told(run_dir) == rows and tensors(last) == straight
    assert json.loads((run_dir / "best.json").read_text()) == best
    for folder in folders.checkpoints(run_dir):
        folders.verify(folder)
