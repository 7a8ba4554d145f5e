"""A source: one file of records, opened for random access.

Owns the line index of mmit JSONL files and the one-time conversion of every other format into such a file. Holds
offsets in memory, never records, so that a file of any size costs 8 bytes a record. Refuses nothing by itself: a bad
row is a RecordError for the policy of the caller, at every opening.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmit.data.conversion import Verdicts, convert
from mmit.data.formats import VERSION
from mmit.data.shards.reader import has_index, open_shards
from mmit.errors import ConfigError, RecordError
from mmit.records import Record

# data.jsonl#500, data.jsonl#500@7
_SUBSET = re.compile(r"(?s)(.+)#([0-9]{1,12})(?:@([0-9]{1,9}))?")


@dataclass(frozen=True)
class Subset:
    """`count` records drawn without repetition; see `split_subset`."""

    count: int
    seed: int = 0

    def __str__(self) -> str:
        return f"#{self.count}" + (f"@{self.seed}" if self.seed else "")

    def numbers(self, size: int, *, where: str = "") -> np.ndarray:
        """Which of `size` records it takes, in the order of the file. Raises ConfigError if there are too few."""
        if self.count > size:
            remedy = f"Ask for {size} or fewer; a source is repeated by its weight."
            raise ConfigError(f"{self.count} records are asked for, but there are {size}", where=where, remedy=remedy)
        # PCG64's stream and this shuffle are fixed by numpy's compatibility policy for Generator.permutation.
        rng = np.random.Generator(np.random.PCG64([self.seed, 0x6D6D6974]))
        return np.sort(rng.permutation(size)[: self.count])


def split_subset(path: str | os.PathLike[str]) -> tuple[str, Subset | None]:
    """Split "PATH#N" or "PATH#N@SEED" into the path and the subset; a file that is really called so is left whole.

    A subset is drawn evenly and depends on the number of records, N and SEED (0 if left out) alone, not on the seed of
    a run; of the same seed, the smaller one lies inside the larger one. Raises ConfigError for "#0".
    """
    given = os.fspath(path)
    match = _SUBSET.fullmatch(given)
    if match is None or os.path.exists(given):
        return given, None
    if not int(match[2]):
        raise ConfigError("a subset of no record", where=given, remedy="Give a positive number after the #.")
    return match[1], Subset(int(match[2]), int(match[3] or 0))


class Source(Protocol):
    """Records by number. Indexing raises RecordError for a bad record, naming its place."""

    @property
    def name(self) -> str:
        """Of the source, in reports."""

    @property
    def origin(self) -> str:
        """The file or folder that the user named."""

    @property
    def fingerprint(self) -> str:
        """Changes when the records may have changed."""

    @property
    def unreadable(self) -> int:
        """Rows of the file that became no record."""

    @property
    def kept(self) -> Mapping[str, int]:
        """Keys of its rows that stay in the meta unread, and in how many rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def outline(self, index: int, /) -> Record:
        """The record for measuring: its pictures need not be read. Raises RecordError for one known to be missing."""


@dataclass(frozen=True)
class JsonlSource:
    """An mmit JSONL file and the byte offset of each of its records."""

    name: str
    path: Path
    offsets: np.ndarray  # (n + 1,) int64, non-blank lines
    origin: str  # the file the user named, for messages
    fingerprint: str
    unreadable: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises RecordError naming the file."""
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[index]))
            line = file.readline()
        where = f"{self.origin}, record {index + 1}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecordError(f"not JSON: {error}", where=where, remedy="mend or remove this line") from error
        record = Record.from_json(row, where=where, root=str(self.path.parent))
        if not record.source and record.row is None:
            record = replace(record, source=self.origin, row=index + 1)
        return record

    def outline(self, index: int) -> Record:
        """Read one record and see that its picture files are there. Raises RecordError."""
        record = self[index]
        for image in record.images:
            if isinstance(image.source, str) and not os.path.isfile(image.source):
                raise RecordError(
                    f"image file is missing: {image.source}",
                    where=record.where,
                    remedy="check image_root, or set run.on_bad_record=skip",
                )
        return record


@dataclass(frozen=True)
class SubsetSource:
    """Some of a source's records, in its order."""

    whole: Source
    chosen: np.ndarray  # (n,) int64
    subset: Subset

    @property
    def name(self) -> str:
        """Of the whole source."""
        return self.whole.name

    @property
    def origin(self) -> str:
        """As the user wrote it."""
        return f"{self.whole.origin}{self.subset}"

    @property
    def fingerprint(self) -> str:
        """Of the whole source and the subset."""
        return f"{self.whole.fingerprint}{self.subset}"

    @property
    def unreadable(self) -> int:
        """Of the whole source: which of the bad rows would have been drawn is not known."""
        return self.whole.unreadable

    @property
    def kept(self) -> Mapping[str, int]:
        """Of the whole source."""
        return self.whole.kept

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises as the whole source."""
        return self.whole[int(self.chosen[index])]

    def outline(self, index: int) -> Record:
        """Read one record for measuring. Raises as the whole source."""
        return self.whole.outline(int(self.chosen[index]))


def open_source(
    path: str | os.PathLike[str],
    *,
    format: str = "mmit",
    image_root: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    cache: str | os.PathLike[str] = ".",
    options: Mapping[str, Any] | None = None,
    on_bad: Callable[[RecordError], None] | None = None,
) -> Source:
    """Open a source; a format other than "mmit" is first converted into a JSONL under `cache`, once.

    Args:
        path: the file, or a folder of shards with its index, or its URL (hf://, s3://, http(s)://), opened as it is;
            with "#N" behind it a subset of N records (of the first `limit`), see `split_subset`.
        format: a key of FORMATS. image_root: where its relative image paths start.
        limit: use only its first `limit` records.
        cache: folder for converted files; the file name carries a hash of the input's path, size and time.
        options: the format's own options, as `import_file` takes them.
        on_bad: receives rows that cannot be converted, also where an earlier opening converted the file; None raises
            the first.

    Raises:
        ConfigError: no such file, or no record in it. RecordError: a bad row.
    """
    path, subset = split_subset(path)
    if subset is not None:
        given: dict[str, Any] = {"format": format, "image_root": image_root, "name": name, "limit": limit}
        whole = open_source(path, cache=cache, options=options, on_bad=on_bad, **given)
        return SubsetSource(whole, subset.numbers(len(whole), where=f"{path}{subset}"), subset)
    if format == "shards" or (format == "mmit" and has_index(path)):
        return open_shards(path, name=name or "", limit=limit, cache=cache)
    origin = Path(path)
    if not origin.is_file():
        raise ConfigError("no such file", where=str(origin), remedy="check the path")
    converted = format != "mmit" or image_root is not None or bool(options)
    key: list[Any] = [*_identity(origin), format, image_root, *([f"importers {VERSION}"] if converted else [])]
    if options:
        # An option may name a second file (annotations, images): a change there must not meet an old conversion.
        files = [Path(value) for value in options.values() if isinstance(value, str) and os.path.isfile(value)]
        key += [sorted(options.items()), *(_identity(file) for file in files)]
    fingerprint = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]
    file, verdicts = origin, Verdicts()
    if converted:
        file = Path(cache) / f"{origin.stem}-{fingerprint}.jsonl"
        given = {"format": format, "image_root": image_root, "options": options or {}}
        verdicts = convert(origin, file, on_bad=on_bad, **given)
    bad = verdicts.among(limit)
    for error in bad:
        if on_bad is None:
            raise error
        on_bad(error)
    offsets = _line_offsets(file)[:limit]
    if not len(offsets):
        raise ConfigError("holds no record", where=str(origin), remedy="check the file and its format")
    found = {"unreadable": len(bad), "kept": verdicts.kept}
    return JsonlSource(name or origin.stem, file.resolve(), offsets, str(origin), fingerprint, **found)


def _identity(path: Path) -> list[str | int]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _line_offsets(path: Path) -> np.ndarray:
    offsets, at = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                offsets.append(at)
            at += len(line)
    return np.array(offsets, dtype=np.int64)
