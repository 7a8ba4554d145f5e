"""The report of a run: one HTML file that needs nothing beside it, made of what the run folder holds.

Curves, evaluations, what went wrong, data, parameters, hardware, versions, config. Works on a run that is under way,
was killed, or never took a step; needs no torch. Everything that comes from data or configs is escaped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.io import write_atomic
from mmit.pages import page, table
from mmit.text import escape
from mmit.train.monitor.curves import Series, figure, smooth
from mmit.train.monitor.run_files import BEST, EVENTS, RUN, read_metrics, read_rows, read_whole

NAME = "report.html"
SHOWN = 50  # rows of a long table


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what the run folder holds now; returns its path."""
    steps, evals, left_out = read_metrics(run_dir)
    events = read_rows(run_dir / EVENTS)
    run, damaged = read_whole(run_dir / RUN, RUN)
    best, worse = read_whole(run_dir / BEST, BEST)
    left_out += [problem for problem in (damaged, worse) if problem]
    # In the order in which somebody looks who was away: where it stands, how it went, what went wrong, what it was.
    sections = [
        f"<h1>{escape(run_dir.resolve().name)}</h1>",
        _summary(run_dir, run, best, steps),
        _section("Curves", f'<div class="curves">{_curves(steps, evals)}</div>' if steps else ""),
        _section("Evaluation", _evaluations(evals) + _benchmarks(run_dir)),
        _section("What went wrong", _left_out(left_out) + _events(events) + _bad_records(run_dir)),
        _section("Data", _data(run)),
        _section("Parameters", _table(run.get("parameters") or [])),
        _section("Hardware and versions", _pairs(run.get("hardware") or {}) + _pairs(run.get("versions") or {})),
        _section("Config", _config(run_dir)),
    ]
    text = page(run_dir.resolve().name, *sections, kind="run")
    write_atomic(run_dir / NAME, text, sync=False)
    return run_dir / NAME


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _summary(run_dir: Path, run: Mapping[str, Any], best: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    facts: dict[str, Any] = {}
    if steps:
        last, total = steps[-1], run.get("steps")
        state = "finished" if (run_dir / "finished.json").exists() else "not finished"
        facts["state"] = f"{state}, step {last['step']}" + (f" of {total}" if total else "")
        facts["loss"] = _number(last["loss"])
        facts["tokens"] = f"{sum(r['tokens'] for r in steps):,} in the steps logged"
        facts["seconds in steps"] = _number(sum(r["seconds"] for r in steps))
        facts["skipped steps, loss spikes"] = f"{last['skipped_steps']}, {last.get('spikes', 0)}"
        facts["bad records while training"] = last["bad_records"]
    if best:
        facts["best checkpoint"] = f"{best['checkpoint']}: {best['metric']} {_number(best['value'])}"
    starts = run.get("starts") or []
    if starts:
        when = [time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(s["time"])) for s in starts]
        facts["started"] = "; ".join(f"{t} from step {s['step']}" for t, s in zip(when, starts, strict=True))
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    note = "" if steps else "<p>No step has been logged yet.</p>"
    return f'{note}{_pairs(facts)}<p class="small">Written {written} from {escape(str(run_dir))}.</p>'


def _curves(steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> str:
    def of(*keys: str) -> Series:
        out = []
        for row in steps:
            value: Any = row
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            out.append((row["step"], value))
        return out

    loss = of("loss")
    # On one axis: that training falls and the held-out loss does not is what the curve is looked at for.
    losses: dict[str, Series] = {"loss": loss, "running mean": smooth(loss)}
    if any("eval_loss" in r["eval"] for r in evals):
        losses["eval_loss"] = [(r["step"], r["eval"].get("eval_loss")) for r in evals]
    sources = list(dict.fromkeys(name for row in steps for name in row.get("loss_of", {})))
    rates = list(dict.fromkeys(name for row in steps for name in row.get("lr_of", {})))
    parts = [figure("loss per supervised token", losses, faint=True)]
    if len(sources) > 1:
        parts.append(figure("loss by source, running mean", {s: smooth(_known(of("loss_of", s))) for s in sources}))
    parts.append(figure("learning rate", {r: of("lr_of", r) for r in rates} or {"lr": of("lr")}))
    parts.append(figure("gradient norm before clipping", {"norm": of("grad_norm")}))
    both = {"tokens": smooth(of("tokens_per_s")), "supervised tokens": smooth(of("supervised_per_s"))}
    parts.append(figure("tokens per second, running mean", both))
    parts.append(figure("fill of the rows", {"fill": of("fill")}))
    parts.append(figure("peak memory, GiB", {"memory": of("memory_gib")}))
    parts += [
        figure(name, {name: [(r["step"], r["eval"].get(name)) for r in evals]}, from_zero=False)
        for name in dict.fromkeys(k for r in evals for k in r["eval"] if k != "eval_loss")
    ]
    return "".join(parts)


def _known(series: Series) -> Series:
    return [p for p in series if p[1] is not None]


def _evaluations(evals: Sequence[Mapping[str, Any]]) -> str:
    rows = [{"step": r["step"], **r["eval"], "seconds": r["eval_seconds"]} for r in evals]
    return _table(rows[-SHOWN:]) if rows else ""


def _benchmarks(run_dir: Path) -> str:
    """Reports that `mmit eval` left in the run folder."""
    parts = []
    for path in sorted(run_dir.glob("eval*/**/report.json")):
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        reports = found if isinstance(found, list) else [found]
        for report in reports:
            if isinstance(report, dict):
                name = escape(f"{report.get('task', path.parent.name)} ({path.relative_to(run_dir)})")
                # As it is: a report says more than any table here, and of one task other things than of another.
                text = escape(json.dumps(report, indent=1, ensure_ascii=False)[:20000])
                parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _left_out(lines: Sequence[str]) -> str:
    """Damaged lines and files, which no curve and no sum of this report holds."""
    title = f"<h3>Damaged lines and files: {len(lines)}</h3>"
    return title + table([[line] for line in lines[:SHOWN]], kind="left", head=False) if lines else ""


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for kind, title in (("skipped", "Skipped steps"), ("spike", "Loss spikes"), ("stalled", "Standstills")):
        mine = [{k: v for k, v in e.items() if k not in ("kind", "time")} for e in events if e.get("kind") == kind]
        if mine:
            parts.append(f"<h3>{title}: {len(mine)}</h3>{_table(mine[-SHOWN:])}")
    return "".join(parts)


def _bad_records(run_dir: Path) -> str:
    rows: list[Any] = []
    for path in sorted(run_dir.glob("bad_records*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # a line that is being written
                continue
            if isinstance(row, dict):
                rows.append({"file": path.name, **row})
    title = f"<h3>Bad records: {len(rows)}" + (f", the first {SHOWN}" if len(rows) > SHOWN else "") + "</h3>"
    return title + _table(rows[:SHOWN]) if rows else ""


def _data(run: Mapping[str, Any]) -> str:
    parts = []
    for part, title in (("train", "to train on"), ("eval", "held out")):
        if facts := run.get(part):
            totals = f"{facts['records']:,} records ({facts['bad']} bad), {facts['supervised']:,} supervised tokens"
            parts.append(f"<p>Sources {title}: {totals}, {facts['pictures']:,} pictures.</p>{_table(facts['sources'])}")
    return "".join(parts)


def _config(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    return f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>" if path.exists() else ""


def _pairs(facts: Mapping[str, Any]) -> str:
    rows = [(str(key), _number(value)) for key, value in facts.items()]
    return table(rows, kind="left", head=False) if rows else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_number(row.get(name, "")) for name in names] for row in rows]
    return table([list(map(str, names)), *cells], kind="left")


def _number(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
