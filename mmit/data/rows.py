"""Rows for the tools that look at data: every record of a file in order, the bad ones as their errors.

Takes any file that mmit reads, or a folder of shards; gives Records, and RecordErrors where a row is none, so that a
tool can tell all of them in one pass. Leaves nothing out and fixes nothing.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmit.data.formats import detect_format, import_file
from mmit.data.formats.keys import kept_keys
from mmit.data.shards.reader import has_index
from mmit.data.sources import Source, SourceSpec, Subset, open_source, split_subset
from mmit.errors import ConfigError, RecordError
from mmit.records import OnBad, Record

FileRow = Record | RecordError


def read_rows(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    image_root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    kept: Counter[str] | None = None,
) -> Iterator[FileRow]:
    """Yield the records and bad rows of a file in one of FORMATS, or of a folder of shards ("shards").

    Args:
        path: a file or folder; "PATH#N" takes N rows, the same that training takes (`split_subset`).
        format: found out if None. options: the format's. image_root: folder of relative paths of pictures.
        limit: end after that many rows, bad ones included.
        kept: counts the keys that stay in the meta unread.

    Raises:
        RecordError: the file cannot be read or told. ConfigError: there is none.
    """
    path, subset = split_subset(path)
    unread: frozenset[str] | None = None  # keys that may be counted, None for all
    if format == "shards" or has_index(path):
        source = open_source(SourceSpec(path, format="shards"))
        rows, unread = _shard_rows(source), frozenset(source.kept)
    else:
        if format != "hf" and not Path(path).is_file():
            raise ConfigError("no such file", where=os.fspath(path), remedy="Check the path.")
        format = format or detect_format(path)[0]
        rows = _file_rows(path, format, image_root, options or {})
        if format == "mmit":  # the meta of its rows is what somebody put there
            unread = frozenset()
    if subset is not None:
        again = partial(read_rows, path, format, image_root=image_root, limit=limit, options=options)
        # Lines of mmit's own files have numbers though they are bad; in other formats only what was converted has.
        rows = _take(again, subset, where=path, count_bad=format in (None, "mmit", "shards"))
    for number, row in enumerate(rows):
        if number == limit:
            return
        if kept is not None and isinstance(row, Record):
            found = kept_keys(row)
            kept.update(found if unread is None else {key: 1 for key in found if key in unread})
        yield row


def _take(
    make: Callable[[], Iterator[FileRow]], subset: Subset, *, where: str, count_bad: bool = False
) -> Iterator[FileRow]:
    """Yield the rows of a subset; `make` begins a pass over all rows, of which the first counts them.

    Bad rows are counted where `count_bad`; else they are yielded all, since what they would have been is not known.
    """
    # Two passes: which rows a subset takes depends on how many there are, and rows are too large to be kept meanwhile.
    size = sum(count_bad or isinstance(row, Record) for row in make())
    chosen = set(subset.numbers(size, where=f"{where}{subset}").tolist())
    number = 0
    for row in make():
        counted = count_bad or isinstance(row, Record)
        if not counted or number in chosen:
            yield row
        number += counted


def _file_rows(
    path: str | os.PathLike[str],
    format: str,
    image_root: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> Iterator[FileRow]:
    # A list between two generators: `import_file` tells bad rows by a callback, and the caller wants them in their
    # places.
    bad: list[RecordError] = []
    for record in import_file(path, format, image_root=image_root, on_bad=bad.append, **options):
        yield from bad  # met on the way to this record
        bad.clear()
        yield record
    yield from bad


def _shard_rows(source: Source) -> Iterator[FileRow]:
    for index in range(len(source)):
        try:
            yield source[index]
        except RecordError as error:
            yield error


def import_records(
    path: str | os.PathLike[str], format: str, *, on_bad: OnBad | None = None, **options: Any
) -> Iterator[Record]:
    """Yield the records of a file as `import_file` does; of "PATH#N" those of the subset, read in two passes.

    Args:
        path: the file; with "#N" behind it a subset, see `split_subset`.
        format: a key of FORMATS, or `module:name` of the user's own.
        on_bad: takes a bad row, which is left out; None raises the first.
        options: as `import_file` takes them.

    Raises:
        RecordError: a bad row without `on_bad`, or a file that cannot be read. ConfigError: unknown format or option,
            or a subset of more records than there are.
    """
    file, subset = split_subset(path)
    if subset is None:
        yield from import_file(file, format, on_bad=on_bad, **options)
        return
    ignored: OnBad | None = None if on_bad is None else lambda error: None  # told in the second pass
    kept: Counter[str] | None = options.pop("kept", None)
    size = sum(1 for _ in import_file(file, format, on_bad=ignored, **options))
    chosen = set(subset.numbers(size, where=os.fspath(path)).tolist())
    for number, record in enumerate(import_file(file, format, on_bad=on_bad, **options)):
        if number in chosen:
            if kept is not None:
                kept.update(kept_keys(record))
            yield record


def sample_rows(rows: Iterable[FileRow], count: int, *, seed: int) -> tuple[list[tuple[int, FileRow]], int]:
    """Return `count` rows drawn evenly, as (number from 1, row) in file order, and how many there were.

    One pass that holds `count` rows (reservoir sampling, Vitter 1985); the same seed draws the same rows.
    """
    rng = random.Random(seed)
    kept: list[tuple[int, FileRow]] = []
    total = 0
    for total, row in enumerate(rows, 1):
        if len(kept) < count:
            kept.append((total, row))
        # Row n stays with probability count / n, and each of those kept so far is the one it replaces with equal
        # probability: so all rows are drawn alike, whatever their number.
        elif (place := rng.randrange(total)) < count:
            kept[place] = (total, row)
    return sorted(kept, key=lambda item: item[0]), total
