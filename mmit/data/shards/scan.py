"""Scanning tars: every sample of a WebDataset tar checked and measured once, front to back.

Takes tars that mmit or others have written (img2dataset, OpenFlamingo, LLaVA rows with pictures), gives the Parts of
an index. Nothing is left out in silence: damage, a refused member or an unusable sample is reported with its place.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mmit.data.formats.common import check_shared
from mmit.data.shards.files import open_shard, run_jobs
from mmit.data.shards.index import HAS_IMAGE, HAS_SYSTEM, MANY_ANSWERS, MANY_IMAGES, MEMBER, SAMPLE, Part, write_index
from mmit.data.shards.records import (
    IMAGES,
    Limits,
    check_members,
    extension,
    is_ignored,
    picture_size,
    split_name,
    to_record,
)
from mmit.data.shards.tar_headers import Member, TarError, read_members
from mmit.errors import ConfigError, ImageError, RecordError
from mmit.records import OnBad, Record, short


@dataclass(frozen=True)
class ScanOptions:
    """What a scan accepts, and what it makes of captions; the further options of `index_tars`.

    Attributes:
        instruction: what the user says beside the picture of a caption: nothing, a text, or several of which `seed`
            and the key choose one.
        seed: of that choice.
        ignore: extensions ("npy") or suffixes ("seg.png") of members to leave out; counted. Others that are not
            accepted are an error of their sample.
        max_pixels: larger pictures are an error.
        limits: of members and samples.
        shared: options that all formats share: how boxes beside conversations are written, what marks their thoughts.
    """

    instruction: str | tuple[str, ...] | None = None
    seed: int = 0
    ignore: tuple[str, ...] = ()
    max_pixels: int = 50_000_000
    limits: Limits = Limits()
    shared: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ScanOptions:
        """From plain values: sequences become tuples, since the options go to other processes and into a hash.

        `options` of `shared` come as a mapping under that name. Raises ConfigError for one that cannot work.
        """
        given = dict(options)
        said = given.get("instruction")
        given["instruction"] = said if said is None or isinstance(said, str) else tuple(said)
        given["ignore"] = tuple(sorted(word.lower().lstrip(".") for word in given.get("ignore") or ()))
        given["shared"] = tuple(sorted((given.pop("options", None) or {}).items()))
        given["limits"] = given.get("limits") or Limits()
        check_shared(dict(given["shared"]))
        return cls(**given)

    @property
    def caption(self) -> dict[str, Any]:
        """The options of captions, as index.json keeps them."""
        several = self.instruction is not None and not isinstance(self.instruction, str)
        return {"instruction": list(self.instruction or ()) if several else self.instruction, "seed": self.seed}


@dataclass
class _Payload:
    member: Member
    suffix: str
    data: bytes
    crc: int


def scan_tar(path: str, name: str, options: ScanOptions) -> Part:
    """Read one tar once, front to back; return its index, with what is wrong with it in `bad`.

    `name` is the shard's name in the index and in messages. Raises MmitError if the file cannot be read at all.
    """
    with open_shard(path) as (file, size):
        return scan_file(file, size, name=name, options=options)


def scan_file(file: BinaryIO, size: int, *, name: str, options: ScanOptions) -> Part:
    """Like `scan_tar`, for an open file.

    Args:
        file: seekable. size: its bytes. name: of the shard, in the index and in errors.
        options: how samples are read and which members are left out.

    Returns:
        the part; whatever is wrong is among its bad rows.
    """
    part = Part(name, size)
    state = _Scan(part, options)
    reader = _Summed(file, size)
    try:
        for member in read_members(file, size, where=name):
            state.add(member, reader)
    # Damage ends this tar and not the index: the samples before it are sound, and the report says how many bytes were
    # not read.
    except TarError as error:
        part.bad.append(error)
    state.close_sample()
    part.crc = reader.rest()
    part.samples, part.members = np.array(part.samples, SAMPLE), np.array(part.members, MEMBER)
    if not len(part.samples) and not part.bad:
        part.bad.append(RecordError("holds no sample", where=name, remedy="Leave the empty tar out."))
    return part


class _Summed:
    """Reads spans of a file in ascending order and sums the whole file on the way."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at, self.crc = file, size, 0, 0

    def span(self, start: int, end: int) -> bytes:
        # Every byte of the file goes into its checksum, read or skipped, so that one pass gives both it and the
        # samples.
        self.skip(start)
        self.file.seek(start)
        data = self.file.read(end - start)
        self.crc, self.at = zlib.crc32(data, self.crc), start + len(data)
        return data

    def skip(self, to: int) -> None:
        """Sum the bytes up to `to` without keeping them."""
        self.file.seek(self.at)
        while self.at < to:
            data = self.file.read(min(1 << 20, to - self.at))
            if not data:
                break
            self.crc, self.at = zlib.crc32(data, self.crc), self.at + len(data)

    def rest(self) -> int:
        self.skip(self.size)
        return self.crc


class _Scan:
    """Groups the members of one tar into samples."""

    def __init__(self, part: Part, options: ScanOptions) -> None:
        self.part, self.options = part, options
        self.key: str | None = None
        self.open: list[_Payload] = []
        self.first_at: dict[str, int] = {}
        self.failed = False

    def add(self, member: Member, reader: _Summed) -> None:
        where = f"{self.part.name}, byte {member.start:,}"
        try:
            if word := is_ignored(member.name, self.options.ignore):
                self.part.left_out[word] += 1
                return
            key, suffix = split_name(member.name, where=where)
        except RecordError as error:
            self.part.bad.append(error)
            return
        # WebDataset has no list of samples: one ends where the next key begins, so its members must be neighbours.
        if key != self.key:
            self.close_sample()
            self.key = key
            if key in self.first_at:
                problem = f"key {short(key)} was there before, at byte {self.first_at[key]:,}"
                # Two samples of one key would be one for WebDataset's readers, with members of both.
                remedy = "Give every sample of a tar its own key, its members one after the other."
                self.fail(RecordError(problem, where=where, remedy=remedy))
            self.first_at.setdefault(key, member.start)
        # One report for each sample: the other members of a bad one would repeat it.
        if self.failed:
            return
        found = [*((p.suffix, p.member.size) for p in self.open), (suffix, member.size)]
        try:
            limits = self.options.limits
            check_members(found, where=f"{self.part.name}: {short(key)}", limits=limits)
            if len(key.encode()) > limits.key_bytes:
                raise RecordError("the key is too long", where=where, remedy="Name the members shorter.")
        except RecordError as error:
            self.fail(error)
            return
        # Header and content in one read, which is what the checksum in the index covers.
        data = reader.span(member.start, member.end)
        if len(data) < member.end - member.start:
            problem = f"{short(key)}: member {short(suffix)} is cut short"
            self.fail(TarError(problem, where=self.part.name, remedy="Fetch or write the tar again."))
            return
        lead = member.offset - member.start
        payload = data[lead : lead + member.size]
        self.open.append(_Payload(member, suffix, payload, zlib.crc32(data)))

    def fail(self, error: RecordError) -> None:
        """Give up the open sample."""
        self.part.bad.append(error)
        self.open, self.failed = [], True

    def close_sample(self) -> None:
        """Turn the open members into a sample, or report why not."""
        if self.open and self.key is not None:
            where = f"{self.part.name}: {short(self.key)}"
            try:
                # A sample is indexed only if it becomes a record here. What cannot be read while indexing would be a
                # bad record in every epoch of every run.
                members = {p.suffix: p.data for p in self.open}
                kept: Counter[str] = Counter()
                given: dict[str, Any] = {"caption": self.options.caption, "options": dict(self.options.shared)}
                record = to_record(self.key, members, where=where, kept=kept, **given)
                self._append(record, where)
                self.part.kept.update(kept)
            except RecordError as error:
                self.part.bad.append(error)
        self.key, self.open, self.failed = None, [], False

    def _append(self, record: Record, where: str) -> None:
        part, first = self.part, len(self.part.members)
        rows = []
        for p in self.open:
            size = (0, 0)
            if extension(p.suffix) in IMAGES:
                size = self._size(p.data, f"{where}, member {short(p.suffix)}")
            suffix = part.suffixes.setdefault(p.suffix, len(part.suffixes))
            m = p.member
            rows.append((m.start, m.offset - m.start, m.size, p.crc, *size, suffix, 0))
        # Pictures inside a JSON (interleaved documents) have no member: they are listed without a place in the tar.
        # By content: the record holds bytes and no names, and a picture that is a member has been listed above.
        stored = {p.data for p in self.open}
        if len(record.images) > self.options.limits.members:
            problem = f"{len(record.images)} pictures are more than the {self.options.limits.members} allowed"
            raise RecordError(problem, where=where, remedy="Split the sample.")
        for image in record.images:
            if isinstance(image.source, bytes) and image.source not in stored:
                size = self._size(image.source, f"{where}, picture inside the JSON")
                rows.append((0, 0, len(image.source), zlib.crc32(image.source), *size, 0, 1))
        flags = HAS_IMAGE * bool(record.images) + MANY_IMAGES * (len(record.images) > 1)
        flags += MANY_ANSWERS * (sum(t.role == "assistant" for t in record.turns) > 1)
        flags += HAS_SYSTEM * (record.turns[0].role == "system")
        key = (self.key or "").encode()
        # Characters and not tokens: an index serves every tokenizer, and lengths are only for statistics.
        chars = sum(len(turn.text) for turn in record.turns)
        source = part.sources.setdefault(record.source, len(part.sources))
        # The order of SAMPLE; the shard's number is known when the parts are joined.
        part.samples.append((0, source, first, len(part.keys), len(rows), len(record.images), len(key), flags, chars))
        part.members.extend(rows)
        part.keys += key

    def _size(self, data: bytes, where: str) -> tuple[int, int]:
        width, height = picture_size(data, where=where)
        if width * height > self.options.max_pixels:
            problem = f"{width} x {height} pixels are more than the {self.options.max_pixels:,} allowed"
            raise ImageError(problem, where=where, remedy="Scale it down, or raise max_pixels if it is trusted.")
        return width, height


def index_tars(
    paths: Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    workers: int = 1,
    on_bad: OnBad | None = None,
    kept: Counter[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **accepted: Any,
) -> int:
    """Index WebDataset tars where they lie, each read once; return the number of samples.

    Args:
        paths: tars, local or hf://, s3://, http(s)://; their order is the order of the samples.
        out_dir: folder of the index; tars inside it are named relative to it, so that it can be moved.
        workers: processes.
        on_bad: takes what is wrong, sample by sample; None raises the first.
        kept: counts the keys that stay in the meta of samples unread; the index keeps these numbers too.
        progress: called with (tars done, tars in all).
        accepted: instruction, seed, ignore, max_pixels and limits, see `ScanOptions`; its `shared` as a mapping under
            the name `options`.

    Raises:
        RecordError: a damaged tar or sample, unless `on_bad` takes it. ConfigError: no tar, or no sample.
    """
    names = [os.fspath(path) for path in paths]
    if not names:
        raise ConfigError("no tar to index", where=str(out_dir), remedy="Give the paths of .tar files.")
    options = ScanOptions.of(accepted)
    folder = os.path.abspath(out_dir)
    jobs = [(path, _shard_name(path, folder), options) for path in names]
    parts = []
    for done, part in enumerate(run_jobs(scan_tar, jobs, workers=workers), 1):
        for error in part.bad:
            if on_bad is None:
                raise error
            on_bad(error)
        parts.append(part)
        if kept is not None:
            kept.update(part.kept)
        if progress is not None:
            progress(done, len(jobs))
    return write_index(parts, out_dir, caption=options.caption, options=dict(options.shared))


def _shard_name(path: str, folder: str) -> str:
    if "://" in path:
        return path
    full = os.path.abspath(path)
    # Relative only inside the folder of the index: a path with .. would break as soon as one of the two is moved.
    return os.path.relpath(full, folder) if full.startswith(folder + os.sep) else full
