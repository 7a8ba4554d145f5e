"""What a run writes while it runs: `metrics.jsonl`, the progress line and `loss.png`. Rank 0 only."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class RunLog:
    """Metrics file, progress bar and messages of a run; silent where `active` is False."""

    def __init__(self, folder: Path, *, active: bool, total: int, start: int) -> None:
        self.folder, self.active = folder, active
        self.console = Console(stderr=True)
        self._file = None
        self._progress: Progress | None = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _keep_before(path, start)
        self._file = open(path, "a", encoding="utf-8")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=2 if self.console.is_terminal else 0.05,
        )
        self._task = self._progress.add_task("training", total=total, completed=start, facts="")
        self._progress.start()

    def step(self, row: dict[str, Any], *, write: bool) -> None:
        """Record one optimizer step; `write` also puts it into metrics.jsonl."""
        if self._progress is None or self._file is None:
            return
        if write:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._file.write(json.dumps(finite) + "\n")  # JSON has no NaN
            self._file.flush()
        facts = f"loss {row['loss']:.4f} lr {row['lr']:.1e} {row['tokens_per_s']:.0f} tok/s {row['memory_gib']:.1f} GiB"
        self._progress.update(self._task, completed=row["step"], facts=facts)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar, close the file, draw the curve."""
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
            draw_loss(self.folder / "metrics.jsonl", self.folder / "loss.png")


def _keep_before(path: Path, start: int) -> None:
    """Drop rows that a resumed run will write again (and a half-written last line)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    draft = path.with_name(f".{path.name}.draft")  # a kill in the middle of writing must not cost the rows
    draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    draft.replace(path)


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draw loss (with a running mean) and learning rate over steps."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if r["loss"] is not None]  # steps that were skipped
    if not rows:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r["step"] for r in rows]
    losses = [r["loss"] for r in rows]
    mean, means = losses[0], []
    for value in losses:
        mean += 0.05 * (value - mean)
        means.append(mean)
    figure = Figure(figsize=(7, 4), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="loss")
    axes.plot(steps, means, color="#1f4e79", linewidth=1.6, label="running mean")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(0, max(sorted(losses)[int(0.99 * (len(losses) - 1))] * 1.1, 1e-3))
    other = axes.twinx()
    other.plot(steps, [r["lr"] for r in rows], color="#c97b2c", linewidth=0.8, linestyle="--")
    other.set_ylabel("learning rate", color="#c97b2c")
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(picture)
