"""Small files of a run folder: their names, rows read while they are being written, JSON that appears whole.

    metrics.jsonl        a row for each step, and one for each evaluation
    events.jsonl         steps that were skipped, loss spikes, ranks that stood still
    run.json             what was started: versions, hardware, data, parameters, one entry for each start
    best.json            the best checkpoint (train.keep_best)
    heartbeats/          what each rank is doing

Needs no torch, so that commands which only look at a run start at once.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from mmit.io import append, write_atomic

METRICS, EVENTS, RUN, BEST, HEARTBEATS = "metrics.jsonl", "events.jsonl", "run.json", "best.json", "heartbeats"


def plain(value: Any) -> Any:
    """Numbers that are not finite become null: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with a step of a JSONL file, [] where there is none; a line that is still being written is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def note_event(run_dir: Path, row: dict[str, Any]) -> None:
    """Add a line with its time to events.jsonl."""
    append(run_dir / EVENTS, json.dumps(plain({"time": round(time.time(), 1), **row})) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write a file that appears whole; with `sync` also when the power goes."""
    write_atomic(path, json.dumps(plain(value), indent=1), sync=sync)
