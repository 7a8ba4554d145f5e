"""`mmit data check`: what is wrong with a data set, before an hour of training is spent on it.

Exit code 0 without errors, 1 with some (with --strict also with warnings), 2 if the check could not be made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmit.cli import sources
from mmit.cli.sources import (
    ChatOption,
    ConfigOption,
    File,
    FormatOption,
    ImageRootOption,
    ImageTokensOption,
    TokenizerOption,
)
from mmit.errors import MmitError
from mmit.io import write_atomic
from mmit.text import echo, plain, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from mmit.config import Config
    from mmit.data.lint.linter import Report
    from mmit.errors import RecordError
    from mmit.records import Record

EXIT_FOUND = 1
SHOWN = 3  # rows of each rule in the table; all of them are in the JSON
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}

DataArgument = Annotated[
    Path,
    typer.Argument(metavar="DATA_OR_CONFIG", help="A data file or shards (FILE#N: N of its records), or a YAML."),
]
TestOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Test data that must not be in there; may be repeated."),
]
MaxLengthOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Longest record in tokens. [default: the tokenizer's]")
]
JsonFileOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write every finding with its row as JSON.")
]


def check(
    data: DataArgument,
    *,
    format: FormatOption = None,
    image_root: ImageRootOption = None,
    test: TestOption = None,
    images: Annotated[bool, typer.Option("--images", help="Open every image, and compare them by content.")] = False,
    config: ConfigOption = None,
    tokenizer: TokenizerOption = None,
    chat: ChatOption = None,
    image_token: sources.ImageTokenOption = None,
    image_tokens: ImageTokensOption = None,
    max_length: MaxLengthOption = None,
    json_file: JsonFileOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors in the exit code.")] = False,
) -> None:
    """Check data: broken rows, doubtful text, duplicates, images, test data among it.

    Exit code 1 means that there are errors, 2 that the check could not be made.
    """

    from mmit.data.held import Held
    from mmit.data.lint.linter import lint

    settings = sources.settings_of(data, config)
    files = sources.files_of(data, settings, format=format, image_root=image_root)
    encoder = sources.encoder_of(
        settings,
        tokenizer=tokenizer,
        chat=chat,
        image_token=image_token,
        image_tokens=image_tokens,
        max_length=max_length,
    )
    held_out = _held_out(data, settings, test or [])
    held, kept = Held(), Counter[str]()
    with terminal(stderr=True).status("reading") as status:
        report = lint(
            sources.watched(held.watch(_rows(files, kept)), status.update),
            test=_rows(held_out),
            measure=None if encoder is None else encoder.length,
            differs=None if encoder is None else encoder.difference,
            max_length=None if encoder is None else encoder.max_length,
            control_tokens=() if encoder is None else encoder.control_tokens,
            open_images=images,
        )
    if not report.records:
        raise MmitError("there is no row", where=str(data), remedy="Check the file and its format.")
    if encoder is not None and encoder.image_tokens is None:
        report.not_checked["tokens of images"] = "--image-tokens was not given, so an image counts as one"
    report.read, report.kept = held.lines(), kept
    show(report, terminal(highlight=False))
    if json_file is not None:
        _write_json(report, json_file)
    if report.count("error") or (strict and report.count("warning")):
        raise typer.Exit(EXIT_FOUND)


def _held_out(data: Path, settings: Config | None, test: list[Path]) -> list[File]:
    given = [File(path) for path in test]
    if sources.is_config(data):
        section = sources.mixture_of(data) or (settings.data if settings is not None else None)
        given += sources.config_files(section.eval) if section is not None else []
    return given


def _rows(files: list[File], kept: Counter[str] | None = None) -> Iterator[Record | RecordError]:
    return chain.from_iterable(file.rows(kept) for file in files)


def show(report: Report, console: Console) -> None:
    """Print the findings by severity, what was not checked, and the counts."""
    from rich.table import Table
    from rich.text import Text

    from mmit.data.formats.keys import told
    from mmit.data.lint.rules import RULES, SEVERITIES

    table = Table("severity", "rule", "rows", "what, where, and what to do", header_style="bold", show_lines=True)
    table.columns[2].justify, table.columns[3].overflow = "right", "fold"
    names = [name for name in RULES if name in report.findings]
    order = sorted(names, key=lambda name: SEVERITIES.index(RULES[name].severity))
    for name in order:
        rule, rows = RULES[name], report.findings[name]
        what = Text(rule.about, "bold")
        for row in rows[:SHOWN]:
            what.append(f"\n  {plain(row.where)}: {plain(row.problem)}", "not bold")
        if len(rows) > SHOWN:
            what.append(f"\n  and {len(rows) - SHOWN:,} more", "not bold dim")
        what.append(f"\n{rule.remedy}", "not bold italic")
        table.add_row(Text(rule.severity, _STYLES[rule.severity]), name, f"{len(rows):,}", what)
    if report.findings:
        console.print(table)
    for line in report.read:
        console.print(Text(plain(line)))
    if report.kept:
        console.print(Text(plain(f"kept in meta only: {told(report.kept)}"), "yellow"))
    for what_not, why in report.not_checked.items():
        console.print(Text(f"not checked: {what_not} ({why})", "dim"))
    licences = ", ".join(f"{name} {count:,}" for name, count in report.licences.most_common(5))
    console.print(Text(plain(f"licences: {licences or 'none'}")))
    rate = report.records / max(report.seconds, 1e-6) * 60
    counts = ", ".join(_counted(report.count(severity), severity) for severity in SEVERITIES)
    pace = f", {rate:,.0f} a minute" if report.records > 1000 else ""
    ending = f" in {report.records:,} records ({report.seconds:.1f} s{pace})"
    console.print(Text(counts, "bold").append(ending, "not bold"))


def _counted(count: int, severity: str) -> str:
    name = "note" if severity == "info" else severity
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _write_json(report: Report, path: Path) -> None:
    write_atomic(path, json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n")
    echo(f"written to {path}")
