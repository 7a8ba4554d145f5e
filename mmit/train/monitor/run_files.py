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
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from mmit.io import append, write_atomic

METRICS, EVENTS, RUN, BEST, HEARTBEATS = "metrics.jsonl", "events.jsonl", "run.json", "best.json", "heartbeats"

NEEDED = ("loss", "tokens", "seconds", "tokens_per_s", "skipped_steps", "bad_records")  # of a step, by what reads them
_BY_NAME = ("eval", "loss_of", "supervised_of", "weight_of", "lr_of")  # an object of numbers
_NEVER_NULL = ("step", *(name for name in NEEDED if name != "loss"))  # a loss that is not finite is null


def plain(value: Any) -> Any:
    """Numbers that are not finite become null: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with a step of a JSONL file, [] where there is none; a line that is still being written is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class Metrics(NamedTuple):
    """What metrics.jsonl tells: rows of steps and of evaluations, a sentence for each line that is neither."""

    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    left_out: list[str]


def read_metrics(run_dir: Path) -> Metrics:
    """Read RUN/metrics.jsonl, empty where there is none. A last line without an end is still being written.

    A disk that was full, a power cut or an editor leaves damaged lines. Each is left out and told, since a curve with a
    hole looks like one without.
    """
    found = Metrics([], [], [])
    path = run_dir / METRICS
    # Only what ends a line for whoever wrote it, and bytes that are no UTF-8 spoil their own line alone.
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        row, problem = _metrics_row(line)
        if problem and number == len(lines):
            continue  # of a run that is writing, or was killed in the middle of a line
        if problem:
            found.left_out.append(f"{METRICS}, line {number} is left out: {problem}")
        else:
            (found.evals if "eval" in row else found.steps).append(row)
    return found


def _metrics_row(line: bytes) -> tuple[dict[str, Any], str]:
    """A row, and what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}, "it is no JSON"
    if not isinstance(row, dict):
        return {}, "it is no JSON object"
    needed = ("step", "eval", "eval_seconds") if "eval" in row else ("step", *NEEDED)
    if missing := [name for name in needed if name not in row]:
        return {}, f"it has no '{missing[0]}'"
    for name, value in row.items():
        inner = value.values() if isinstance(value, dict) and name in _BY_NAME else (value,)
        if not all(x is None or _finite(x) for x in inner):
            return {}, f"'{name}' is no finite number"
        if value is None and name in _NEVER_NULL:
            return {}, f"'{name}' is null"
    for name in _BY_NAME:
        if not isinstance(row.get(name, {}), dict):
            return {}, f"'{name}' is no JSON object"
    return ({}, "'step' is no whole number") if not isinstance(row["step"], int) else (row, "")


def _finite(value: Any) -> bool:
    """Whether it is a number that a curve has a place for: JSON allows NaN here, and integers beyond any float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def note_event(run_dir: Path, row: dict[str, Any]) -> None:
    """Add a line with its time to events.jsonl."""
    append(run_dir / EVENTS, json.dumps(plain({"time": round(time.time(), 1), **row})) + "\n")


# What readers take from these files: a type, a list of one shape, or an object; a key with "?" may be absent or null.
_NUMBER = (int, float)
_FACTS = {"records": int, "bad": int, "supervised": int, "pictures": int, "sources": [dict]}
SHAPES: dict[str, Any] = {
    RUN: {
        "steps?": int,
        "starts?": [{"time": _NUMBER, "step": int}],
        "parameters?": [dict],
        "hardware?": dict,
        "versions?": dict,
        "train?": _FACTS,
        "eval?": _FACTS,
    },
    BEST: {"checkpoint": str, "metric": str, "value": _NUMBER},
    HEARTBEATS: {
        **dict.fromkeys(("rank", "step", "moves", "pid"), int),
        **dict.fromkeys(("since", "time"), _NUMBER),
        **dict.fromkeys(("phase", "host"), str),
    },
}


def read_json(path: Path, shape: str) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none or it is damaged; `shape` is a key of SHAPES."""
    return read_whole(path, shape)[0]


def read_whole(path: Path, shape: str) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and a sentence if it is damaged; {} then, and where there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError):
        return {}, f"{path.name} is left out: it is no JSON"
    wrong = _misfit(value, SHAPES[shape])
    return ({}, f"{path.name} is left out: {wrong}") if wrong else (value, "")


def _misfit(value: Any, shape: Any, name: str = "it") -> str:
    """What of a value is not of a shape, "" if it fits."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        return next((wrong for item in value if (wrong := _misfit(item, shape[0], f"an entry of {name}"))), "")
    if not isinstance(shape, dict):
        fits = isinstance(value, shape) and not isinstance(value, bool) and (shape is dict or _plain(value))
        kind = {dict: "JSON object", str: "text"}.get(shape, "number")
        return "" if fits else f"{name} is no {kind}"
    if not isinstance(value, dict):
        return f"{name} is no JSON object"
    for key, inner in shape.items():
        bare = key.removesuffix("?")
        if bare not in value and bare == key:
            return f"{name} has no '{bare}'"
        held = value.get(bare)
        if (held is not None or bare == key) and (wrong := _misfit(held, inner, f"'{bare}'")):
            return wrong
    return ""


def _plain(value: Any) -> bool:
    return isinstance(value, str) or _finite(value)


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write a file that appears whole; with `sync` also when the power goes."""
    write_atomic(path, json.dumps(plain(value), indent=1), sync=sync)
