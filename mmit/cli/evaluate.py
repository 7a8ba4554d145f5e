"""`mmit eval`: a trained model's score on a task, beside its baselines."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_TASK = "easy_vqa"


def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder, or one of its checkpoints.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help=f"Name or YAML of a task; may be repeated. (default: {DEFAULT_TASK})"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions asked, a fixed seeded sample. (default: the task's)")
    ] = None,
    *,
    baseline_n: Annotated[
        int, typer.Option(min=1, help="Questions asked of the untuned model and with a blank image.")
    ] = 500,
    baselines: Annotated[bool, typer.Option(help="Score the baselines too.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=f"Folder of the results. (default: RUN/eval, of other tasks than {DEFAULT_TASK} RUN/eval/TASK)",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. (default: as trained)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop answers on file and start anew.")] = False,
    data_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where a task's relative paths start. (default: its folder)")
    ] = None,
) -> None:
    """Score a trained model on tasks and write a report.

    Beside it stand three baselines: the majority answer of each question, the untuned model (the same base with a
    fresh projector and no adapter), and the tuned model that is shown a blank image. Answers are kept as they come,
    so that an evaluation that was cut off goes on where it stopped.
    """
    from mmit.eval.tasks import load_task

    tasks = [load_task(name, data_root=data_root) for name in task or [DEFAULT_TASK]]

    from mmit.eval.report import run_task
    from mmit.generate import load
    from mmit.train.checkpoint import MANIFEST, find

    checkpoint = find(run, warn=lambda text: typer.echo(text, err=True))
    model = load(checkpoint, device=device, dtype=dtype)
    mark = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16]
    for one in tasks:
        folder = results_folder(run, one.name, out, alone=len(tasks) == 1)
        run_task(
            model,
            untuned_factory=lambda: load(checkpoint, device=device, dtype=dtype, untuned=True),
            task=one,
            out_dir=folder,
            flat=True,
            model_name=str(checkpoint),
            fingerprint=mark,
            sample=limit,
            baseline_n=baseline_n if baselines else 0,
            batch_size=batch_size,
            overwrite=overwrite,
        )


def results_folder(run: Path, task: str, out: Path | None, *, alone: bool) -> Path:
    """Say where a task's results go; `alone`: it is the only one.

    A checkpoint inside a run gets a folder of its own beside those of the run's other checkpoints.
    """
    if out is not None:
        return out if alone else out / task
    base = run / "eval"
    if run.resolve().parent.name == "checkpoints":
        base = run.resolve().parents[1] / "eval" / run.name
    return base if task == DEFAULT_TASK else base / task
