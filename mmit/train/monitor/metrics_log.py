"""What a run writes while it runs: `metrics.jsonl`, `events.jsonl`, the progress line, `loss.png`. Rank 0 only.

Hands every row to the trackers (TensorBoard, W&B) too. After a resume the files read as if nothing had happened: rows
of steps that will run again are dropped first.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mmit.io import append, unless_failing, whole_file, write_atomic
from mmit.text import plain as shown
from mmit.text import terminal
from mmit.train.monitor.run_files import EVENTS, METRICS, note_event, plain, read_metrics, read_rows

if TYPE_CHECKING:
    from mmit.train.monitor.trackers import Tracker


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class RunLog:
    """Metrics file, events file, progress bar and messages of a run; silent where `active` is False."""

    def __init__(self, folder: Path, *, active: bool, trackers: Iterable[Tracker] = ()) -> None:
        self.folder, self.active = folder, active
        self.console = terminal(stderr=True)
        self._trackers = list(trackers) if active else []
        self._begun = False
        self._progress: Progress | None = None

    def begin(self, *, total: int, start: int) -> None:
        """Go on after step `start` of `total`."""
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Before `_keep_before` writes the files anew, without them.
        for line in read_metrics(self.folder).left_out:
            self.say(f"warning: {line}")
        for name in (METRICS, EVENTS):
            _keep_before(self.folder / name, start)
        for tracker in self._trackers:
            tracker.begin(start)
        self._begun = True
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
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
        if self._progress is None:
            return
        if write:
            self._write(row)
        facts = f"loss {row['loss']:.4f} lr {row['lr']:.1e} {row['tokens_per_s']:.0f} tok/s {row['memory_gib']:.1f} GiB"
        self._progress.update(self._task, completed=row["step"], facts=facts)

    def evaluation(self, step: int, results: Mapping[str, float], *, seconds: float) -> None:
        """Record what an evaluation gave: a row {"step", "eval", "eval_seconds"} of metrics.jsonl."""
        if not self._begun:
            return
        self._write({"step": step, "eval": dict(results), "eval_seconds": seconds})
        told = ", ".join(f"{name} {value:.4f}" for name, value in results.items())
        self.say(f"evaluation at step {step}: {told or 'no result'}")

    def _write(self, row: dict[str, Any]) -> None:
        append(self.folder / METRICS, json.dumps(plain(row)) + "\n")
        for tracker in self._trackers:
            tracker.log(row["step"], {shown(name): value for name, value in scalars(row)})

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Add a line to events.jsonl: a step that was skipped, a spike, a rank that stands still."""
        if self.active:
            note_event(self.folder, {"step": step, "kind": kind, **facts})

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar, draw the curve. Raises WriteError, unless another error is under way."""
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._trackers:
            with unless_failing():
                tracker.close()
        if self._begun:
            with unless_failing():
                draw_loss(self.folder / METRICS, self.folder / "loss.png")


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row under one name each: `loss_of.NAME` becomes "loss_of/NAME"."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not (name == "step" and not prefix):
            yield f"{prefix}{name}", value


def _keep_before(path: Path, start: int) -> None:
    """Drop rows that a resumed run will write again (and a half-written last line)."""
    if not path.exists():
        return
    # Steps after the checkpoint run again; both courses in one file would draw a curve that goes back in time.
    kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= start]
    write_atomic(path, "".join(line + "\n" for line in kept))


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draw loss (with a running mean) and learning rate over steps; nothing of fewer than two steps."""
    # Neither skipped steps nor evaluations, nor damaged rows, which the report names.
    rows = [r for r in read_rows(metrics) if all(isinstance(r.get(key), (int, float)) for key in ("loss", "lr"))]
    if len(rows) < 2:
        return
    steps = [r["step"] for r in rows]
    losses = [r["loss"] for r in rows]
    mean, means = losses[0], []
    for value in losses:
        mean += 0.05 * (value - mean)
        means.append(mean)
    figure, lines = _empty_curve()
    for line, values in zip(lines, (losses, means, [r["lr"] for r in rows]), strict=True):
        line.set_data(steps, values)
    for axes in figure.axes:
        axes.relim()
        axes.autoscale_view()
    # Up to the highest but for a hundredth of them: the first steps would press all others against the axis.
    figure.axes[0].set_ylim(0, max(sorted(losses)[int(0.99 * (len(losses) - 1))] * 1.1, 1e-3))
    with whole_file(picture, sync=False) as file:
        paint(figure, file)


def paint(figure: Any, file: Any) -> None:
    """Write a matplotlib figure into an open file as PNG."""
    figure.savefig(file, format="png", pil_kwargs={"compress_level": 3})


@functools.cache  # axes and their ticks cost as much as the drawing: made once for all runs of a process
def _empty_curve() -> tuple[Any, list[Any]]:
    """A figure and its lines without points: loss, running mean, learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.81, 0.81))  # measured once: tight_layout draws everything twice
    lines = axes.plot([], [], color="#9bb8d3", linewidth=0.8, label="loss")
    lines += axes.plot([], [], color="#1f4e79", linewidth=1.6, label="running mean")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    other = axes.twinx()
    lines += other.plot([], [], color="#c97b2c", linewidth=0.8, linestyle="--")
    other.set_ylabel("learning rate", color="#c97b2c")
    other.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))  # short labels: the axes have a fixed place
    axes.legend(loc="upper right")
    axes.locator_params(nbins=6)
    other.locator_params(axis="y", nbins=6)
    for axis, place in ((axes.xaxis, (0.5, -0.08)), (axes.yaxis, (-0.08, 0.5)), (other.yaxis, (1.09, 0.5))):
        axis.set_label_coords(*place)  # else each drawing measures every tick's label first
    return figure, lines
