"""`mmit run-status` and `mmit report`: look at a run from outside, while it runs or afterwards. Need no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mmit.errors import ConfigError
from mmit.text import echo, terminal

TOLD = 5  # damaged lines that are named one by one
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def report(run: Run) -> None:
    """Write RUN/report.html: curves, evaluations, what went wrong, data, hardware, config, in one file."""
    from mmit.train.monitor.report import write_report

    _must_be_run(run)
    _warn(run)
    echo(write_report(run))


def run_status(
    run: Run,
    *,
    stall: Annotated[float, typer.Option(min=0, help="Seconds in one phase after which a rank stands out.")] = 300.0,
) -> None:
    """Say how far a run is and what each of its ranks is doing. Exit code 1 when a rank stands still."""
    from rich.table import Table

    from mmit.train.monitor.heartbeat import OVER, SILENT, read_beats

    _must_be_run(run)
    _warn(run)
    for line in _progress(run):
        echo(line)
    table, now, still = Table("rank", "state", "for", "host", "process"), time.time(), False
    beats = read_beats(run)
    for rank, beat in sorted(beats.items()):
        seconds = max(now - (beat.time if beat.phase in OVER else beat.since), 0.0)
        # The clocks of other machines may differ by seconds; heartbeats come every few.
        silent = now - beat.time > max(stall, SILENT * 10.0)
        stands = beat.phase not in (*OVER, "failed") and (silent or seconds >= stall)
        still = still or stands
        state = beat.phase if beat.phase in (*OVER, "failed") else beat.doing
        if stands:
            state += f", no sign of life for {now - beat.time:.0f} s" if silent else ", stands still"
        table.add_row(str(rank), state, f"{seconds:.0f} s", beat.host, str(beat.pid))
    if beats:
        terminal().print(table)
    raise typer.Exit(1 if still else 0)


def _warn(run: Path) -> None:
    """Name the damaged lines and files, which what follows does not count."""
    from mmit.train.monitor.run_files import BEST, RUN, read_metrics, read_whole

    left_out = [problem for name in (RUN, BEST) if (problem := read_whole(run / name, name)[1])]
    left_out += read_metrics(run).left_out
    for line in left_out[:TOLD]:
        echo(f"warning: {line}", err=True)
    if len(left_out) > TOLD:
        echo(f"warning: {len(left_out) - TOLD} more lines are left out", err=True)


def _must_be_run(run: Path) -> None:
    known = ("metrics.jsonl", "run.json", "checkpoints", "heartbeats")
    if not any((run / name).exists() for name in known):
        what = "is no run: it holds neither metrics.jsonl nor checkpoints" if run.is_dir() else "no such folder"
        raise ConfigError(what, where=str(run), remedy="Give the run.dir of a run.")


def _progress(run: Path) -> Iterator[str]:
    from mmit.train.monitor.run_files import BEST, EVENTS, RUN, read_json, read_metrics, read_rows

    steps, evals, _ = read_metrics(run)
    total: Any = read_json(run / RUN, RUN).get("steps")
    if not steps:
        yield f"no step logged yet of {total}" if total else "no step logged yet"
        return
    last = steps[-1]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    yield f"step {last['step']} of {total or '?'}, loss {loss}, {last['tokens_per_s']:.0f} tokens/s"
    if total and last["step"] < total:
        recent = steps[-20:]
        span = sum(r["seconds"] for r in recent) / len(recent)
        yield f"about {span * (total - last['step']):.0f} s of steps left"
    if evals:
        told = ", ".join(f"{k} {v:.4f}" for k, v in evals[-1]["eval"].items() if v is not None)
        yield f"evaluation at step {evals[-1]['step']}: {told}"
    if best := read_json(run / BEST, BEST):
        yield f"best: {best['checkpoint']}, {best['metric']} {best['value']:.4f}"
    kinds = [e.get("kind") for e in read_rows(run / EVENTS)]
    if kinds:
        counts = {kind: kinds.count(kind) for kind in ("skipped", "spike", "stalled")}
        yield "{skipped} skipped steps, {spike} loss spikes, {stalled} standstills (events.jsonl)".format(**counts)
    if newest := sorted((run / "checkpoints").glob("step-*")):
        yield f"newest checkpoint: {newest[-1]}"
