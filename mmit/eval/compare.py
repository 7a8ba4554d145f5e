"""Two evaluations of the same questions, question by question: is one model better, and by how much.

In: two folders of results (or files of answers). Out: per task the paired difference with its 95 % interval and
p-value: McNemar's exact test where every verdict is right or wrong, a paired bootstrap otherwise; where questions share
images, both count images. Refuses answers to different questions; never compares two means of different samples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mmit.errors import MmitError
from mmit.eval.answers import TUNED, scored_answers
from mmit.eval.metrics import PairedDifference, mcnemar, paired_bootstrap, paired_clusters
from mmit.records import json_lines

_SAME = ("reference", "group")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Model A and model B on one task; `difference` (A minus B) is None where answers have no verdicts of their own."""

    task: str
    n: int
    value_a: float | None
    value_b: float | None
    test: str
    difference: PairedDifference | None
    only_in_a: int = 0
    only_in_b: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, seed: int = 0, resamples: int = 10_000
) -> list[Comparison]:
    """Compare all tasks that both folders have.

    Args:
        a, b: folders of results, with one or several tasks, or files of answers.
        seed, resamples: of the bootstrap.

    Raises:
        MmitError: no task in common, or a question that differs between the two.
    """
    files_a, files_b = _files(Path(a)), _files(Path(b))
    common = [name for name in files_a if name in files_b]
    if not common:
        problem = f"no task in common: {', '.join(files_a) or 'none'} and {', '.join(files_b) or 'none'}"
        remedy = f"Give two folders of `mmit eval`, or two files {TUNED}."
        raise MmitError(problem, where=f"{a} and {b}", remedy=remedy)
    return [_compare(name, files_a[name], files_b[name], seed=seed, resamples=resamples) for name in sorted(common)]


def _files(path: Path) -> dict[str, Path]:
    """Return the files of answers in a folder, by task."""
    found = [path] if path.is_file() else sorted(path.rglob(TUNED)) if path.is_dir() else []
    by_task: dict[str, Path] = {}
    for file in found:
        first = next(json_lines(file), (0, None))[1]
        task = first.get("task") if isinstance(first, dict) else None
        if not isinstance(task, str):
            raise MmitError("not a file of answers", where=str(file), remedy="Run `mmit eval` again.")
        if task in by_task:
            problem = f"task '{task}' is there twice, also as {by_task[task]}"
            raise MmitError(problem, where=str(file), remedy="Name the folder of one of them.")
        by_task[task] = file
    return by_task


def _compare(task: str, path_a: Path, path_b: Path, *, seed: int, resamples: int) -> Comparison:
    rows_a, rows_b = scored_answers(path_a), scored_answers(path_b)
    # By question, never by position: either may have been asked a sample, or have been sampled otherwise.
    both = [name for name in rows_a if name in rows_b]
    for name in both:
        changed = [key for key in _SAME if rows_a[name][key] != rows_b[name][key]]
        if changed:
            problem = f"question '{name}' is not the same in {path_b}: {', '.join(changed)} differ"
            raise MmitError(problem, where=str(path_a), remedy="Evaluate both models on the same data.")
    judged = [name for name in both if rows_a[name]["correct"] is not None and rows_b[name]["correct"] is not None]
    left = {"only_in_a": len(rows_a) - len(both), "only_in_b": len(rows_b) - len(both)}
    if not judged:
        note = "the metric has no verdict on single answers" if both else "no question in common"
        return Comparison(task, len(both), None, None, "none", None, note=note, **left)
    values_a, values_b = ([float(rows[name]["correct"]) for name in judged] for rows in (rows_a, rows_b))
    means = sum(values_a) / len(judged), sum(values_b) / len(judged)
    asked_otherwise = sum(rows_a[name]["prompt"] != rows_b[name]["prompt"] for name in judged)
    note = f"{asked_otherwise:,} questions were worded differently" if asked_otherwise else ""
    images = ["\n".join(rows_a[name].get("images", ())) or name for name in judged]
    if len(set(images)) < len(images):
        test = "paired, by image"
        found = paired_clusters(values_a, values_b, images, seed=seed, resamples=resamples)
    elif all(value in (0, 1) for value in (*values_a, *values_b)):
        test, found = "McNemar", mcnemar([v == 1 for v in values_a], [v == 1 for v in values_b])
    else:
        test, found = "paired bootstrap", paired_bootstrap(values_a, values_b, seed=seed, resamples=resamples)
    return Comparison(task, len(judged), *means, test, found, note=note, **left)


def cells(one: Comparison) -> tuple[str, ...]:
    """Return the cells of a comparison: task, n, A, B, difference, interval, p, test."""
    if one.difference is None or one.value_a is None or one.value_b is None:
        return (one.task, f"{one.n:,}", "-", "-", "-", "-", "-", one.note)
    found = one.difference
    scale = 100 if max(abs(one.value_a), abs(one.value_b)) <= 1 else 1
    low, high = found.ci95
    p = "< 0.0001" if found.p < 0.0001 else f"{found.p:.4f}"
    numbers = [f"{scale * value:.1f}" for value in (one.value_a, one.value_b)]
    numbers += [f"{scale * found.difference:+.1f}", f"{scale * low:+.1f} to {scale * high:+.1f}", p]
    return (one.task, f"{one.n:,}", *numbers, one.test)


HEAD = ("task", "n", "A", "B", "A - B", "95 % interval", "p", "test")


def markdown(found: Sequence[Comparison]) -> str:
    """Return comparisons as a Markdown table."""
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 2), "---"), *map(cells, found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def console_table(found: Sequence[Comparison]) -> Table:
    """Return comparisons as a rich table."""
    table = Table()
    for place, column in enumerate(HEAD):
        table.add_column(column, justify="right" if 0 < place < len(HEAD) - 1 else "left")
    for one in found:
        table.add_row(*map(Text, cells(one)))
    return table


def notes(found: Sequence[Comparison]) -> list[str]:
    """Return what a reader should know: questions that only one of the two answered, other wordings."""
    lines = []
    for one in found:
        if one.only_in_a or one.only_in_b:
            left = f"{one.only_in_a} that only A answered, {one.only_in_b} that only B answered"
            lines.append(f"{one.task}: left out are {left}.")
        if one.note and one.difference is not None:
            lines.append(f"{one.task}: {one.note}.")
    return lines
