"""The trainer's half of a checkpoint: random state and progress come back, later checkpoints step aside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mmit.train.checkpoint import resume
from mmit.train.loop import Progress


def engine(rank: int = 0, world: int = 1) -> Any:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    facts = {"rank": rank, "world": world, "device": torch.device("cpu"), "optimizer": optimizer}
    return SimpleNamespace(**facts, load_state=lambda folder: None)


def saved(folder: Path, progress: Progress, *, rank: int = 0, world: int = 1) -> Path:
    (folder / "trainer").mkdir(parents=True, exist_ok=True)
    resume.TrainerState.of(engine(rank, world), progress, order={"rows": 3}).write(folder)
    return folder


def test_random_numbers_go_on_where_they_stood(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.rand(17)
    folder = saved(tmp_path, Progress(step=4))
    expected = torch.rand(9)
    torch.rand(100)
    resume.restore(engine(), folder, seed=5, say=lambda text: None)
    assert torch.equal(torch.rand(9), expected)


def test_each_rank_has_its_own(tmp_path: Path) -> None:
    expected = []
    for rank in range(2):
        torch.manual_seed(100 + rank)
        saved(tmp_path, Progress(step=4), rank=rank, world=2)
        expected.append(torch.rand(3))
    for rank in (1, 0):
        resume.restore(engine(rank, 2), tmp_path, seed=0, say=lambda text: None)
        assert torch.equal(torch.rand(3), expected[rank])
    assert not torch.equal(*expected)


def test_another_number_of_ranks_is_announced_and_seeds_anew(tmp_path: Path) -> None:
    told: list[str] = []
    resume.restore(engine(), saved(tmp_path, Progress(step=4), world=2), seed=7, say=told.append)
    ours = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(ours, torch.rand(3)) and "1 ranks what 2 began" in told[0]


def test_every_number_of_the_progress_comes_back(tmp_path: Path) -> None:
    progress = Progress(step=7, tokens=8, supervised=9, skipped_steps=1, bad=[4, 2], bad_run=3, bad_in_a_row=2)
    progress.spikes, progress.recent, progress.evaluated, progress.best = 5, [1.5, 2.5], 6, {"step": 6, "value": 0.5}
    folder = saved(tmp_path, progress)
    assert resume.restore(engine(), folder, seed=0, say=lambda text: None) == progress
    assert resume.order_of(folder) == {"rows": 3}
    assert resume.restore(engine(), None, seed=0, say=lambda text: None) == Progress()


def test_later_checkpoints_are_set_aside_and_earlier_ones_stay(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    for step in (2, 4, 6, 8):
        (parent / f"step-{step:06d}").mkdir(parents=True)
    (parent / "superseded-step-000008").mkdir()
    told: list[str] = []
    resume.set_aside_later(tmp_path, 4, say=told.append)
    names = {path.name for path in parent.iterdir()}
    kept = {"step-000002", "step-000004", "superseded-step-000006", "superseded-step-000008"}
    assert names == kept | {"superseded-step-000008.1"}
    assert len(told) == 2 and "set step-000006 aside as superseded-step-000006" in told[0]
    resume.set_aside_later(tmp_path, 4, say=told.append)
    assert len(told) == 2


def test_keep_last_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    for step in (2, 4, 6, 8, 10):
        (parent / f"step-{step:06d}").mkdir(parents=True)
    resume.prune(tmp_path, 2, best=4, say=lambda text: None)
    assert sorted(path.name for path in parent.iterdir()) == ["step-000004", "step-000008", "step-000010"]
