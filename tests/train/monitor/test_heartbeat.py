"""A rank that stops has a name, and what it was doing."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from mmit.cli import app
from mmit.train.monitor.heartbeat import Beat, Heartbeat, Watch, read_beats


def beat(rank: int, moves: int, *, at: float, step: int = 12, phase: str = "data loading") -> Beat:
    return Beat(rank, step, phase, 0.0, moves, at, "node", 100 + rank)


def test_the_rank_that_the_others_wait_for_is_named_once_and_again_after_twice_as_long():
    watch = Watch(world=3, stall=10.0)
    told = []
    for second in range(60):
        beats = {r: beat(r, 7 if r == 1 else 9, at=float(second)) for r in range(3)}
        told += [(second, *t) for t in watch.look(beats, now=float(second), every=1.0)]
    assert [(second, rank) for second, rank, *_ in told] == [(10, 1), (20, 1), (40, 1)]
    assert "rank 1 (node, process 101) has been in data loading of step 12 for 10 s" in told[0][2]
    assert "2 other ranks" in told[0][2] and told[0][3]["phase"] == "data loading"


def test_a_rank_that_gives_no_sign_of_life_is_told_so():
    watch, told = Watch(world=2, stall=10.0), []
    for second in range(13):
        beats = {0: beat(0, 9, at=float(second)), 1: beat(1, 9, at=min(float(second), 2.0))}
        told += watch.look(beats, now=float(second), every=1.0)
    messages = {rank: message for rank, message, _ in told}
    assert "no sign of life" in messages[1] and "stopped or gone" in messages[1]
    assert "no sign" not in messages[0]


def test_ranks_that_move_or_are_done_are_left_alone():
    watch = Watch(world=2, stall=5.0)
    for second in range(30):
        beats = {0: beat(0, second, at=float(second)), 1: beat(1, 3, at=0.0, phase="finished")}
        assert watch.look(beats, now=float(second), every=1.0) == []


def test_a_long_phase_that_works_is_no_standstill_until_the_work_stops():
    watch, told = Watch(world=2, stall=10.0), []
    for second in range(60):
        # Rank 0 measures for 40 seconds while rank 1 waits for it, then hangs; both are in the same phase.
        beats = {r: beat(r, 3, at=float(second), phase="measuring the data") for r in range(2)}
        beats[0] = replace(beats[0], works=min(second, 40))
        told += [(second, rank) for rank, *_ in watch.look(beats, now=float(second), every=1.0)]
    assert min(told) == (50, 0)


def test_a_rank_that_hangs_where_others_work_is_told_once_they_have_gone_on():
    watch, told = Watch(world=2, stall=10.0), []
    for second in range(40):
        beats = {0: beat(0, 3, at=float(second)), 1: beat(1, 4 if second > 20 else 3, at=float(second))}
        beats[1] = replace(beats[1], works=min(second, 20))
        told += [(second, rank) for rank, *_ in watch.look(beats, now=float(second), every=1.0)]
    assert told[0] == (21, 0)


def test_signs_of_work_are_written(tmp_path):
    heart = Heartbeat(tmp_path, rank=0, world=1, stall=60.0, report=lambda *_: None)
    heart.phase("measuring the data", 0)
    heart.work()
    heart.close("stopped")
    assert read_beats(tmp_path)[0].works == 1


def rank_process(folder: Path, rank: int) -> int:
    """Fork a rank that goes through phases until it is killed; it writes what it reports to a file."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(60)
        report = folder / f"report-{rank}"
        heart = Heartbeat(
            folder,
            rank=rank,
            world=2,
            stall=1.0,
            report=lambda text, facts: report.write_text(json.dumps({"text": text, **facts})),
            every=0.05,
        )
        step = 0
        while True:
            step += 1
            for phase in ("data loading", "forward and backward"):
                heart.phase(phase, step)
                time.sleep(0.01)
    finally:
        os._exit(0)


def wait_for(path: Path) -> dict:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if path.exists() and path.stat().st_size:
            return json.loads(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{path.name} never came")


def test_a_stopped_process_is_named_by_the_other(tmp_path):
    """In two runs at the same time: rank 0 watches rank 1, and rank 1 watches rank 0."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    children = [rank_process(folder, rank) for folder in (one, other) for rank in (0, 1)]
    try:
        until = time.monotonic() + 30
        while len(read_beats(one)) + len(read_beats(other)) < 4 and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)
        assert not (one / "report-0").exists() and not (other / "report-1").exists()
        os.kill(children[1], signal.SIGSTOP)
        os.kill(children[2], signal.SIGSTOP)
        told = wait_for(one / "report-0")
        assert told["rank"] == 1 and told["pid"] == children[1] and told["silent"]
        assert told["phase"] in ("data loading", "forward and backward") and told["step"] > 1
        assert f"{told['phase']} of step {told['step']}" in told["text"]
        status = CliRunner().invoke(app, ["run-status", str(one), "--stall", "1"], env={"COLUMNS": "160"})
        assert status.exit_code == 1 and "stands still" in status.output and f"of step {told['step']}" in status.output
        assert wait_for(other / "report-1")["rank"] == 0
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_no_heartbeat_is_kept_where_none_is_wanted(tmp_path):
    heart = Heartbeat(tmp_path, rank=0, world=1, stall=None, report=lambda text, facts: None)
    heart.phase("data loading", 1)
    heart.close("finished")
    assert not list(tmp_path.iterdir())
