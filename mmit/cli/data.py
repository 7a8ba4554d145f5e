"""`mmit data import`: files of other formats become mmit JSONL; and where the other data commands are put together.

Every row that is left out is told, with its place and reason; without --skip-bad the first one ends the import and
nothing is written.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmit.cli import data_card, data_check, data_shards, data_show, data_stats
from mmit.cli.sources import OptionOption, format_options
from mmit.errors import ConfigError, RecordError, nearest
from mmit.io import write_atomic
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.records import Record

app = typer.Typer(help="Bring data into mmit's format, and see what is in it.", no_args_is_help=True)
app.command("pack")(data_shards.pack)
app.command("build", hidden=True)(data_shards.build)  # the former name
app.command("index")(data_shards.index)
app.command("check")(data_check.check)
app.command("show")(data_show.show)
app.command("stats")(data_stats.stats)
app.command("card")(data_card.card)
SHOWN = 20  # bad rows told in the terminal; all of them are in the file beside the output
PACKAGES = ("easy-vqa", "easy-vqa-captions")


@app.callback()
def data() -> None:
    """Bring data into mmit's format, and see what is in it."""


@app.command("import")
def import_(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT", help=f"llava, alpaca, ...; auto looks at the file; {' and '.join(PACKAGES)} need no PATH."
        ),
    ],
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="The file to read; PATH#N draws N of its records.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.jsonl", help="The file to write.")],
    image_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where relative image paths start. (default: PATH's folder)")
    ] = None,
    split: Annotated[str | None, typer.Option(help=f"train or test, of {' and '.join(PACKAGES)}.")] = None,
    licence: Annotated[str | None, typer.Option(help="Noted in records that state none.")] = None,
    option: OptionOption = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and list them.")] = False,
    check_images: Annotated[bool, typer.Option(help="A row whose image file is missing is bad.")] = True,
) -> None:
    """Convert a data file, or the data of a Python package, into mmit JSONL."""
    bad: list[RecordError] = []
    kept: Counter[str] = Counter()
    if format in PACKAGES:
        given = {"PATH": path, "--image-root": image_root, "--licence": licence, "--option": option}
        if unused := [name for name, value in given.items() if value is not None]:
            raise typer.BadParameter(f"{format} brings its own: leave it out", param_hint=unused[0])
        records = _package(format, split)
    else:
        if split is not None:
            raise typer.BadParameter(f"only {' and '.join(PACKAGES)} have splits", param_hint="--split")
        format, file = _checked(format, path)
        options = format_options(option)

        from mmit.data.rows import import_records

        records = import_records(
            file,
            format,
            image_root=image_root,
            licence=licence,
            check_images=check_images,
            on_bad=bad.append if skip_bad else None,
            kept=kept,
            **options,
        )
    counts = _write(records, out, bad)
    _report(counts, out, bad, kept)


def _package(name: str, split: str | None) -> Iterator[Record]:
    from mmit.data.formats import easy_vqa, easy_vqa_captions

    if split is None:
        raise typer.BadParameter(f"{name} has the splits train and test: choose one", param_hint="--split")
    return easy_vqa(split) if name == "easy-vqa" else easy_vqa_captions(split)


def _checked(format: str, path: Path | None) -> tuple[str, Path]:
    """Return the format, detected where it is "auto", and the file."""
    from mmit.data.formats import FORMATS, detect_format
    from mmit.plugins import is_spec

    if format != "auto" and format not in FORMATS and not is_spec(format):
        remedy = nearest(format, [*FORMATS, *PACKAGES, "auto"])
        if path is None and Path(format).exists():  # the format was left out
            remedy = f"The format comes before the file: mmit data import auto {shlex.quote(format)}"
        raise ConfigError(f"unknown data format '{format}'", where="FORMAT", remedy=remedy)
    if path is None:
        raise typer.BadParameter(f"format {format} needs a file", param_hint="PATH")
    if format == "auto":
        from mmit.data.sources import split_subset

        format, reason = detect_format(split_subset(path)[0])
        echo(f"format: {format} ({reason})")
    return format, path


class _Counts:
    def __init__(self) -> None:
        from mmit.data.held import Held

        self.held = Held()
        self.records = self.answers = self.text_only = self.dropped = 0
        self.images: set[object] = set()

    def watch(self, records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            self.records += 1
            self.held.take(record)
            self.answers += sum(turn.role == "assistant" for turn in record.turns)
            self.text_only += not record.images
            self.dropped += "dropped_leading_turn" in record.meta
            self.images.update(image.source for image in record.images)
            yield record


def _write(records: Iterator[Record], out: Path, bad: list[RecordError]) -> _Counts:
    """Write the records; nothing is written, and no earlier file lost, when there is none."""
    from mmit.records import write_jsonl

    first = next(records, None)
    if first is None:
        if bad:
            raise RecordError(
                f"no usable row, {len(bad)} bad ones; the first: {bad[0].problem}",
                where=bad[0].where,
                remedy=bad[0].remedy,
            )
        raise RecordError("no rows", remedy="Check the file.")
    counts = _Counts()
    write_jsonl(counts.watch(chain([first], records)), out)
    return counts


def _report(counts: _Counts, out: Path, bad: list[RecordError], kept: Counter[str]) -> None:
    from mmit.data.formats.keys import told

    echo(
        f"{_of(counts.records, 'record')} ({counts.text_only:,} without images), {_of(counts.answers, 'answer')}, "
        f"{_of(len(counts.images), 'different image')}"
    )
    if counts.dropped:
        echo(f"{_of(counts.dropped, 'record')} began with the assistant's turn; it is kept in the meta only")
    for line in counts.held.lines():
        echo(line)
    if kept:
        echo(f"kept in meta only: {told(kept)}")
    if not counts.answers:
        echo("warning: no record has an answer: they are for generation, and training refuses them")
    if bad:
        beside = out.with_name(f"{out.stem}.bad.jsonl")
        lines = [json.dumps({"where": e.where, "problem": e.problem, "remedy": e.remedy}) for e in bad]
        write_atomic(beside, "".join(line + "\n" for line in lines))
        echo(f"{_of(len(bad), 'bad row')} left out, listed in {beside}:")
        for error in bad[:SHOWN]:
            echo(f"  {error.where}: {error.problem}")
        if len(bad) > SHOWN:
            echo(f"  ... and {len(bad) - SHOWN:,} more")
    echo(f"written to {out}")


def _of(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
