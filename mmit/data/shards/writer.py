"""Building shards: records in, a folder of plain WebDataset tars and their index out.

Owns the layout of a sample (KEY.json, the canonical record, and KEY.0.jpg, KEY.1.png ..., the pictures' own bytes), the
cut into shards and the resuming of a build. The same records and options give the same bytes whatever the number of
workers. Never re-encodes a picture unless `max_side` asks for it, never leaves a record out without reporting it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL

from mmit.data.images import load_rgb
from mmit.data.shards.files import run_jobs
from mmit.data.shards.index import (
    INDEX,
    VERSION,
    Part,
    load_part,
    save_part,
    write_index,
)
from mmit.data.shards.records import (
    check_members,
    from_record,
    picture_format,
    picture_size,
)
from mmit.data.shards.scan import ScanOptions, scan_tar
from mmit.errors import ConfigError, ImageError, RecordError
from mmit.io import unwritable
from mmit.processes import only_one
from mmit.records import Image, OnBad, Record, short

PARTS = ".parts"
# What TarWriter needs to write the same bytes whoever runs it, and when.
_OWNER = {"user": "mmit", "group": "mmit", "mode": 0o444, "mtime": 0}
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    records: int
    shards: int
    kept: int  # shards that were there already, their inputs unchanged
    bad: int  # records that were reported and left out
    bytes: int


@dataclass
class _Chunk:
    """The records of one shard."""

    number: int
    first: int  # number of its first record, which makes the keys
    records: list[Record] = field(default_factory=list)
    size: int = 0
    digest: Any = None

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"


@dataclass(frozen=True)
class _Options:
    out: str
    max_side: int | None
    scan: ScanOptions


def build_shards(
    records: Iterable[Record],
    out_dir: str | os.PathLike[str],
    *,
    max_bytes: int = 256 << 20,
    workers: int = 1,
    max_side: int | None = None,
    on_bad: OnBad | None = None,
    progress: Callable[[int, int], None] | None = None,
    **accepted: Any,
) -> BuildReport:
    """Write records as shards of about `max_bytes` with an index, one sample per record, in their order.

    A folder that holds shards of an interrupted or an earlier build keeps those whose records, files (by path, size
    and time) and options are the same; the others are written anew. Memory: 2 * workers shards of records are held,
    without the bytes of pictures that are files.

    Args:
        max_bytes: a shard is closed before it would exceed this; a single larger record is a shard of its own.
        workers: processes.
        max_side: scale larger pictures down to this longer side, JPEG staying JPEG (quality 95), others PNG.
        on_bad: takes each record that cannot be written; None raises the first.
        progress: called with (records, shards) done.
        accepted: max_pixels and limits of `ScanOptions`; a record that exceeds them is a bad one.

    Raises:
        RecordError: a bad record without `on_bad`. ConfigError: no record, a folder that cannot be written.
    """
    from webdataset import TarWriter  # noqa: F401  loaded here once, so that forked workers share it

    if max_side is not None and max_side < 2:
        raise ConfigError(f"max_side {max_side} is below 2 pixels", remedy="Leave it out to keep pictures as they are.")
    out = Path(out_dir)
    options = _Options(str(out), max_side, ScanOptions.of(accepted))
    bad = _Bad(on_bad)
    parts: list[Part] = []
    done = kept = 0
    with _locked(out):
        earlier = _shards_of(out)
        jobs = ((chunk, options) for chunk in _chunks(records, max_bytes, options, bad))
        for part, was_kept in run_jobs(_shard, jobs, workers=workers):
            for error in part.bad:
                bad(error)
            done, kept = done + len(part.samples), kept + was_kept
            parts.append(part)
            if progress is not None:
                progress(done, len(parts))
        earlier |= {part.name for part in parts}
        parts = [part for part in parts if len(part.samples)]
        if not parts:
            raise ConfigError("no record to write", where=str(out), remedy="Check the input and what was reported.")
        write_index(parts, out, build={"max_side": max_side, "max_bytes": max_bytes})
        # Only after the index, which says what is in the folder: a kill before this leaves files that no reader opens.
        for name in earlier - {part.name for part in parts}:
            (out / name).unlink(missing_ok=True)
            _part_path(out, name).unlink(missing_ok=True)
    return BuildReport(done, len(parts), kept, bad.count, sum(part.size for part in parts))


@dataclass
class _Bad:
    """Hands bad records on and counts them; raises the first where nobody takes them."""

    take: OnBad | None
    count: int = 0

    def __call__(self, error: RecordError) -> None:
        if self.take is None:
            raise error
        self.count += 1
        self.take(error)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second build out of the folder; the lock ends with the process, however it ends."""
    with only_one(out / PARTS / "lock", "build", folder=out):
        for draft in out.glob(".shard-*.tmp"):
            draft.unlink()
        yield


def _shards_of(out: Path) -> set[str]:
    """Names of shards that builds have left in the folder."""
    found = {path.name for path in out.glob("shard-[0-9]*.tar") if _part_path(out, path.name).exists()}
    index = out / INDEX
    if index.exists() and not found:
        remedy = "Give an empty folder for the build."
        raise ConfigError("holds an index of other tars", where=str(out), remedy=remedy)
    return found


def _part_path(out: Path, name: str) -> Path:
    return out / PARTS / f"{name}.npz"


def _chunks(records: Iterable[Record], max_bytes: int, options: _Options, bad: OnBad) -> Iterator[_Chunk]:
    """Cut the stream of records into shards by what their files weigh, before any picture is read."""
    chunk = _Chunk(0, 0)
    chunk.digest = _digest(options)
    for record in records:
        try:
            record.validate(for_training=None)
            row = json.dumps(record.to_json(), ensure_ascii=False).encode()
            facts, size = _weigh(record)
        except RecordError as error:
            bad(error)
            continue
        size += len(row) + 1024 * (len(record.images) + 1)
        # By what files weigh, before any is read: where a shard ends must not depend on who writes it.
        if chunk.records and chunk.size + size > max_bytes:
            yield _sealed(chunk)
            chunk = _Chunk(chunk.number + 1, chunk.first + len(chunk.records))
            chunk.digest = _digest(options)
        # Lengths too, so that no two lists of records can make the same bytes.
        chunk.digest.update(b"%d %d " % (len(row), len(facts)) + row + facts)
        chunk.records.append(record)
        chunk.size += size
    if chunk.records:
        yield _sealed(chunk)


def _digest(options: _Options) -> Any:
    # Only a re-encoded picture depends on Pillow's version.
    encoder = PIL.__version__ if options.max_side else ""
    return hashlib.sha256(repr((VERSION, options.max_side, encoder, options.scan)).encode())


def _sealed(chunk: _Chunk) -> _Chunk:
    """Replace the running hash, which cannot go to another process, by its value."""
    chunk.digest.update(b"from %d" % chunk.first)
    chunk.digest = chunk.digest.hexdigest()
    return chunk


def _weigh(record: Record) -> tuple[bytes, int]:
    """Return what tells the record's files from changed ones, and their bytes."""
    facts, total = [], 0
    for image in record.images:
        if isinstance(image.source, str):
            try:
                stat = os.stat(image.source)
            except OSError as error:
                problem = f"cannot open the image {short(image.source, 120)}: {error.strerror}"
                remedy = "Check the path; relative paths start at the data file's folder, or at its image_root."
                raise ImageError(problem, where=record.where, remedy=remedy) from error
            # Size and time stand for the content: hashing every picture would read all of it.
            facts.append((stat.st_size, stat.st_mtime_ns))
            total += stat.st_size
        elif isinstance(image.source, bytes):
            total += len(image.source)
        else:
            total += image.source.width * image.source.height * 3
    return repr(facts).encode(), total


def _shard(chunk: _Chunk, options: _Options) -> tuple[Part, bool]:
    """Write one shard, unless it is there; return its index and whether it was."""
    out = Path(options.out)
    path, part_path = out / chunk.name, _part_path(out, chunk.name)
    kept = load_part(part_path, chunk.digest)
    if kept is not None and path.is_file() and path.stat().st_size == kept.size:
        return kept, True
    draft = out / f".{chunk.name}.{os.getpid()}.tmp"
    try:
        bad = _write_tar(chunk, draft, options)
        # Indexed from the file as it was written, by the very code that indexes foreign tars: what the index says has
        # been read once.
        part = scan_tar(str(draft), chunk.name, options.scan)
        if any(part.bad) and len(bad) < len(chunk.records):
            raise part.bad[0]
        part.bad = bad
        # An index of the earlier build would no longer describe the folder.
        (out / INDEX).unlink(missing_ok=True)
        # The shard before its part, which says that the shard is whole.
        os.replace(draft, path)
        save_part(part, part_path, chunk.digest)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        draft.unlink(missing_ok=True)
    return part, False


def _write_tar(chunk: _Chunk, draft: Path, options: _Options) -> list[RecordError]:
    from webdataset import TarWriter

    bad = []
    with open(draft, "wb") as file:
        # compress=False: by default TarWriter decides by the name of the file, which it does not know here.
        with TarWriter(file, encoder=False, compress=False, **_OWNER) as tar:
            for number, record in enumerate(chunk.records, chunk.first):
                key = f"{number:09d}"
                try:
                    tar.write({"__key__": key, **_members(record, key, options)})
                except RecordError as error:
                    bad.append(error)
        # On the disk before the rename: after a power cut a shard of the right name would be empty.
        file.flush()
        os.fsync(file.fileno())
    return bad


def _members(record: Record, key: str, options: _Options) -> dict[str, bytes]:
    pictures = [_picture(image, record.where, options) for image in record.images]
    members = from_record(record, key, pictures)
    sizes = [(suffix, len(data)) for suffix, data in members.items()]
    check_members(sizes, where=record.where, limits=options.scan.limits)
    return members


def _picture(image: Image, where: str, options: _Options) -> bytes:
    """Return the bytes of a picture as they came, checked by header, scaled down if asked for."""
    source, limit = image.source, options.scan.limits.member_bytes
    if isinstance(source, str):
        where = f"{where}: {short(source, 120)}"
        try:
            if not os.path.isfile(source):
                raise ImageError("not a file", where=where, remedy="Check the path.")
            with open(source, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            problem = f"cannot read the image: {error.strerror}"
            raise ImageError(problem, where=where, remedy="Check the file.") from error
    elif isinstance(source, bytes):
        data = source
    else:
        data = _encoded(image)
    kind = picture_format(data, where=where)
    width, height = picture_size(data, where=where)
    if width * height > options.scan.max_pixels:
        problem = f"{width} x {height} pixels are more than the {options.scan.max_pixels:,} allowed"
        raise ImageError(problem, where=where, remedy="Scale it down, or raise max_pixels if it is trusted.")
    # The bytes as they came: decoding and encoding again would lose quality, and make the bytes depend on Pillow.
    if options.max_side is None or max(width, height) <= options.max_side:
        return data
    picture = load_rgb(Image(data), where=where, max_pixels=options.scan.max_pixels)
    picture.thumbnail((options.max_side, options.max_side))
    out = BytesIO()
    if kind == "JPEG":
        picture.save(out, "JPEG", quality=_JPEG_QUALITY)
    else:
        picture.save(out, "PNG")
    return out.getvalue()


def _encoded(image: Image) -> bytes:
    """A decoded PIL picture as PNG, by the rules of Record.to_json."""
    part = Record.triple("", "", images=[image]).to_json()["turns"][0]["parts"][0]
    return base64.b64decode(part["image_base64"])
