"""`mmit data card`: the card of a data set, README.md beside it, as the hub reads it.

In: the folder of a build, or data files of one folder. Out: README.md in that folder. Refuses to replace one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli import sources
from mmit.cli.sources import FormatOption, ImageRootOption
from mmit.errors import ConfigError, RecordError
from mmit.io import write_atomic
from mmit.text import echo, plain, terminal

if TYPE_CHECKING:
    from mmit.records import Record

SPLITS = {"train": "records", "test": "held_out"}  # folders of a build


def card(
    data: Annotated[
        list[Path], typer.Argument(metavar="FOLDER_OR_FILES...", help="A build's folder, or data files of one folder.")
    ],
    *,
    name: Annotated[str | None, typer.Option(help="Title of the card. (default: the folder's name)")] = None,
    format: FormatOption = None,
    image_root: ImageRootOption = None,
) -> None:
    """Write README.md beside data: sources, licences, counts, recipe, limits, with the hub's front matter.

    Counts every record; the recipe is there where `mmit build` wrote the folder. Licences of records become the hub's
    ids. Upload the folder with `hf upload OWNER/NAME FOLDER --repo-type dataset`.
    """
    from mmit.build.card import data_card
    from mmit.data.stats import collect

    folder = data[0] if data[0].is_dir() else data[0].parent
    splits = _files(data, folder)
    out = folder / "README.md"
    if out.exists():
        raise ConfigError("is there already", where=str(out), remedy="remove it, or rename it, to write a new one")
    files = [
        file for paths in splits.values() for path in paths for file in _read(path, format=format, root=image_root)
    ]
    away: list[str] = []
    with terminal(stderr=True).status("reading") as status:
        rows = sources.watched(chain.from_iterable(file.rows() for file in files), status.update)
        found = collect(_noting(rows, folder.resolve(), away), sample=2)  # two prompts: the card tells no diversity
    if not found.sources:
        raise ConfigError(f"there is no record, and {found.bad} bad rows", where=str(folder), remedy="See data check.")
    told = {split: [path.relative_to(folder).as_posix() for path in paths] for split, paths in splits.items()}
    build = _json(folder / "build.json")
    write_atomic(out, plain(data_card(found, name=name or folder.resolve().name, files=told, build=build)))
    if found.bad:
        echo(f"{found.bad:,} bad rows are not counted: mmit data check names them", err=True)
    if away:
        echo(f"{len(away):,} images lie outside {folder}, such as {away[0]}: an upload of it leaves them out", err=True)
    echo(f"written to {out}")


def _files(data: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """The files of each split, all of them below `folder`."""
    if data[0].is_dir():
        found = {split: sorted((folder / part).glob("*.jsonl")) for split, part in SPLITS.items()}
        found = {split: paths for split, paths in found.items() if paths}
        if len(data) > 1 or not (folder / "build.json").is_file() or not found:
            remedy = "give one folder that mmit build wrote, or data files"
            raise ConfigError("holds no build.json with records/", where=str(folder), remedy=remedy)
        return found
    for path in data:
        if path.parent != folder:
            remedy = "give files of one folder, which the card is for"
            raise ConfigError(f"does not lie in {folder}", where=str(path), remedy=remedy)
    return {"train": list(data)}


def _read(path: Path, *, format: str | None, root: Path | None) -> list[sources.File]:
    return sources.files_of(path, None, format=format, image_root=root)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _noting(rows: Iterator[Record | RecordError], folder: Path, away: list[str]) -> Iterator[Record | RecordError]:
    """The rows as they are; `away` receives image files that do not lie below `folder`, each once."""
    seen: set[str] = set()
    for row in rows:
        for image in () if isinstance(row, RecordError) else row.images:
            if isinstance(image.source, str) and image.source not in seen:
                seen.add(image.source)
                if not Path(image.source).resolve().is_relative_to(folder):
                    away.append(image.source)
        yield row
