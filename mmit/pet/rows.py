"""Rows with a label, and rows or bare pictures without one.

In: what `mmit build` reads rows from, or a folder of pictures. Out: examples, their fields cut to those that the
patterns declare. Refuses a row whose label is missing or not among the patterns'.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from mmit.build.rows import KEYS, open_rows
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image

if TYPE_CHECKING:
    from mmit.pet.patterns import Patterns


@dataclass(frozen=True)
class Example:
    """One row: what the patterns read, and its label where it has one."""

    fields: Mapping[str, Any]
    label: str | None
    source: str
    row: int
    licence: str | None = None

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return f"{self.source}:{self.row}"


def read_rows(
    described: Mapping[str, Any], patterns: Patterns, *, labelled: bool, folder: str = "", key: str = "rows"
) -> list[Example]:
    """Read rows.

    Args:
        described: the keys of `rows` of `mmit build annotated` and, of labelled ones, `label`, the column of the label
            (default: the task's name). A `path` that is a folder stands for the pictures in it, by their names.
        folder: what a relative path starts from. key: of the config, for messages.

    Raises:
        ConfigError: the description is unusable. RecordError: a row cannot be read, or its label is none.
    """
    if not isinstance(described, Mapping):
        raise ConfigError(f"is a {type(described).__name__}", where=key, remedy=f"Write {key}: {{path: FILE}}.")
    given = dict(described)
    column = str(given.pop("label", patterns.task)) if labelled else None
    for name in given:
        if name not in KEYS:
            raise ConfigError(f"unknown key '{name}'", where=key, remedy=nearest(str(name), [*KEYS, "label"]))
    path = os.path.join(folder, str(given["path"])) if given.get("path") else ""
    if os.path.isdir(path):
        if labelled:
            remedy = "Give a table or JSON with a column for the image and one for the label."
            raise ConfigError("is a folder, where no picture has a label", where=f"{key}: {path}", remedy=remedy)
        return _with_images(path, patterns, given, key)
    given.setdefault("images", [name for name in patterns.fields if name == "image"])
    rows, licence, source = open_rows(given, folder=folder)
    found = []
    for number, row in rows:
        if isinstance(row, RecordError):
            raise row
        found.append(_example(row, patterns, column, Example({}, None, source, number, licence)))
    if not found:
        raise ConfigError("there are no rows", where=f"{key}: {source}", remedy="Check the file.")
    return found


def _example(row: Mapping[str, Any], patterns: Patterns, column: str | None, place: Example) -> Example:
    for name in (*patterns.fields, *([column] if column else [])):
        if name not in row or row[name] in (None, ""):
            problem = f"'{name}' is empty" if name in row else f"there is no column '{name}'"
            remedy = "Fill it in, or leave the row out." if name in row else nearest(name, [str(k) for k in row])
            raise RecordError(problem, where=place.where, remedy=remedy)
    label = None if column is None else str(row[column]).strip()
    if label is not None and label not in patterns.labels:
        problem = f"the label '{label[:80]}' is not among those of the patterns"
        raise RecordError(problem, where=place.where, remedy=nearest(label, patterns.labels))
    fields = {name: row[name] for name in patterns.fields}
    return Example(fields, label, place.source, place.row, place.licence)


def _with_images(path: str, patterns: Patterns, given: Mapping[str, Any], key: str) -> list[Example]:
    """The pictures of a folder, in the order of their names."""
    if len(patterns.fields) != 1:
        problem = f"is a folder of pictures, and the patterns read {', '.join(patterns.fields)}"
        raise ConfigError(problem, where=f"{key}: {path}", remedy="Give a table with these columns.")
    known = PIL.Image.registered_extensions()
    files = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in known and file.is_file())
    files = files[: given.get("limit")]
    if not files:
        remedy = "Give a folder with files such as a.png or b.jpg."
        raise ConfigError("there is no picture in the folder", where=f"{key}: {path}", remedy=remedy)
    name = patterns.fields[0]
    licence = given.get("licence")
    return [Example({name: Image(str(file))}, None, path, n, licence) for n, file in enumerate(files, 1)]
