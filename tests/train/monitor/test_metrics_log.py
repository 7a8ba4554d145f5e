"""Metrics of a run: what a resumed one writes again is dropped before, and the curve is drawn of what is left."""

from __future__ import annotations

import json
from pathlib import Path

from mmit.train.monitor.metrics_log import RunLog, draw_loss, scalars
from mmit.train.monitor.run_files import read_rows
from tests.train.monitor.test_run_files import GOOD, WITHOUT


def test_a_run_that_goes_on_tells_what_it_drops(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(WITHOUT) + "\n" + json.dumps(GOOD | {"lr": 1e-3}) + "\n")
    log = RunLog(tmp_path, active=True)
    log.begin(total=4, start=3)
    log.step(GOOD | {"step": 4, "lr": 1e-3, "memory_gib": 1.0}, write=True)
    log.close()
    assert "line 1 is left out: it has no 'loss'" in capsys.readouterr().err
    assert (tmp_path / "loss.png").exists()


def test_rows_after_the_checkpoint_are_written_once_and_a_half_line_is_dropped(tmp_path: Path) -> None:
    rows = [GOOD | {"step": step, "lr": 0.1} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    (tmp_path / "events.jsonl").write_text('{"step": 2, "kind": "spike"}\n{"step": 5, "kind": "spike"}\n')
    log = RunLog(tmp_path, active=True)
    log.begin(total=9, start=3)
    for step in (4, 5):
        log.step(GOOD | {"step": step, "lr": 0.2, "memory_gib": 1.0}, write=step == 4)
    log.event(4, "spike", loss=float("nan"))
    log.close()
    assert [(row["step"], row["lr"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2)
    ]  # fmt: skip
    events = read_rows(tmp_path / "events.jsonl")
    assert [event["step"] for event in events] == [2, 4] and events[1]["loss"] is None


def test_a_rank_that_is_not_the_first_writes_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", active=False)
    log.begin(total=4, start=0)
    log.step(GOOD | {"step": 1, "lr": 0.1, "memory_gib": 1.0}, write=True)
    log.evaluation(1, {"score": 1.0}, seconds=1.0)
    log.event(1, "spike")
    log.close()
    assert not (tmp_path / "run").exists()


def test_numbers_of_a_row_have_one_name_each() -> None:
    row = {"step": 3, "loss": 0.5, "loss_of": {"a": 1, "b/c": 2.0}, "text": "x", "eval": {"step": 7}}
    assert dict(scalars(row)) == {"loss": 0.5, "loss_of/a": 1, "loss_of/b/c": 2.0, "eval/step": 7}


def test_a_curve_needs_two_steps_and_skips_what_has_no_loss(tmp_path: Path) -> None:
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text(json.dumps({"step": 1, "loss": 1.0, "lr": 0.1}) + '\n{"step": 2, "loss": null, "lr": 0.1}\n')
    draw_loss(metrics, picture)
    assert not picture.exists()
    with metrics.open("a") as file:
        file.write('{"step": 3, "loss": 0.5, "lr": 0.1}\n')
    draw_loss(metrics, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
