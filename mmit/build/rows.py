"""Rows of fields from whatever holds them: a table, JSON, Parquet, a Hugging Face data set, or a package.

In: a description such as `{path: rows.csv, images: [image]}`. Out: (row number, fields); the fields named under
`images` are Image parts, or lists of them. A row that cannot be read is yielded as its RecordError, so that the build
can count it and go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmit.build.package_data import image_format
from mmit.build.packages import package_rows
from mmit.data.formats.common import json_rows
from mmit.data.formats.pictures import image_part
from mmit.data.formats.tabular import csv_rows, hf_rows, is_parquet, is_table, parquet_rows
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image

KEYS = ("path", "package", "dataset", "split", "config", "revision", "images", "image_root", "licence", "limit")
NO_IMAGE = "there is no image file"
Rows = Iterator[tuple[int, "dict[str, Any] | RecordError"]]


def open_rows(
    described: Mapping[str, Any], *, folder: str = "", limit: int | None = None
) -> tuple[Rows, str | None, str]:
    """Open rows.

    Args:
        described: one of `path` (csv, tsv, json, jsonl, parquet), `package` (see `mmit.build.packages`) or `dataset` (a
            Hugging Face name, or a folder of such a set); `split`, `config` and `revision` of the last two; `images`,
            the fields that hold images; `image_root`, where their paths start (default: the file's folder, or the data
            set's); `licence`; `limit`, the first so many.
        folder: what relative paths start from: `path`, the folder of a `dataset`, and `image_root`. limit: the first so
            many of these.

    Returns:
        the rows, their licence (None where nobody says), and a name for messages and provenance.

    Raises:
        ConfigError: the description is unusable. RecordError: a file cannot be read.
    """
    for key in described:
        if key not in KEYS:
            raise ConfigError(f"unknown key '{key}'", where="rows", remedy=nearest(str(key), KEYS))
    kinds = [key for key in ("path", "package", "dataset") if described.get(key)]
    if len(kinds) != 1:
        problem = f"rows come from {' and '.join(kinds) if kinds else 'nowhere'}"
        raise ConfigError(problem, where="rows", remedy="Give exactly one of path, package and dataset.")
    licence, own_limit = described.get("licence"), described.get("limit")
    limit = own_limit if limit is None else min(limit, own_limit or limit)
    root = None if described.get("image_root") is None else os.path.join(folder, described["image_root"])
    if kinds == ["package"]:
        rows: Any
        rows, own = package_rows(described["package"], described.get("split") or "train")
        licence, name = licence or own, f"{described['package']}/{described.get('split') or 'train'}"
    elif kinds == ["path"]:
        name = os.path.join(folder, described["path"])
        root = os.path.dirname(name) if root is None else root
        rows = _file_rows(name)
    else:
        name = _dataset(described["dataset"], folder)
        root = name if root is None and os.path.isdir(name) else root
        options = {key: described[key] for key in ("split", "config", "revision") if described.get(key)}
        rows = hf_rows(name, **options)
    return _finished(rows, list(described.get("images") or ()), root or "", limit, name), licence, name


def _dataset(name: str, folder: str) -> str:
    """Return the folder that a data set's name leads to from `folder`, or the name as the hub has it.

    Raises ConfigError where `datasets` would take the name for a folder of the working directory, or where it can be
    no name of the hub's.
    """
    place = os.path.join(folder, name)
    if os.path.isdir(place):
        return place
    if os.path.isdir(name) or os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        remedy = "Check rows.dataset; a folder starts at the config's folder, as rows.path does."
        raise ConfigError("no such folder", where=place, remedy=remedy)
    return name


def _file_rows(path: str) -> Iterator[tuple[int, Any]]:
    if not os.path.isfile(path):
        raise ConfigError("no such file", where=path, remedy="Check rows.path; it starts at the config's folder.")
    if is_table(path):
        return csv_rows(path)
    return parquet_rows(path) if is_parquet(path) else json_rows(path)


def _finished(rows: Iterator[tuple[int, Any]], images: list[str], root: str, limit: int | None, name: str) -> Rows:
    for count, (number, row) in enumerate(rows):
        if count == limit:
            return
        if isinstance(row, RecordError):
            yield number, row
        elif not isinstance(row, dict):
            problem = f"found a {type(row).__name__}, not an object"
            yield number, RecordError(problem, where=f"{name}:{number}", remedy="Give a table or JSON objects.")
        else:
            try:
                yield number, _with_images(row, images, root)
            except RecordError as error:
                yield number, RecordError(error.problem, where=f"{name}:{number}", remedy=error.remedy)


def _with_images(row: dict[str, Any], images: list[str], root: str) -> dict[str, Any]:
    found = dict(row)
    for field in images:
        if field not in row:
            raise RecordError(f"there is no field '{field}'", remedy=nearest(field, [str(key) for key in row]))
        value = row[field]
        if isinstance(value, list):
            found[field] = [_there(v if isinstance(v, Image) else image_part(v, root)) for v in value]
        else:
            found[field] = _there(value if isinstance(value, Image) else image_part(value, root))
    return found


def _there(image: Image) -> Image:
    """Refuse an image whose file is gone or whose bytes are none: a question about nothing teaches guessing."""
    if isinstance(image.source, str) and not os.path.isfile(image.source):
        remedy = "Check its path: it starts at rows.image_root, or at the folder of the rows."
        raise RecordError(f"{NO_IMAGE} '{image.source}'", remedy=remedy)
    if isinstance(image.source, bytes):
        image_format(image.source)
    return image
