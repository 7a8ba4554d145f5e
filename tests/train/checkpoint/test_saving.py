"""Saves in the background are those of the foreground, byte for byte, and as safe."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmit.config import Config
from mmit.errors import CheckpointError
from mmit.train.checkpoint import folders
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint.saving import Writer
from mmit.train.monitor.run_files import read_rows
from mmit.train.run import EXIT_STOPPED, run
from tests.tiny_run import two_layers as tiny_config


def config_of(folder: Path, name: str, *, background: bool, **train: Any) -> Config:
    numbers = {"steps": 12, "rows_per_step": 2, "save_every": 4, "keep_last": 9, "precision": "bf16", "threads": 1}
    place = {"dir": str(folder / name), "resume": "auto"}
    return tiny_config(folder, run=place, train=numbers | {"save_in_background": background} | train)


def steps_done(folder: Path) -> int:
    return len(read_rows(folder / "metrics.jsonl"))


def contents(run_dir: Path) -> dict[str, bytes]:
    """Every file of every checkpoint but the config, which names the run, and the manifest, which lists the config."""
    files = [p for folder in folders.checkpoints(run_dir) for p in folder.rglob("*") if p.is_file()]
    kept = [p for p in files if p.name not in ("config.yaml", "manifest.json")]
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in kept}


@pytest.mark.slow
def test_a_background_save_equals_a_foreground_one_while_training_goes_on(tmp_path, monkeypatch):
    assert run(config_of(tmp_path, "front", background=False)) == 0
    real, writers, ahead = checkpoint.write_model, set(), []

    def slow(draft, vlm, **rest):
        writers.add(threading.current_thread().name)
        assert len(list(draft.parent.glob(".*.draft"))) == 1  # never two at once
        until = time.monotonic() + 20
        while steps_done(tmp_path / "back") < min(rest["step"] + 3, 12) and time.monotonic() < until:
            time.sleep(0.005)
        ahead.append(steps_done(tmp_path / "back") - rest["step"])
        real(draft, vlm, **rest)

    monkeypatch.setattr(checkpoint, "write_model", slow)
    assert run(config_of(tmp_path, "back", background=True)) == 0
    assert len(writers) == 1 and threading.main_thread().name not in writers
    assert ahead == [3, 3, 0]
    front, back = contents(tmp_path / "front"), contents(tmp_path / "back")
    assert front.keys() == back.keys() and len(front) > 20
    assert [name for name in front if front[name] != back[name]] == []
    for found in folders.checkpoints(tmp_path / "back"):
        folders.verify(found)


def test_one_piece_of_work_at_a_time_and_its_error_once():
    writer, seen = Writer(), []
    hold = threading.Event()
    writer.submit(lambda: (hold.wait(5), seen.append(1)))
    threading.Timer(0.05, hold.set).start()
    writer.submit(lambda: seen.append(2))
    assert seen[0] == 1
    writer.wait()
    assert seen == [1, 2] and not writer.failed

    def fail() -> None:
        raise CheckpointError("no space")

    writer.submit(fail)
    for _ in range(100):
        if writer.failed:
            break
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="no space"):
        writer.submit(lambda: seen.append(3))
    writer.wait()
    assert seen == [1, 2]


def test_a_full_disk_in_the_background_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    real = checkpoint.write_model

    def full(draft, vlm, **rest):
        if rest["step"] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
        real(draft, vlm, **rest)

    monkeypatch.setattr(checkpoint, "write_model", full)
    config = config_of(tmp_path, "run", background=True, steps=400)
    with pytest.raises(CheckpointError, match="No space left") as error:
        run(config)
    assert "keep_last" in error.value.remedy
    assert steps_done(tmp_path / "run") < 13  # noticed at the latest when the next save is due
    assert folders.newest(tmp_path / "run").name == "step-000004"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def in_child(config: Config, moment: Any) -> int:
    """Run in a fork where `moment(step, draft)` is called in the middle of each save."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(120)
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 2)
            real = checkpoint.write_model

            def write(draft, vlm, **rest):
                real(draft, vlm, **rest)
                moment(rest["step"], draft)

            checkpoint.write_model = write
            code = run(config)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_kill_during_a_background_save_leaves_the_one_before(tmp_path):
    config = config_of(tmp_path, "killed", background=True)
    main = os.getpid()

    def kill(step, draft):
        if step == 8:
            assert os.getpid() != main and (draft / "projector.safetensors").exists()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(config, kill) == -signal.SIGKILL
    left = tmp_path / "killed" / "checkpoints"
    assert (left / ".step-000008.draft").exists()
    assert folders.newest(tmp_path / "killed").name == "step-000004"
    assert run(config) == 0
    assert run(config_of(tmp_path, "straight", background=False)) == 0
    ours, theirs = contents(tmp_path / "killed"), contents(tmp_path / "straight")
    assert [n for n in theirs if ours.get(n) != theirs[n]] == [] and not list(left.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_a_background_save_saves_and_leaves(tmp_path, number):
    config = config_of(tmp_path, "run", background=True)

    def stop(step, draft):
        if step == 4:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    assert in_child(config, stop) == EXIT_STOPPED
    newest = folders.checkpoints(tmp_path / "run")[-1]
    folders.verify(newest)
    assert 4 <= folders.step_of(newest) <= 8
    assert json.loads((newest / "trainer" / "progress.json").read_text())["step"] == folders.step_of(newest)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(tmp_path):
    config = config_of(tmp_path, "run", background=False)

    def stop(step, draft):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)  # sooner it counts as an echo of the first
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    began = time.monotonic()
    assert in_child(config, stop) == -signal.SIGTERM
    assert time.monotonic() - began < 18
    assert folders.newest(tmp_path / "run").name == "step-000004"
