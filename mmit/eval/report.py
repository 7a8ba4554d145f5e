"""From a model and a task to a report: the score beside its baselines, as JSON, Markdown, HTML and a table.

In: the tuned model, a way to build the untuned one, a Task. Out: report.json, report.md, report.html, and one file
of answers per model. Every number comes with its n and 95 % interval; a baseline that does not exist is null and says
why, it is never left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

import mmit
from mmit.eval.answers import TUNED
from mmit.eval.baselines import LABELS, MORE, USUAL, Baselines, Beside, Subject, no_baselines, run_baselines
from mmit.eval.metrics.score import PER_ANSWER
from mmit.eval.page import section
from mmit.eval.runner import AS_STATED, How, Result, evaluate
from mmit.eval.tasks import Item, Task, asked_of, task_items
from mmit.io import write_atomic
from mmit.pages import page
from mmit.records import short
from mmit.text import plain, terminal

if TYPE_CHECKING:
    from mmit.eval.metrics import Score

COLUMNS = ("answers by", "score", "95 % interval", "questions", "invalid")


def run_task(
    subject: Subject,
    task: Task,
    *,
    out_dir: str | os.PathLike[str],
    items: Sequence[Item] | None = None,
    beside: Beside = USUAL,
    how: How = AS_STATED,
) -> dict[str, Any]:
    """Evaluate a model, then the baselines, write the report, print it, and return it.

    Args:
        subject: what is evaluated.
        task: what is asked.
        out_dir: folder of the results.
        items: all questions of the task, if they have been read already.
        beside: which baselines, probes and wordings stand beside the score.
        how: how questions are asked and scored.

    Raises what `task_items` and `evaluate` do.
    """
    start, before = time.monotonic(), ledger_of(subject.model, how.metric)
    seed = task.seed if how.seed is None else how.seed
    folder = Path(out_dir)
    items = task_items(task.model_copy(update={"sample": None})) if items is None else list(items)
    asked = asked_of(task, items, sample=how.sample, seed=seed)
    console = how.console or terminal(quiet=how.ranks.rank > 0)
    count = f"{len(asked):,} of {len(items):,} questions"
    console.print(Text(f"{task.name}: {count}, the first asked as: {short(asked[0].text, 400)!r}"))
    tuned = evaluate(subject.model, task, subject.arm(), items=asked, out_dir=folder, how=how)
    found = no_baselines()
    if beside.n:
        found = run_baselines(subject, task, items=items, asked=asked, out_dir=folder, beside=beside, how=how)
    seconds = time.monotonic() - start
    report = build_report(task, tuned, found, model=subject.name, seed=seed, seconds=seconds)
    report |= {"fingerprint": subject.fingerprint, "number_format": subject.number_format}
    report |= {"first_question": asked[0].text, "n_asked": len(asked)}
    if after := ledger_of(subject.model, how.metric):
        report["ledger"] = {who: {key: n - before[who][key] for key, n in one.items()} for who, one in after.items()}
    if how.ranks.rank == 0:
        write_report(report, folder, notes=report["notes"])
        title = f"{task.name}: {subject.name}"
        whole = page(title, section_of(report, folder, asked), kind="evaluation")
        write_atomic(folder / "report.html", whole)
    console.print(console_table(report, notes=report["notes"]))
    console.print(Text(f"Written to {folder}"))
    return report


def ledger_of(*askers: Any) -> dict[str, dict[str, float]]:
    """Return teacher -> account of an endpoint and a judge as they stand now, {} where neither is asked.

    It counts what this process sent: answers on file cost nothing again.
    """
    return {one.teacher.name: asdict(one.account) for one in askers if hasattr(one, "account")}


def build_report(
    task: Task, tuned: Result, beside: Baselines, *, model: str, seed: int, seconds: float
) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        tuned, beside: the model's result, and those it stands beside.
        model: its name, as the report gives it. seed: of samples and intervals.
        seconds: what it all took, less what was on file.
    """
    details = {key: value for key, value in tuned.score.details.items() if key not in PER_ANSWER}
    images = details.pop("interval_by_image", None)
    by_type = {name: _numbers(score) for name, score in sorted(tuned.score.by_group.items())}
    arms = {key: result and _with_invalid(result) for key, result in beside.results.items()}
    return {
        **_with_invalid(tuned),
        "interval_by": "question" if images in (None, tuned.score.n) else "image",
        "images": images,
        "valid_rate": 1 - tuned.invalid_rate,
        "by_type": by_type,
        "details": json.loads(json.dumps(details, default=str)),
        "baselines": {key: arms[key] for key in LABELS},
        **{key: arms[key] for key in MORE},
        "wordings": beside.wordings,
        "notes": dict(beside.notes) | thought_notes(tuned),
        "task": task.name,
        "metric": task.metric,
        "profile": tuned.score.profile,
        "prompt": task.prompt,
        "task_config": task.model_dump(exclude_defaults=True),
        "seed": seed,
        "model": model,
        "versions": {"mmit": mmit.__version__} | {name: _version(name) for name in ("torch", "transformers")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def thought_notes(result: Result) -> dict[str, str]:
    """Say that thoughts were cut off before scoring, where there were some."""
    if not result.thoughts:
        return {}
    return {"thoughts": f"{result.thoughts:,} of {result.score.n:,} answers began with a thought, which is not scored"}


def _numbers(score: Score) -> dict[str, Any]:
    return {"accuracy": score.value, "ci95": list(score.ci95), "n": score.n}


def _with_invalid(result: Result) -> dict[str, Any]:
    return _numbers(result.score) | {"invalid_rate": result.invalid_rate}


def _version(package: str) -> str | None:
    """Return the version of a package without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def section_of(report: Mapping[str, Any], folder: Path, items: Sequence[Item]) -> str:
    """Return the report as a part of an HTML page, with the worst of the answers in `folder`."""
    cells = [COLUMNS, *rows(report)]
    caption = list(_caption(report, report.get("notes")))
    return section(report, cells, folder / TUNED, items=items, caption=caption, number=number_of(report))


def write_report(report: Mapping[str, Any], folder: Path, *, notes: Mapping[str, str] | None = None) -> None:
    """Write report.json and report.md into `folder`, each whole or not at all. Raises MmitError."""
    write_atomic(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "report.md", plain(markdown(report, notes=notes)))


def rows(report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows, one text per column of COLUMNS: the model, its types, the baselines."""
    number = number_of(report)
    of_type = _number(list(report["by_type"].values()))  # MME's sums are made of shares

    def row(name: str, part: Mapping[str, Any] | None, number: Callable[[float], str] = number) -> tuple[str, ...]:
        if part is None:
            return (name, "-", "-", "-", "-")
        score, low, high = map(number, (part["accuracy"], *part["ci95"]))
        invalid = part.get("invalid_rate")
        share = "" if invalid is None else f"{100 * invalid:.1f} %"
        return (name, score, f"{low} to {high}", f"{part['n']:,}", share)

    yield row("tuned model", report)
    for name, part in report["by_type"].items():
        yield row(f"- {name}", part, of_type)
    for key, name in LABELS.items():
        yield row(name, report["baselines"][key])
    for key, name in MORE.items():
        if report.get(key) is not None:
            yield row(name, report[key])


def number_of(report: Mapping[str, Any]) -> Callable[[float], str]:
    """Return how the report's scores are written: shares in percent; sums such as MME's as they are."""
    arms = [report, *report["baselines"].values(), *(report.get(key) for key in MORE)]
    return _number([part for part in arms if part is not None])


def _number(parts: Sequence[Mapping[str, Any]]) -> Callable[[float], str]:
    if all(0 <= x <= 1 for part in parts for x in (part["accuracy"], *part["ci95"])):
        return _percent
    return "{:.2f}".format


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def measures(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and text of the metric's further numbers: POPE's F1, MME's sums, BLEU beside CIDEr."""
    details, sums = report.get("details", {}), number_of(report) is not _percent
    for key, value in details.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        share = isinstance(value, float) and 0 <= value <= 1 and not (sums and value == 0)
        texts = [_percent(x) if share else f"{x:,.4g}" for x in (value, *details.get(f"{key}_ci95", ()))]
        name = {"f1": "F1", "cider": "CIDEr"}.get(key, key.replace("_", " "))
        yield name, texts[0] + (f" ({texts[1]} to {texts[2]})" if len(texts) == 3 else "")


def _caption(report: Mapping[str, Any], notes: Mapping[str, str] | None) -> Iterator[str]:
    """Yield the lines under the table: what was measured, and what is special."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    more = ", ".join(f"{name} {text}" for name, text in measures(report))
    if more:
        yield f"{report['profile']}: {more}."
    spread = report.get("wordings")
    if spread:
        ratio = spread["sensitivity"]
        shown = "none, since the mean is 0" if ratio is None else f"{ratio:.3f}"
        low, mean, high = (number_of(report)(spread[key]) for key in ("min", "mean", "max"))
        yield f"{len(spread['each'])} wordings: mean {mean}, min {low}, max {high}, sensitivity {shown}."
    if report.get("interval_by") == "image":
        yield f"Intervals count {report['images']:,} images, not questions: those about one image go together."
    yield f"Model {report['model']}, metric {report['metric']}, seed {report['seed']}."
    yield f"{report['created']}, {report['seconds']:.0f} s, {versions}."
    for key, note in (notes or {}).items():
        yield f"{(LABELS | MORE).get(key, key).capitalize()}: {note}."


def markdown(report: Mapping[str, Any], *, notes: Mapping[str, str] | None = None) -> str:
    """Return the report as Markdown, its table ready to be pasted."""
    lines = [f"## {report['task']}", "", _line(COLUMNS), _line(("---", *["---:"] * (len(COLUMNS) - 1)))]
    lines += [_line(row) for row in rows(report)]
    lines += ["", *(f"{line}  " for line in _caption(report, notes))]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: tuple[str, ...]) -> str:
    # Names of types come from data: a bar in one would be read as a new cell.
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def console_table(report: Mapping[str, Any], *, notes: Mapping[str, str] | None = None) -> Table:
    """Return the report as a rich table."""
    # Text objects, since the names of types and models may hold square brackets, which rich takes for styles.
    caption = Text("\n".join(_caption(report, notes)))
    table = Table(title=report["task"], caption=caption, caption_justify="left")
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if place else "left")
    for place, cells in enumerate(rows(report)):
        table.add_row(*map(Text, cells), style="bold" if place == 0 else "")
    return table
