"""Two ranks on gloo under every ZeRO stage: any mixture of modalities, numbers that go wrong, states that move."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
from mmit.train import folders  # noqa: E402
from mmit.train.run import run  # noqa: E402
from tests.tiny_run import tiny_config  # noqa: E402
from tests.train.zero_cases import CASES, write_data  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def start_ranks(arguments: list[str], *, ranks: int, timeout: float, check: bool = True) -> list[str]:
    """Run `python ARGUMENTS` on gloo ranks, as a launcher would; return what each printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | own | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        said = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (out, err) in zip(processes, said, strict=True):
        assert not check or p.returncode == 0, out[-1500:] + err[-3000:]
    return [out + err for out, err in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero")
    write_data(path)
    return path


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.slow if s == 2 else pytest.mark.long) for s in (0, 1, 2, 3)]
)
def test_two_ranks(folder, stage):
    said = start_ranks(["-m", "tests.train.zero_cases", str(folder), str(stage)], ranks=2, timeout=300)
    for text in said:
        rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"case"')]
        assert len(rows) == 2 * len(CASES) + (3 if stage else 2), text[-2000:]
        for row in rows:
            name = row.pop("case")
            if "gradient" in row:
                assert row["gradient"] <= 1e-6 * max(row["scale"], 1) and row["loss"] <= 1e-6, (name, row)
                assert row["finite"]
            else:
                assert all(row.values()), (name, row)


def at_step(run_dir: Path, step: int) -> None:
    """Take a run back: remove the checkpoints after `step`."""
    for found in folders.checkpoints(run_dir):
        if folders.step_of(found) > step:
            shutil.rmtree(found)
    (run_dir / "finished.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("zero2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.long),
        pytest.param("zero2_offload", marks=pytest.mark.long),
    ],
)
def test_a_run_moves_between_engines_and_numbers_of_ranks(tmp_path, stage):
    """One process, two ranks, one process again: the same steps of the same records as without moving."""
    train = {"steps": 6, "rows_per_step": 4, "save_every": 2, "keep_last": 9, "precision": "fp32"}

    def config(name: str):
        place = {"dir": str(tmp_path / name), "resume": "auto"}
        return tiny_config(tmp_path, run=place, train=train, engine={"deepspeed": stage})

    assert run(config("straight")) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "moved")
    at_step(tmp_path / "moved", 2)
    (tmp_path / "moved.yaml").write_text(config("moved").to_yaml())
    arguments = [str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "moved.yaml")]
    start_ranks(arguments, ranks=2, timeout=120)
    at_step(tmp_path / "moved", 4)
    assert run(config("moved")) == 0
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "moved")
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert all(ours[k] == theirs[k] for k in ("step", "epoch", "tokens", "supervised"))
