"""`mmit data pack` and `mmit data index`: records into indexed WebDataset tars, and an index for tars that are there.

A folder so made is a source of training like any file. What is left out is told and listed beside the shards; without
--skip-bad the first bad record ends the command.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.sources import ImageRootOption, OptionOption, format_options
from mmit.errors import ConfigError, RecordError, nearest
from mmit.io import write_atomic
from mmit.text import echo, terminal

if TYPE_CHECKING:
    from mmit.records import Record

SHOWN = 20  # bad records told in the terminal; all of them are in bad.jsonl
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the index.")]
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out and list them in DIR/bad.jsonl.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes. [default: one per CPU]")]


def pack(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DATA...", help="Data files of any format, in this order; FILE#N draws N records."),
    ],
    *,
    out: OutOption,
    format: Annotated[str, typer.Option(help="Format of the files; auto looks at each.")] = "auto",
    image_root: ImageRootOption = None,
    option: OptionOption = None,
    max_side: Annotated[int | None, typer.Option(min=2, help="Scale larger pictures down to this side.")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard in MiB.")] = 256,
    workers: WorkersOption = None,
    skip_bad: SkipOption = False,
) -> None:
    """Write records and their pictures as plain WebDataset tars with an index.

    Pictures are kept byte for byte unless --max-side is given. An interrupted build goes on where it stopped.
    """
    from mmit.data.shards.writer import build_shards

    bad: list[RecordError] = []
    on_bad = bad.append if skip_bad else None
    kept_in_meta: Counter[str] = Counter()
    with _bar("records") as advance:
        report = build_shards(
            _records(data, format, image_root, on_bad, kept_in_meta, format_options(option)),
            out,
            max_bytes=shard_mb << 20,
            workers=workers or os.cpu_count() or 1,
            max_side=max_side,
            on_bad=on_bad,
            progress=lambda records, shards: advance(records, None),
        )
    kept = f" ({report.kept} were there already)" if report.kept else ""
    echo(f"{report.records:,} records in {report.shards} shards{kept}, {report.bytes / 2**20:,.1f} MiB")
    _tell_kept(kept_in_meta)
    _tell(bad, out)
    echo(f"written to {out}")


@functools.wraps(pack)
def build(**arguments: Any) -> None:
    """`mmit data pack` under its former name."""
    echo("notice: `mmit data build` is `mmit data pack` now; `mmit build` makes instruction data", err=True)
    pack(**arguments)


def index(
    tars: Annotated[list[str], typer.Argument(metavar="TAR...", help="WebDataset tars: paths or URLs, in this order.")],
    *,
    out: OutOption,
    instruction: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What the user says beside a captioned picture; of several, one is drawn."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="EXT", help="Members to leave out, such as npy.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="boxes, boxes_in or thoughts: how boxes are written and read, what marks thoughts.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the draw of instructions.")] = 0,
    workers: WorkersOption = None,
    skip_bad: SkipOption = False,
) -> None:
    """Index the tars of img2dataset, OpenFlamingo and others where they lie, by reading each once."""
    from mmit.data.formats.common import SHARED_OPTIONS
    from mmit.data.shards.scan import index_tars

    shared = format_options(option)
    for name in shared:
        if name not in SHARED_OPTIONS:
            raise ConfigError(f"tars have no option '{name}'", where="--option", remedy=nearest(name, SHARED_OPTIONS))
    bad: list[RecordError] = []
    kept: Counter[str] = Counter()
    with _bar("tars") as advance:
        samples = index_tars(
            tars,
            out,
            instruction=instruction or None,
            seed=seed,
            ignore=ignore or (),
            options=shared,
            workers=workers or os.cpu_count() or 1,
            on_bad=bad.append if skip_bad else None,
            kept=kept,
            progress=advance,
        )
    echo(f"{samples:,} samples in {len(tars):,} tars")
    _tell_kept(kept)
    _tell(bad, out)
    echo(f"index written to {out}")


def _records(
    files: list[Path],
    format: str,
    image_root: Path | None,
    on_bad: Callable[[RecordError], None] | None,
    kept: Counter[str],
    options: dict[str, Any],
) -> Iterator[Record]:
    from mmit.data.formats import detect_format
    from mmit.data.rows import import_records
    from mmit.data.sources import split_subset

    for path in files:
        name = format
        if format == "auto":
            name, reason = detect_format(split_subset(path)[0])
            echo(f"{path}: {name} ({reason})")
        counted = None if name == "mmit" else kept  # the meta of mmit's own rows is what somebody put there
        yield from import_records(path, name, image_root=image_root, on_bad=on_bad, kept=counted, **options)


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr; the callable takes what is done and, where known, the whole."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    console = terminal(stderr=True)
    columns = (TextColumn(f"{{task.completed:,}} {unit}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _tell_kept(kept: Counter[str]) -> None:
    from mmit.data.formats.keys import told

    if kept:
        echo(f"kept in meta only: {told(kept)}")


def _tell(bad: list[RecordError], out: Path) -> None:
    if not bad:
        return
    lines = [json.dumps({"where": e.where, "problem": e.problem, "remedy": e.remedy}) for e in bad]
    write_atomic(out / "bad.jsonl", "".join(line + "\n" for line in lines))
    echo(f"{len(bad):,} bad records left out, listed in {out / 'bad.jsonl'}:")
    for error in bad[:SHOWN]:
        echo(f"  {error.where}: {error.problem}")
    if len(bad) > SHOWN:
        echo(f"  ... and {len(bad) - SHOWN:,} more")
