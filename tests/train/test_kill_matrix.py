"""Fifty kills with dropout, over loader workers, packing and ranks: each run that went on equals the one that did not.

Ranks are forked, so that a start takes a moment and not the half minute that importing everything takes.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmit.config import Config
from mmit.train.checkpoint import folders
from tests.tiny_run import DROPOUT
from tests.tiny_run import two_layers as tiny_config
from tests.train.launch import free_port
from tests.train.test_kill import end, losses, start, tensors

KILLS = 50
CASES = [*itertools.product([1, 2], [True, False], [0, 2])]  # ranks, packing, workers


def config_of(folder: Path, name: str, *, ranks: int, packing: bool, workers: int) -> Config:
    return tiny_config(
        folder,
        run={"dir": str(folder / name), "resume": "auto"},
        train={"epochs": 12, "steps": None, "save_every": 7, "rows_per_step": 4, "micro_rows": 2, "precision": "fp32"},
        data={**tiny_config(folder).data.model_dump(), "workers": workers, "packing": packing},
        tune=DROPOUT,
    )


def import_deepspeed() -> None:
    """Once, before the forks."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401


def start_all(config: Config, ranks: int, *, before: Callable[[], None] = lambda: None) -> list[int]:
    """Fork the run's ranks; the launcher's variables are those of the child alone, and so is what `before` does."""
    if ranks == 1:
        return [start(config, before=before)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    shared |= {"DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": str(ranks)}
    children = []
    for rank in range(ranks):
        kept = dict(os.environ)
        os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        try:
            children.append(start(config, before=before))
        finally:
            os.environ.clear()
            os.environ.update(kept)
    return children


def finish(children: list[int]) -> list[int]:
    return [end(child) for child in children]


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()[-3000:]


def equal(ours: Path, theirs: Path) -> None:
    assert losses(ours) == losses(theirs)
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def seen(folder: Path) -> int:
    """Micro-batches that the ranks of a run began, over all of its starts."""
    path = folder / "trace.jsonl"
    return sum(line.startswith("[") for line in path.read_text().splitlines()) if path.exists() else 0


def killed_once(config: Config, rng: random.Random, *, ranks: int, micros: int) -> bool:
    """Start a run, kill it a moment after one of its micro-batches; False where it was over before."""
    folder = Path(config.run.dir)
    wanted = seen(folder) + rng.randrange(1, micros)
    children = start_all(config, ranks)
    deadline = time.monotonic() + 120
    while seen(folder) < wanted and time.monotonic() < deadline:
        if any(os.waitid(os.P_PID, c, os.WEXITED | os.WNOHANG | os.WNOWAIT) for c in children):
            break
        time.sleep(0.002)
    time.sleep(rng.choice([0, 0, rng.uniform(0, 0.05)]))
    for child in rng.sample(children, ranks):
        os.kill(child, signal.SIGKILL)
    return 0 not in finish(children)


def kills(folder: Path, rng: random.Random, *, ranks: int, packing: bool, workers: int, wanted: int) -> int:
    """Kill runs until `wanted` kills hit, each run up to three times; compare every one with a run that nothing hit."""
    made = {"ranks": ranks, "packing": packing, "workers": workers}
    name = f"{ranks}-{packing}-{workers}"
    assert finish(start_all(config_of(folder, name, **made), ranks)) == [0] * ranks, log(folder / name)
    micros, hits, number = seen(folder / name), 0, 0
    while hits < wanted:
        killed = f"{name}-killed-{number}"
        config, number = config_of(folder, killed, **made), number + 1
        for _ in range(min(3, wanted - hits)):
            if not killed_once(config, rng, ranks=ranks, micros=micros // 2):
                break
            hits += 1
        assert finish(start_all(config, ranks)) == [0] * ranks, log(folder / killed)
        assert folders.newest(folder / killed) is not None
        equal(folder / killed, folder / name)
    return hits


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "packing", "workers"), CASES)
def test_fifty_kills_of_every_kind(ranks, packing, workers, tmp_path):
    if ranks > 1:
        pytest.importorskip("deepspeed")
        import_deepspeed()
    number = CASES.index((ranks, packing, workers))
    wanted = KILLS // len(CASES) + (number < KILLS % len(CASES))
    rng = random.Random(5 + number)
    assert kills(tmp_path, rng, ranks=ranks, packing=packing, workers=workers, wanted=wanted) == wanted
