"""A source: one file of records, opened for random access.

Rows of JSON lists and JSONL, in mmit's format or another, are read where they stand; other files are converted into
JSONL once. Holds byte places in memory, never records: 24 bytes a record, mapped from the cache where there is one.
Refuses nothing by itself: a bad row is a RecordError for the policy of the caller, at every opening.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmit.data.conversion import Verdicts, convert
from mmit.data.formats import VERSION, find_format, format_code, row_reader
from mmit.data.formats.common import json_rows
from mmit.data.formats.keys import kept_keys
from mmit.data.formats.packed import packing
from mmit.data.prefetch import allowed_cores, in_order
from mmit.data.row_table import RowFile, RowTable, row_table
from mmit.data.shards.reader import has_index, open_shards
from mmit.data.store import Store, code_version, digest, key_of
from mmit.errors import ConfigError, RecordError, from_facts
from mmit.record_rules import JsonReader
from mmit.records import Image, OnBad, Record, key_twice

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
        # The beginning of one permutation: a smaller subset of the same seed lies inside a larger one. In the order of
        # the file, so that reading stays sequential.
        return np.sort(rng.permutation(size)[: self.count])


def split_subset(path: str | os.PathLike[str]) -> tuple[str, Subset | None]:
    """Split "PATH#N" or "PATH#N@SEED" into the path and the subset; a file that is really called so is left whole.

    A subset is drawn evenly and depends on the number of records, N and SEED (0 if left out) alone, not on the seed of
    a run; of the same seed, the smaller one lies inside the larger one. Raises ConfigError for "#0".
    """
    given = os.fspath(path)
    match = _SUBSET.fullmatch(given)
    # A file may be called a#5. What is there goes before what the ending could mean.
    if match is None or os.path.exists(given):
        return given, None
    if not int(match[2]):
        raise ConfigError("a subset of no record", where=given, remedy="Give a positive number after the #.")
    return match[1], Subset(int(match[2]), int(match[3] or 0))


def source_name(path: str | os.PathLike[str]) -> str:
    """The name in reports of a source that is given none: a file's without ending, a folder's."""
    file, _ = split_subset(path)
    return file.rstrip("/").rpartition("/")[2] if has_index(file) else Path(file).stem


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

    @property
    def rows_checked(self) -> bool:
        """Whether `unreadable` and `kept` are known; else they show as the rows are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def outline(self, index: int, /) -> Record:
        """The record for measuring: its pictures need not be read."""


@dataclass(frozen=True)
class RowSource:
    """Rows of a JSON list or JSONL, each read from the file when it is asked for."""

    name: str
    origin: str  # the file the user named, for messages
    fingerprint: str
    file: RowFile
    table: RowTable
    read: Callable[[bytes, int, int], Record]  # the row's bytes, its line or position, its index -> the record
    unreadable: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    rows_checked: bool = True

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises RecordError naming the file."""
        table = self.table
        data = self.file.read(int(table.starts[index]), int(table.stops[index]))
        return self.read(data, int(table.numbers[index]), index)

    def outline(self, index: int) -> Record:
        """Read one record; its picture files are not looked at. Raises RecordError."""
        return self[index]


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

    @property
    def rows_checked(self) -> bool:
        """As the whole source, which always is."""
        return self.whole.rows_checked

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises as the whole source."""
        return self.whole[int(self.chosen[index])]

    def outline(self, index: int) -> Record:
        """Read one record for measuring. Raises as the whole source."""
        return self.whole.outline(int(self.chosen[index]))


@dataclass(frozen=True)
class SourceSpec:
    """Which records are wanted, as an entry of `data.train` says it.

    Attributes:
        path: a file, or a folder of shards with its index, or its URL (hf://, s3://, http(s)://), opened as it is; with
            "#N" behind it a subset of N records (of the first `limit`), see `split_subset`.
        format: a key of FORMATS. image_root: where its relative image paths start.
        name: in reports; None takes the file's.
        limit: use only its first `limit` records.
        options: the format's own options, as `import_file` takes them.
    """

    path: str | os.PathLike[str]
    format: str = "mmit"
    image_root: str | None = None
    name: str | None = None
    limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def open_source(
    wanted: str | os.PathLike[str] | SourceSpec,
    *,
    cache: str | os.PathLike[str] | None = None,
    on_bad: OnBad | None = None,
    check_rows: bool = True,
    say: Callable[[str], Any] = lambda text: None,
) -> Source:
    """Open a source. A file that is no JSON list and no JSONL is first converted into a JSONL under `cache`, once.

    Args:
        wanted: what is opened; a path alone stands for all of its records in mmit's format.
        cache: folder for what need not be found out again: byte places, converted files, verdicts on rows; None
            keeps nothing, and converts into the current folder.
        on_bad: receives rows of another format that are no records, also where an earlier opening found them; None
            raises the first.
        check_rows: off, rows that are read where they stand are not read before they are asked for: bad ones have
            numbers too and raise their error then. `limit` and "#N" count records, so with them rows are checked all
            the same.
        say: gets a line where the cache is damaged or cannot be written.

    Raises:
        ConfigError: no such file, or no record in it. RecordError: a bad row.
    """
    wanted = wanted if isinstance(wanted, SourceSpec) else SourceSpec(wanted)
    path, subset = split_subset(wanted.path)
    limit = wanted.limit
    if wanted.format == "shards" or (wanted.format == "mmit" and has_index(path)):
        source: Source = open_shards(path, name=wanted.name or "", limit=limit, cache=cache or ".")
    else:
        store = None if cache is None else Store(Path(cache), say)
        opened, verdicts = _open_file(Path(path), wanted, store=store, on_bad=on_bad)
        # Both count records, so bad rows have to be known before any number means anything.
        if not opened.rows_checked and (check_rows or limit is not None or subset is not None):
            opened, verdicts = _usable(opened, store=store)
        bad = verdicts.among(limit)
        for error in bad:
            if on_bad is None:
                raise error
            on_bad(error)
        if limit is not None:
            cut = opened.table.take(slice(limit))
            opened = replace(opened, table=cut, fingerprint=f"{opened.fingerprint}-{len(cut)}")
        source = replace(opened, name=wanted.name or opened.name, unreadable=len(bad), kept=verdicts.kept)
    if not len(source):
        raise ConfigError("holds no record", where=os.fspath(path), remedy="check the file and its format")
    if subset is None:
        return source
    return SubsetSource(source, subset.numbers(len(source), where=f"{path}{subset}"), subset)


def _open_file(
    path: Path,
    wanted: SourceSpec,
    *,
    store: Store | None,
    on_bad: OnBad | None,
) -> tuple[RowSource, Verdicts]:
    format, image_root, options = wanted.format, wanted.image_root, wanted.options
    if path.is_dir():
        raise ConfigError("is a folder", where=str(path), remedy="name a file in it, each file as a source of its own")
    if not path.is_file():
        raise ConfigError("no such file", where=str(path), remedy="check the path")
    native = format == "mmit" and image_root is None and not options and not packing(str(path))
    # By content and not by time: a file that was copied or touched keeps what is known of it.
    content = digest(path, store)
    # An option may name a second file (annotations, images): a change there must not meet an old conversion.
    files = [Path(value) for value in options.values() if isinstance(value, str) and os.path.isfile(value)]
    others = [[str(file.resolve()), digest(file, store)] for file in files]
    root = None if image_root is None else os.path.abspath(image_root)
    # The code too: an importer that reads a row otherwise must not meet an old conversion.
    code = [VERSION, code_version()] + ([] if native else [format_code(format)])
    key = key_of(str(path), str(path.resolve()), content, format, root, sorted(options.items()), others, code)
    file, read, verdicts, rows_checked = path, _native_row(path), Verdicts(), True
    if not native:
        importer = row_reader(path, format, image_root=root, **options)
        # Rows that stand in the file one by one are read where they stand; only tables, archives and single objects are
        # converted.
        if find_format(format).rows is json_rows and _first_byte(path) in (b"[", b"{"):
            read, rows_checked = _foreign_row(importer), False
        else:
            file = (store.folder if store is not None else Path()) / f"{path.stem}-{key}.jsonl"
            given: dict[str, Any] = {"format": format, "image_root": image_root, "options": options}
            verdicts = convert(path, file, on_bad=on_bad, **given)
            content, read = digest(file, store), _native_row(file, origin=path)
    table = row_table(file, content, store)
    return RowSource(
        path.stem, str(path), key, RowFile(file.resolve()), table, read, rows_checked=rows_checked
    ), verdicts


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def _native_row(path: Path, origin: Path | None = None) -> Callable[[bytes, int, int], Record]:
    """Reads a line of mmit's own format."""
    name, root = str(origin or path), str(path.resolve().parent)

    def read(data: bytes, number: int, index: int) -> Record:
        where = f"{name}, record {index + 1}"
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {error}", where=where, remedy="fix or remove this line") from error
        record = Record.from_json(row, where=where, root=root)
        if not record.source and record.row is None:
            record = replace(record, source=name, row=index + 1)
        return record

    return read


def _foreign_row(importer: Callable[[Any, int], Record]) -> Callable[[bytes, int, int], Record]:
    """Reads a row of another format."""

    def read(data: bytes, number: int, index: int) -> Record:
        try:
            row, twice = JsonReader().whole(data.decode("utf-8-sig"))
            row = key_twice(twice, "") if twice else row
        except (ValueError, RecursionError) as error:
            remedy = "Each row must be one whole JSON value in UTF-8: fix or remove it."
            row = RecordError(f"not JSON: {error}", remedy=remedy)
        return _absolute(importer(row, number))

    return read


def _absolute(record: Record) -> Record:
    """Name every picture file by its one absolute path, by which equal pictures are known."""
    # The same file under two spellings would be encoded twice, and not be shared in a row.
    files = [image.source for image in record.images if isinstance(image.source, str)]
    if all(os.path.isabs(file) and os.path.normpath(file) == file for file in files):
        return record

    def named(part: Any) -> Any:
        file = part.source if isinstance(part, Image) else None
        return replace(part, source=os.path.abspath(file)) if isinstance(file, str) else part

    return replace(record, turns=tuple(replace(turn, parts=tuple(map(named, turn.parts))) for turn in record.turns))


def _usable(source: RowSource, *, store: Store | None) -> tuple[RowSource, Verdicts]:
    """The source without its rows that are no records, and the verdicts, which are kept."""
    key = key_of(source.fingerprint)
    found = None if store is None else store.find("usable", key)
    if found is None:
        size = 1024
        pieces = [range(begin, min(begin + size, len(source))) for begin in range(0, len(source), size)]
        workers = allowed_cores() if len(source) > 4 * size else 0
        rows_checked = list(in_order(lambda piece: _check_rows(source, piece), pieces, workers=workers))
        good = np.concatenate([np.zeros(0, np.int64), *(numbers for numbers, _, _ in rows_checked)])
        bad = [told for _, errors, _ in rows_checked for told in errors]
        kept = sum((counts for _, _, counts in rows_checked), Counter[str]())
        if store is not None:
            store.keep("usable", key, {"bad": bad, "kept": kept}, {"good": good})
    else:
        good, bad, kept = found[1]["good"], found[0]["bad"], found[0]["kept"]
    # Of a bad row its place among the rows is told; before it stand so many records.
    placed = tuple((int(np.searchsorted(good, place)), from_facts(facts)) for place, facts in bad)
    fingerprint = f"{source.fingerprint}-usable"
    return replace(source, table=source.table.take(good), fingerprint=fingerprint, rows_checked=True), Verdicts(
        placed, kept
    )


def _check_rows(source: RowSource, piece: range) -> tuple[np.ndarray, list[tuple[int, list[str]]], Counter[str]]:
    """Which of these rows are records, what is wrong with the others, and which keys nothing reads."""
    good, bad, kept = [], [], Counter[str]()
    for index in piece:
        try:
            kept += kept_keys(source[index])
        except RecordError as error:
            bad.append((index, error.facts))
        else:
            good.append(index)
    return np.array(good, dtype=np.int64), bad, kept
