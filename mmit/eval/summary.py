"""Several tasks in one report: a table to paste into a paper, as Markdown, LaTeX, JSON and HTML.

In: a model and tasks. Out: each task's own report, and summary.json, .md, .tex and .html beside them. Never averages
over tasks, whose metrics are not of one kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text

from mmit.eval.baselines import USUAL, Beside, Subject, check_wordings, some_of
from mmit.eval.metrics import check_installed
from mmit.eval.questions import check_images
from mmit.eval.report import run_task, section_of
from mmit.eval.runner import AS_STATED, How
from mmit.eval.tasks import Item, Task, asked_of, sample_items
from mmit.io import write_atomic
from mmit.pages import page, table
from mmit.text import escape, plain, terminal

HEAD = ("task", "metric", "score", "95 % interval", "n", "majority", "chance", "blank", "swapped", "valid", "wordings")


def check_tasks(tasks: Sequence[tuple[Task, Sequence[Item]]], beside: Beside, *, sample: int | None) -> None:
    """Find what would end the evaluation later, before a model is loaded; no picture is opened.

    Args:
        tasks: each task with all its questions. beside: what will stand beside the scores.
        sample: questions that are asked of each, as in `How`.

    Raises:
        ConfigError: a task has not so many wordings. ImageError: a picture is not there. MmitError: a package is not.
    """
    for task, items in tasks:
        check_installed(task.metric, [item.reference for item in items])
        asked = asked_of(task, items, sample=sample, seed=task.seed)
        check_images(asked)
        if beside.n:
            check_images(some_of(asked, items, n=beside.n, seed=task.seed))
        if beside.n and beside.templates:
            check_wordings(task, items, beside.templates)


def run_tasks(
    subject: Subject,
    tasks: Sequence[tuple[Task, Sequence[Item]]],
    *,
    folder_of: Callable[[Task], Path],
    summary_in: Path | None,
    metric_of: Callable[[Task, Path], Any] = lambda task, folder: None,
    beside: Beside = USUAL,
    how: How = AS_STATED,
) -> list[dict[str, Any]]:
    """Evaluate a model on tasks and return their reports.

    Args:
        subject: what is evaluated.
        tasks: each task with all its questions.
        folder_of: says where a task's results go.
        summary_in: folder of the summary; None writes none.
        metric_of: gives the metric of a task that a judge grades, None for the task's own.
        beside, how: as in `run_task`.
    """
    console = how.console or terminal(quiet=how.ranks.rank > 0)
    summarise = summary_in is not None and how.ranks.rank == 0
    reports, sections = [], []
    for task, items in tasks:
        folder = folder_of(task)
        own = replace(how, metric=metric_of(task, folder), console=console)
        report = run_task(subject, task, items=items, out_dir=folder, beside=beside, how=own)
        reports.append(report)
        if summarise:
            asked = sample_items(items, report["n_asked"], report["seed"])
            sections.append(section_of(report, folder, asked))
    if summary_in is not None and summarise:
        write_summary(reports, sections, summary_in)
        # As Markdown, unbroken: a table that a terminal folds cannot be pasted.
        console.print(Text(f"\n{markdown(reports)}"), soft_wrap=True)
        console.print(Text(f"Written to {summary_in}: summary.md, .tex, .json, .html"))
    return reports


def row(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a report's cells, one per entry of HEAD; "-" where there is nothing."""
    percent = all(0 <= x <= 1 for x in (report["accuracy"], *report["ci95"]))

    def number(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"

    def arm(part: Mapping[str, Any] | None) -> str:
        return "-" if part is None else number(part["accuracy"])

    low, high = report["ci95"]
    baselines, spread = report["baselines"], report["wordings"]
    wordings = "-"
    if spread:
        ratio = "" if spread["sensitivity"] is None else f" (s {spread['sensitivity']:.2f})"
        wordings = f"{number(spread['min'])} to {number(spread['max'])}{ratio}"
    return (
        report["task"],
        report["metric"],
        number(report["accuracy"]),
        f"{number(low)} to {number(high)}",
        f"{report['n']:,}",
        arm(baselines["majority"]),
        arm(report["chance"]),
        arm(baselines["blank_image"]),
        arm(report["swapped_images"]),
        f"{100 * report['valid_rate']:.1f}",
        wordings,
    )


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the summary as Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in [HEAD, *map(row, reports)]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    left = [place < 2 for place in range(len(HEAD))]
    ruler = ["-" * width if first else "-" * (width - 1) + ":" for width, first in zip(widths, left, strict=True)]
    padded = [
        [
            cell.ljust(width) if first else cell.rjust(width)
            for cell, width, first in zip(line, widths, left, strict=True)
        ]
        for line in cells
    ]
    lines = ["| " + " | ".join(line) + " |" for line in [padded[0], ruler, *padded[1:]]]
    return "\n".join([*lines, "", *_caption(reports)]) + "\n"


def latex(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the scores and what they must beat as a LaTeX table (booktabs)."""
    columns = [0, 2, 4, 5, 6, 7]
    lines = ["\\begin{tabular}{lrrrrr}", "\\toprule"]
    for number, cells in enumerate([HEAD, *map(row, reports)]):
        lines.append(" & ".join(_tex(cells[column]) for column in columns) + " \\\\")
        lines += ["\\midrule"] if number == 0 else []
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *(f"% {line}" for line in _caption(reports))]) + "\n"


def _tex(text: str) -> str:
    return "".join(f"\\{sign}" if sign in "_%&#$" else sign for sign in text)


def _caption(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    first = reports[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    note = "Scores in percent where they are shares; valid: answers in a form that the metric can read."
    seeds = ", ".join(sorted({str(report["seed"]) for report in reports}))
    return [note, f"Model {first['model']}, seed {seeds}, {versions}, {first['created']}."]


def write_summary(reports: Sequence[Mapping[str, Any]], sections: Sequence[str], folder: Path) -> None:
    """Write summary.json, .md, .tex and .html, each whole or not at all. Raises MmitError."""
    content = {"model": reports[0]["model"], "tasks": list(reports)}
    write_atomic(folder / "summary.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "summary.md", plain(markdown(reports)))
    write_atomic(folder / "summary.tex", plain(latex(reports)))
    lines = [f'<p class="small">{escape(line)}</p>' for line in _caption(reports)]
    links = " · ".join(f'<a href="#{escape(report["task"])}">{escape(report["task"])}</a>' for report in reports)
    top = "".join(["<h1>Evaluation</h1>", table([HEAD, *map(row, reports)]), *lines, f"<p>{links}</p>"])
    write_atomic(
        folder / "summary.html", page(f"Evaluation of {reports[0]['model']}", top, *sections, kind="evaluation")
    )
