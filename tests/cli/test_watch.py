"""`mmit run-status`: how far a run is, which rank stands still, and what of its files cannot be read."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mmit.train.monitor.heartbeat import Beat, path_of
from mmit.train.monitor.run_files import BEST, EVENTS, METRICS, RUN
from tests.cli.commands import assert_one_message, good, mmit


def step(number: int, **changes: Any) -> dict[str, Any]:
    row = {"step": number, "loss": 2.5, "tokens": 10, "seconds": 3.0, "tokens_per_s": 40.0}
    return row | {"skipped_steps": 0, "bad_records": 0} | changes


def lines(path: Path, *rows: Any) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def beat(run: Path, rank: int, phase: str, *, since: float, seen: float = 0.0) -> None:
    """A heartbeat: `since` seconds in this phase, written `seen` seconds ago."""
    now, path = time.time(), path_of(run, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(Beat(rank, 7, phase, now - since, 3, now - seen, f"host{rank}", 100 + rank))))


def test_a_run_on_its_way(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text(json.dumps({"steps": 10}))
    evaluated = {"step": 4, "eval": {"x": 0.5, "y": None}, "eval_seconds": 1}
    lines(tmp_path / METRICS, step(3), step(4, seconds=5.0), evaluated)
    (tmp_path / BEST).write_text(json.dumps({"checkpoint": "step-000004", "metric": "x", "value": 0.5}))
    lines(tmp_path / EVENTS, *({"kind": kind, "step": 4} for kind in ("spike", "spike", "stalled", "another")))
    for name in ("step-000002", "step-000004"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    said = good("run-status", tmp_path).stdout.splitlines()
    assert said == [
        "step 4 of 10, loss 2.5000, 40 tokens/s",
        "about 24 s of steps left",  # six steps of the mean of what was logged
        "evaluation at step 4: x 0.5000",
        "best: step-000004, x 0.5000",
        "0 skipped steps, 2 loss spikes, 1 standstills (events.jsonl)",
        f"newest checkpoint: {tmp_path}/checkpoints/step-000004",
    ]


def test_a_run_at_its_end_and_one_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text(json.dumps({"steps": 4}))
    assert good("run-status", tmp_path).stdout == "no step logged yet of 4\n"
    lines(tmp_path / METRICS, step(4, loss=None))
    assert good("run-status", tmp_path).stdout == "step 4 of 4, loss not finite, 40 tokens/s\n"


@pytest.mark.parametrize(
    ("phase", "since", "seen", "told"),
    [
        ("forward", 5, 0, "forward of step 7"),
        ("forward", 400, 0, "stands still"),
        ("forward", 5, 400, "no sign of life for 400 s"),
        ("finished", 400, 400, "finished"),
        ("stopped", 400, 400, "stopped"),
        ("failed", 400, 400, "failed"),
    ],
)
def test_a_rank_stands_out_by_its_exit_code(tmp_path: Path, phase: str, since: int, seen: int, told: str) -> None:
    beat(tmp_path, 0, "forward", since=1)
    beat(tmp_path, 1, phase, since=since, seen=seen)
    found = mmit("run-status", tmp_path)
    stands = told in ("stands still", "no sign of life for 400 s")
    assert found.exit_code == stands and told in found.stdout and "host1" in found.stdout and "101" in found.stdout
    assert ("stands still" in found.stdout or "no sign of life" in found.stdout) == stands
    assert mmit("run-status", tmp_path, "--stall", 1000).exit_code == 0


def test_damaged_lines_are_named_and_not_more_than_five_one_by_one(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text("{")
    lines(tmp_path / METRICS, step(1), *["broken"] * 6, step(8))
    found = good("run-status", tmp_path)
    told = found.stderr.splitlines()
    assert len(told) == 6 and RUN in told[0] and "line 2 is left out: it is no JSON" in told[1]
    assert told[-1] == "warning: 2 more lines are left out"
    assert found.stdout.startswith("step 8 of ?, loss 2.5000")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for command in ("run-status", "report"):
        assert_one_message(mmit(command, tmp_path), "holds neither metrics.jsonl nor checkpoints", "run.dir")
        assert_one_message(mmit(command, tmp_path / "gone"), "no such folder")
    assert not list(tmp_path.iterdir())
