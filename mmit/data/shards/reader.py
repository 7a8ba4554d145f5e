"""Reading shards: any record of an indexed folder by its number, every byte checked against the index.

Takes a folder with an index (local or hf://, s3://, http(s)://), gives Records whose image parts are bytes. Holds no
data: the index is memory-mapped, a record costs one range read. Refuses bytes that changed since indexing, and never
unpacks a member to disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmit.data.formats.common import SHARED_OPTIONS, check_shared
from mmit.data.shards.files import RangeReader, ShardFileError, is_remote, open_shard
from mmit.data.shards.index import ARRAYS, DTYPES, INDEX, VERSION
from mmit.data.shards.records import IMAGES, Limits, check_members, extension, to_record
from mmit.data.shards.tar_headers import padded
from mmit.errors import ConfigError, RecordError
from mmit.io import write_atomic
from mmit.records import Image, Part, Record, short

# Members of a sample that lie this close are fetched with one read.
Member = tuple[Any, ...]  # a row of the index, see _START and the rest below
_GAP = 1 << 16
_CHANGED = "The shard changed since it was indexed: restore it, or index it again if the change was meant."
_REBUILD = "Build or index the folder again."


@dataclass
class Index:
    """An opened index: what index.json says, and the arrays described in mmit.data.shards.index."""

    header: dict[str, Any]
    samples: np.ndarray
    members: np.ndarray
    keys: np.ndarray


class ShardSource:
    """A folder of shards as a source of records; see `open_shards`.

    Attributes:
        name: of the source. origin: the folder, for messages. fingerprint: hash of the whole index, and so of every
        checksum in it. index: the memory-mapped arrays, e.g. `source.index.samples["chars"]`.
    """

    def __init__(
        self,
        folder: str,
        *,
        name: str = "",
        limit: int | None = None,
        cache: str = "",
        limits: Limits | None = None,
    ) -> None:
        self.origin, self._cache, self._limit = folder, cache, limit
        self._limits = limits or Limits()
        self._index: Index | None = None
        self._ranges = RangeReader()
        header = self.index.header
        self.name = name or folder.rstrip("/").rpartition("/")[2]
        # A subset has a fingerprint of its own: what was measured of the whole does not hold for it.
        self.fingerprint = str(header["fingerprint"]) + ("" if limit is None else f"-{len(self)}")
        self._suffixes: list[str] = header["suffixes"]
        self.unreadable = 0  # samples that are none have been left out of the index, and told then
        self.kept: dict[str, int] = dict(header.get("kept") or {})  # of the whole folder
        self.rows_checked = True

    @property
    def index(self) -> Index:
        """The index, opened at first use in each process."""
        if self._index is None:
            self._index = _open_index(self.origin, self._cache)
        return self._index

    def __len__(self) -> int:
        number = len(self.index.samples)
        return number if self._limit is None else min(number, self._limit)

    def __getstate__(self) -> dict[str, Any]:
        # A memory-mapped array would be copied whole into every worker.
        return self.__dict__ | {"_index": None, "_ranges": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ranges = RangeReader()

    def __getitem__(self, number: int) -> Record:
        """Read record `number`, image parts as bytes.

        Raises RecordError, naming shard, key, member and cause, if a byte changed or the sample breaks a rule;
        ShardFileError if the shard cannot be reached; IndexError past the end.
        """
        return self._record(number, self.members(number))

    def outline(self, number: int) -> Record:
        """Read record `number` without its pictures, for measuring and planning: only its text members are fetched.

        An image part that is a member holds a string instead, "SHARD/KEY.SUFFIX", unique in the source, and its size;
        a picture inside a JSON (interleaved documents) is bytes as ever. Raises as `__getitem__`, for the text alone.
        """
        shard, place, wanted = self._wanted(number)
        # Measuring reads the text of a sample alone, a small part of its bytes.
        texts = [m for m in wanted if extension(self._suffixes[m[_SUFFIX]]) not in IMAGES]
        found = self._read(self._path(shard), texts, place) if texts else {}
        names = {self._suffixes[m[_SUFFIX]]: f"{shard}/{self.key(number)}.{self._suffixes[m[_SUFFIX]]}" for m in wanted}
        # Stands in for a picture's bytes; no reader of samples looks into them.
        marks = {s: name.encode() for s, name in names.items() if extension(s) in IMAGES}
        sizes = {self._suffixes[m[_SUFFIX]]: (m[_WIDTH], m[_HEIGHT]) for m in wanted}
        record = self._record(number, found | marks, sizes)
        # The record is built by the very code that builds the whole one, so that an outline has its turns, refusals and
        # order of pictures.
        known: dict[Any, Image] = {mark: Image(names[suffix], sizes[suffix]) for suffix, mark in marks.items()}

        def named(part: Part) -> Part:
            return known[part.source] if isinstance(part, Image) and part.source in known else part

        turns = tuple(replace(turn, parts=tuple(named(part) for part in turn.parts)) for turn in record.turns)
        return replace(record, turns=turns)

    def _record(
        self, number: int, members: dict[str, bytes], sizes: Mapping[str, tuple[int, int]] | None = None
    ) -> Record:
        header = self.index.header
        given: dict[str, Any] = {"caption": header["caption"], "options": _options(header), "sizes": sizes}
        record = to_record(self.key(number), members, where=self.where(number), **given)
        # Where a record came from stays what the builder wrote; only records that say nothing are named after the
        # folder.
        if not record.source and record.row is None:
            record = replace(record, source=self.origin, row=number + 1)
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def key(self, number: int) -> str:
        """The key of a sample."""
        row = self._row(number)
        start = int(row["key"])
        # A damaged index must not end a run with an error of decoding; what it points at fails its checksum.
        return self.index.keys[start : start + int(row["key_size"])].tobytes().decode("utf-8", "replace")

    def where(self, number: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self._shard(self._row(number))}: {short(self.key(number))}"

    def members(self, number: int) -> dict[str, bytes]:
        """Read the members of sample `number` as {suffix: bytes}, in the tar's order. Raises as `__getitem__`."""
        shard, place, wanted = self._wanted(number)
        return self._read(self._path(shard), wanted, place)

    def _wanted(self, number: int) -> tuple[str, str, list[Member]]:
        """Return shard, place for messages, and the index rows of the members of a sample."""
        row = self._row(number)
        shard = self._shard(row)
        place = f"{shard}: {short(self.key(number))}"
        first, count = int(row["member"]), int(row["members"])
        rows = self.index.members[first : first + count].tolist()
        # Pictures inside a JSON have a row for their size, and no place of their own in the tar.
        wanted = [m for m in rows if not m[_INLINE]]
        # The index may come from anywhere, and its numbers become places in files: none is trusted.
        if len(rows) != count or not wanted or any(m[_SUFFIX] >= len(self._suffixes) for m in wanted):
            raise RecordError("the index is damaged", where=place, remedy=_REBUILD)
        sizes = [(self._suffixes[m[_SUFFIX]], m[_SIZE]) for m in wanted]
        check_members(sizes, where=place, limits=self._limits)
        return shard, place, wanted

    def _read(self, path: str, wanted: list[Member], place: str) -> dict[str, bytes]:
        found = {}
        for start, data, group in self._spans(path, wanted):
            for m in group:
                suffix = self._suffixes[m[_SUFFIX]]
                begin, end = m[_START] - start, m[_START] - start + _span(m)
                piece = data[begin:end]
                if len(piece) < end - begin:
                    left = f"member {short(suffix)} is cut short ({len(piece):,} of {end - begin:,} bytes)"
                    raise RecordError(left, where=place, remedy=_CHANGED)
                # Over header and content: a member that was renamed or replaced in place shows too.
                if zlib.crc32(piece) != m[_CRC]:
                    problem = f"member {short(suffix)} is not what was indexed (crc32 differs)"
                    raise RecordError(problem, where=place, remedy=_CHANGED)
                found[suffix] = bytes(piece[m[_LEAD] : m[_LEAD] + m[_SIZE]])
        return found

    def verify(self) -> list[RecordError]:
        """Read every shard whole; return what differs from the index, headers and ends of archives included."""
        problems = []
        for shard in self.index.header["shards"]:
            # Known limit of reading single samples: bytes between members are covered by this whole pass alone.
            crc = length = 0
            with open_shard(self._path(shard["name"])) as (file, _):
                while chunk := file.read(1 << 20):
                    crc, length = zlib.crc32(chunk, crc), length + len(chunk)
            if (crc, length) != (shard["crc32"], shard["size"]):
                problem = f"{length:,} bytes with crc32 {crc:08x}, {shard['size']:,} with {shard['crc32']:08x} indexed"
                problems.append(RecordError(problem, where=shard["name"], remedy=_CHANGED))
        return problems

    def _row(self, number: int) -> np.void:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        row: np.void = self.index.samples[number]
        return row

    def _shard(self, row: np.void) -> str:
        shard = int(row["shard"])
        if shard >= len(self.index.header["shards"]):
            raise RecordError("the index is damaged", where=self.origin, remedy=_REBUILD)
        return str(self.index.header["shards"][shard]["name"])

    def _path(self, shard: str) -> str:
        return _join(self.origin, shard)

    def _spans(self, path: str, members: list[Member]) -> Iterator[tuple[int, memoryview, list[Member]]]:
        """Read neighbouring members together; yield (start, bytes, members)."""
        group: list[Member] = []
        end = 0
        for m in members:
            # Over a network a request costs more than 64 KiB of bytes that nobody wants.
            if group and not 0 <= m[_START] - end <= _GAP:
                yield self._span(path, group, end)
                group = []
            group.append(m)
            end = m[_START] + _span(m)
        yield self._span(path, group, end)

    def _span(self, path: str, group: list[Member], end: int) -> tuple[int, memoryview, list[Member]]:
        start = group[0][_START]
        return start, memoryview(self._ranges.read(path, start, end - start)), group


# Places in a MEMBER row, which is read as one tuple, since the fields of numpy records are slow one by one.
_START, _LEAD, _SIZE, _CRC, _WIDTH, _HEIGHT, _SUFFIX, _INLINE = range(8)


def _span(member: Member) -> int:
    return int(member[_LEAD]) + padded(member[_SIZE])


def open_shards(
    folder: str | os.PathLike[str],
    *,
    name: str = "",
    limit: int | None = None,
    cache: str | os.PathLike[str] = ".",
    limits: Limits | None = None,
) -> ShardSource:
    """Open a folder written by `build_shards` or `index_tars`.

    Args:
        folder: local, or hf://, s3://, http(s)://, whose index (not its shards) is copied to `cache` once.
        limit: use only the first `limit` records. limits: of members and samples.

    Raises:
        ConfigError: no index, one of another version, or shards that are missing or of another size than indexed.
        ShardFileError: a remote folder that cannot be reached, or a refused scheme.
    """
    path = os.fspath(folder)
    source = ShardSource(
        path if is_remote(path) else os.path.abspath(path),
        name=name,
        limit=limit,
        cache=os.fspath(cache),
        limits=limits,
    )
    _check_shards(source)
    return source


def has_index(folder: str | os.PathLike[str]) -> bool:
    """Say whether a path is a local folder with an index of shards, or a URL, which can be nothing else."""
    return is_remote(os.fspath(folder)) or os.path.isfile(os.path.join(folder, INDEX))


def _check_shards(source: ShardSource) -> None:
    wrong = []
    for shard in source.index.header["shards"]:
        path = source._path(shard["name"])
        if is_remote(path):
            continue
        try:
            # Sizes alone: checking every byte at each start would read the whole data set. Each record checks its own
            # when it is read.
            size = os.stat(path).st_size
        except OSError as error:
            wrong.append(f"{shard['name']}: {error.strerror}")
            continue
        if size != shard["size"]:
            wrong.append(f"{shard['name']}: {size:,} bytes, {shard['size']:,} when indexed")
    if wrong:
        number = len(source.index.header["shards"])
        listed = "; ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else "")
        problem = f"{len(wrong)} of {number} shards are missing or changed ({listed})"
        raise ConfigError(problem, where=source.origin, remedy="Restore them, or index the folder again.")


def _join(folder: str, name: str) -> str:
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}"


def _open_index(folder: str, cache: str) -> Index:
    try:
        with open_shard(_join(folder, INDEX)) as (file, _):
            header = json.loads(file.read())
    except ShardFileError as error:
        if not error.missing:
            raise
        remedy = "Write one with `mmit data pack`, or `mmit data index` for existing tars."
        raise ConfigError(f"no index of shards ({error.problem})", where=folder, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("index.json is damaged", where=folder, remedy=_REBUILD) from error
    _check_header(header, folder)
    local = Path(folder) / header["folder"] if not is_remote(folder) else _fetched(folder, header, Path(cache))
    # Mapped and not read: an index of a hundred million samples is some GB, of which a rank needs a part.
    arrays = {}
    for name in ARRAYS:
        try:
            array = np.load(local / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except Exception as error:
            # numpy reads the header as a Python literal: damage surfaces as whatever its tokenizer raises.
            raise ConfigError(f"{name}.npy is missing or damaged", where=str(local), remedy=_REBUILD) from error
        if array.dtype != DTYPES[name] or array.shape != (header["lengths"][name],):
            raise ConfigError(f"{name}.npy does not fit index.json", where=str(local), remedy=_REBUILD)
        arrays[name] = array.view(np.ndarray)
    return Index(header, **arrays)


def _check_header(header: Any, folder: str) -> None:
    """Check the types that the reader relies on: an index may come from anywhere."""
    version = header.get("mmit_index") if isinstance(header, dict) else None
    if version != VERSION:
        problem = f"index.json is of version {short(version)}, not {VERSION}"
        raise ConfigError(problem, where=folder, remedy=_REBUILD)
    sound = (
        all(isinstance(header.get(k), list) for k in ("shards", "sources", "suffixes"))
        and all(isinstance(header.get(k), str) for k in ("folder", "fingerprint"))
        and _sound_caption(header.get("caption"))
        and _sound_options(_options(header))
        and isinstance(header.get("lengths"), dict)
        and all(isinstance(header["lengths"].get(k), int) for k in ARRAYS)
        and all(isinstance(s, str) for s in header["suffixes"])
        and all(isinstance(s, dict) for s in header["shards"])
        and all(isinstance(s.get("name"), str) for s in header["shards"])
        and all(isinstance(s.get(k), int) for s in header["shards"] for k in ("size", "crc32"))
        and re.fullmatch("index-[0-9a-f]{16}", header["folder"]) is not None
    )
    if sound and is_remote(folder):
        # A foreign folder must not have files of this machine, or of another, read as its shards.
        sound = not any("://" in n or n.startswith(("/", "\\")) or ".." in n for n in _names(header))
    if not sound:
        raise ConfigError("index.json is damaged", where=folder, remedy=_REBUILD)


def _names(header: dict[str, Any]) -> list[str]:
    return [shard["name"] for shard in header["shards"]]


def _sound_caption(options: Any) -> bool:
    """The only words of an index that become part of a record."""
    if not isinstance(options, dict) or not options.keys() <= {"instruction", "seed"}:
        return False
    said = options.get("instruction")
    texts = said if isinstance(said, list) else [said or ""]
    return isinstance(options.get("seed", 0), int) and all(isinstance(t, str) for t in texts)


def _options(header: dict[str, Any]) -> Any:
    return header.get("options", header.get("boxes", {}))  # indices of earlier versions have boxes alone


def _sound_options(options: Any) -> bool:
    if not isinstance(options, dict) or not options.keys() <= SHARED_OPTIONS.keys():
        return False
    try:
        check_shared(options)
    except ConfigError:
        return False
    return True


def _fetched(folder: str, header: dict[str, Any], cache: Path) -> Path:
    """Copy the arrays of a remote index to `cache`, once."""
    digest = hashlib.sha256(f"{folder} {header['fingerprint']}".encode()).hexdigest()[:16]
    local = cache / f"shards-{digest}"
    for name in ARRAYS:
        target = local / f"{name}.npy"
        if not target.exists():
            with open_shard(_join(folder, f"{header['folder']}/{name}.npy")) as (file, _):
                write_atomic(target, file.read())
    return local
