"""A run that is killed, stopped or moved goes on as if nothing had happened: bit for bit, no record lost or doubled."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmit.train.run as run_module
from mmit.config import Config
from mmit.train.checkpoint import folders, resume
from mmit.train.checkpoint import model as checkpoint
from mmit.train.data.batches import TrainData
from mmit.train.monitor.metrics_log import _empty_curve
from mmit.train.run import EXIT_STOPPED
from tests.tiny_run import DROPOUT
from tests.tiny_run import two_layers as tiny_config


def start(config: Config, *, before: Callable[[], None] = lambda: None) -> int:
    """Fork a run; it writes which records each of its micro-batches held to `trace.jsonl`. The child calls `before`."""
    assert torch.get_num_threads() == 1, "a child would wait for its parent's OpenMP threads"
    _empty_curve()  # imports matplotlib, which each child would do again
    child = os.fork()
    if child:
        return child
    code = 99
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # What pytest put there is lost with the child.
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(240)
        torch.set_num_threads(1)  # makes torch's pool anew; threads that find the parent's would race to do so
        trace(folder / "trace.jsonl")
        before()
        code = run_module.run(config)
    finally:
        if code == 99:
            traceback.print_exc()
        os._exit(code)


def trace(path: Path) -> None:
    real_prepare, real_restore = TrainData.prepare, resume.restore
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def prepare(self, batch):
        os.write(file, (json.dumps(batch.records) + "\n").encode())
        return real_prepare(self, batch)

    def restore(*args, **rest):
        progress = real_restore(*args, **rest)
        os.write(file, (json.dumps({"step": progress.step}) + "\n").encode())
        return progress

    TrainData.prepare, resume.restore = prepare, restore


def consumed(folder: Path, micros: int) -> dict[int, list[list[int]]]:
    """Step -> records of its micro-batches, as they went into the surviving course of the run."""
    steps: dict[int, list[list[int]]] = {}
    step, batch = 0, 0
    for line in (folder / "trace.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if isinstance(entry, dict):
            step, batch = entry["step"], 0
            continue
        steps.setdefault(step, []) if batch else steps.update({step: []})
        steps[step].append(entry)
        batch += 1
        if batch == micros:
            step, batch = step + 1, 0
    return steps


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def losses(folder: Path) -> list[tuple[int, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["eval"] if "eval" in r else r["loss"]) for r in rows]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = folders.newest(run_dir)
    assert folder is not None
    files = ["projector.safetensors", "adapter/adapter_model.safetensors", "trainer/optimizer-00001.safetensors"]
    return {f"{f}:{k}": v for f in files for k, v in load_file(folder / f).items()}


class Course:
    """One uninterrupted run, and others that must equal it."""

    def __init__(self, folder: Path, *, epochs: int, save_every: int) -> None:
        self.folder, self.epochs, self.save_every = folder, epochs, save_every
        began = time.monotonic()
        assert end(start(self.config("straight"))) == 0, self.log("straight")
        self.seconds = time.monotonic() - began
        self.steps = len(losses(folder / "straight"))

    def config(self, name: str, *, workers: int = 0) -> Config:
        numbers = {"epochs": self.epochs, "steps": None, "save_every": self.save_every, "rows_per_step": 2}
        data = {**tiny_config(self.folder).data.model_dump(), "workers": workers}
        return tiny_config(
            self.folder,
            run={"dir": str(self.folder / name), "resume": "auto"},
            train={**numbers, "precision": "fp32", "threads": 1},
            tune=DROPOUT,
            data=data,
        )

    def log(self, name: str) -> str:
        return (self.folder / name / "log.txt").read_text()[-3000:]

    def equals(self, name: str) -> None:
        ours, theirs = self.folder / name, self.folder / "straight"
        assert losses(ours) == losses(theirs)
        a, b = tensors(ours), tensors(theirs)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert consumed(ours, 2) == consumed(theirs, 2)

    def kill_often(self, name: str, times: int, rng: random.Random) -> int:
        """Kill a run at random moments, `times` at most, then let it finish; return the kills that hit."""
        hits = 0
        while hits < times:
            child = start(self.config(name, workers=rng.choice([0, 0, 2])))
            time.sleep(rng.uniform(0.1, 0.9) * self.seconds * (0.5 if times > 1 else 1))
            os.kill(child, signal.SIGKILL)
            if end(child) != 0:
                hits += 1
            elif hits:  # it was faster than the uninterrupted run
                break
            else:
                self.seconds /= 2
                shutil.rmtree(self.folder / name)
        assert end(start(self.config(name))) == 0, self.log(name)
        return hits


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    return Course(tmp_path_factory.mktemp("course"), epochs=10, save_every=5)


def test_killed_three_times(course):
    assert course.kill_often("killed", 3, random.Random(0)) >= 1
    course.equals("killed")


def test_each_record_comes_once_an_epoch(course):
    steps = consumed(course.folder / "straight", 2)
    seen = Counter(r for micros in steps.values() for rows in micros for r in rows)
    assert len(seen) == 16 and set(seen.values()) == {course.epochs}


def resumed_at(course: Course, name: str, stops: list[int], workers: list[int]) -> None:
    for stop, count in zip([*stops, course.steps], workers, strict=True):
        config = course.config(name, workers=count)
        child = start(config)
        if stop == course.steps:
            assert end(child) == 0, course.log(name)
            break
        folder = course.folder / name
        while not (folder / "checkpoints" / f"step-{stop:06d}").exists():
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        end(child)
        for later in folders.checkpoints(folder):  # it may have come further
            if folders.step_of(later) > stop:
                shutil.rmtree(later)
    course.equals(name)


@pytest.mark.slow
def test_resumed_twice_with_other_workers(course):
    resumed_at(course, "resumed", [5, 10], [0, 2, 0])


def stopped(course: Course, name: str, moment: float) -> None:
    """SIGTERM at a share of the run, again a moment later; then go on."""
    child = start(course.config(name))
    time.sleep(moment * course.seconds)
    began = time.monotonic()
    os.kill(child, signal.SIGTERM)
    time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    code = end(child)
    assert time.monotonic() - began < 30
    assert code in (EXIT_STOPPED, 0), course.log(name)
    if code == EXIT_STOPPED and folders.checkpoints(course.folder / name):
        assert folders.newest(course.folder / name) == folders.checkpoints(course.folder / name)[-1]
    assert end(start(course.config(name))) == 0, course.log(name)
    course.equals(name)


def test_sigterm_inside_a_save_finishes_it_and_leaves(course, monkeypatch):
    real, seen = checkpoint.write_model, []

    def write(*args, **rest):
        real(*args, **rest)
        if not seen:
            seen.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "write_model", write)
    child = start(course.config("in-save"))
    assert end(child) == EXIT_STOPPED, course.log("in-save")
    monkeypatch.undo()
    assert [f.name for f in folders.checkpoints(course.folder / "in-save")] == ["step-000005"]
    assert len(losses(course.folder / "in-save")) == 5  # no step more than asked for
    assert end(start(course.config("in-save"))) == 0
    course.equals("in-save")


@pytest.fixture(scope="module")
def long_course(tmp_path_factory):
    course = Course(tmp_path_factory.mktemp("long"), epochs=80, save_every=10)
    assert course.steps >= 200
    return course


@pytest.mark.long
def test_killed_at_fifty_random_points(long_course):
    rng, hits, number = random.Random(1), 0, 0
    while hits < 50:
        name = f"killed-{number}"
        hits += long_course.kill_often(name, min(6, 50 - hits), rng)
        long_course.equals(name)
        number += 1


@pytest.mark.parametrize("points", [pytest.param(6, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.long)])
def test_stopped_at_random_points(long_course, points):
    rng = random.Random(points)
    for number in range(points):
        stopped(long_course, f"stopped-{number}-of-{points}", rng.uniform(0.02, 0.98))


@pytest.mark.slow
def test_resumed_thrice_in_an_epoch_and_at_its_edge_with_other_workers(long_course):
    """Step 10 lies in an epoch of a few steps, step 30 may be its edge."""
    resumed_at(long_course, "resumed", [10, 20, 30, 90], [0, 2, 1, 0, 2])
