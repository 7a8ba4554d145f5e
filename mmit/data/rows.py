"""Rows for the tools that look at data: every record of a file in order, the bad ones as their errors.

Takes any file that mmit reads, or a folder of shards; gives Records, and RecordErrors where a row is none, so that a
tool can tell all of them in one pass. Leaves nothing out and mends nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmit.data.formats import detect_format, import_file
from mmit.data.shards.reader import has_index
from mmit.data.sources import open_source
from mmit.errors import ConfigError, RecordError
from mmit.records import Record

Row = Record | RecordError


def read_rows(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    image_root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> Iterator[Row]:
    """Yield the records and bad rows of a file in one of FORMATS, or of a folder of shards ("shards").

    Without `format` it is found out. `limit` ends after that many rows, bad ones included. Raises RecordError if the
    file cannot be read or told, ConfigError if there is none.
    """
    if format == "shards" or has_index(path):
        rows = _shard_rows(path)
    else:
        if format != "hf" and not Path(path).is_file():
            raise ConfigError("no such file", where=os.fspath(path), remedy="Check the path.")
        rows = _file_rows(path, format or detect_format(path)[0], image_root)
    for number, row in enumerate(rows):
        if number == limit:
            return
        yield row


def _file_rows(path: str | os.PathLike[str], format: str, image_root: str | os.PathLike[str] | None) -> Iterator[Row]:
    bad: list[RecordError] = []
    for record in import_file(path, format, image_root=image_root, on_bad=bad.append):
        yield from bad  # met on the way to this record
        bad.clear()
        yield record
    yield from bad


def _shard_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    source = open_source(path, format="shards")
    for index in range(len(source)):
        try:
            yield source[index]
        except RecordError as error:
            yield error


def sample_rows(rows: Iterable[Row], count: int, *, seed: int) -> tuple[list[tuple[int, Row]], int]:
    """Return `count` rows drawn evenly, as (number from 1, row) in file order, and how many there were.

    One pass that holds `count` rows (reservoir sampling, Vitter 1985); the same seed draws the same rows.
    """
    rng = random.Random(seed)
    kept: list[tuple[int, Row]] = []
    total = 0
    for total, row in enumerate(rows, 1):
        if len(kept) < count:
            kept.append((total, row))
        elif (place := rng.randrange(total)) < count:
            kept[place] = (total, row)
    return sorted(kept, key=lambda item: item[0]), total
