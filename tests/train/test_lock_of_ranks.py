"""While ranks train in a folder, another start there is refused on all of its ranks, and the first goes on unharmed."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pytest

from mmit.train.run import LOCK
from tests.tiny_run import tiny_config
from tests.train.test_kill import losses
from tests.train.test_kill_matrix import finish, import_deepspeed, log, start_all


@pytest.mark.slow
@pytest.mark.parametrize("others", [1, 2])
def test_a_start_beside_two_ranks_is_refused_on_every_rank(tmp_path: Path, others: int) -> None:
    pytest.importorskip("deepspeed")
    import_deepspeed()
    config = tiny_config(tmp_path, run={"resume": "auto"}, train={"epochs": 12, "steps": None, "save_every": 7})
    folder = tmp_path / "run"
    first = start_all(config, 2)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints").exists() or not list((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline and not any(os.waitpid(c, os.WNOHANG)[0] for c in first), log(folder)
        time.sleep(0.01)
    owner = json.loads((folder / LOCK).read_text())
    assert owner["pid"] == first[0]
    assert finish(start_all(config, others)) == [99] * others
    refusal = f"ConfigError: {folder}: another run is writing here: process {first[0]} on {platform.node()}"
    assert (folder / "log.txt").read_text().count(refusal) == others
    assert finish(first) == [0, 0], log(folder)
    assert not (folder / LOCK).exists()
    steps = [step for step, _ in losses(folder)]
    assert steps == list(range(1, len(steps) + 1)) and (folder / "finished.json").exists()
