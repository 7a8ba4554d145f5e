"""Two ranks on gloo under every ZeRO stage: any mixture of modalities, numbers that go wrong, states that move."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks(folder, stage):
    said = start_ranks(["-m", "tests.train.zero_cases", str(folder), str(stage)], ranks=2, timeout=300)
    for text in said:
        rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"case"')]
        assert len(rows) == 2 * len(CASES) + 3, text[-2000:]
        for row in rows:
            name = row.pop("case")
            if "gradient" in row:
                assert row["gradient"] <= 1e-6 * max(row["scale"], 1) and row["loss"] <= 1e-6, (name, row)
                assert row["finite"]
            else:
                assert all(row.values()), (name, row)
