"""The first pass over the data of a run: what every record takes, found once and kept.

In: `InstructionData`. Out: `Measurements`, numbers alone, one row a unit. Records are measured in pieces by as many
processes as are allowed; nothing of a record stays in memory but its numbers. What was found for a source is kept in a
`Store` under everything it depends on (content, format, chat, tokenizer, pictures' preparation, lengths, this code),
verdicts on bad records included, and mapped at the next start if all picture files are as they were.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

from mmit.data.chat_turns import has_thought
from mmit.data.formats.keys import kept_keys
from mmit.data.marks import Contents, content_of
from mmit.data.packing import Sample, trie_length
from mmit.data.picture_files import Looked, PictureFiles, hash_of, joined, stamp, table
from mmit.data.prefetch import in_order
from mmit.data.store import Arrays, Store, code_version, key_of
from mmit.errors import RecordError, from_facts

if TYPE_CHECKING:
    from mmit.data.dataset import InstructionData, PlacedImage
    from mmit.records import Record

PIECE = 256  # records that a process is given at once
TOGETHER = 32  # records of a piece that go through a stage together
FEW = 2000  # records that are measured here, since processes take longer to begin
FILES = 8192  # picture files looked at at once

Progress = Callable[[int, int], Any]  # records measured, of how many


@dataclass
class Measurements:
    """What the scan found; arrays have one entry per unit."""

    record: np.ndarray  # (U,) int64, number of the record over all sources
    first: np.ndarray  # (U,) int64, first pair of the unit
    last: np.ndarray  # (U,) int64, one past its last pair
    length: np.ndarray  # (U,) int64, tokens it takes in a row of its own
    source: np.ndarray  # (U,) int64, which source
    supervised: int = 0  # supervised tokens in all
    shared: int = 0  # tokens every unit begins with
    pictures: int = 0  # distinct pictures, by path or bytes
    crops: int = 0  # what the tower sees of them
    bad: list[RecordError] = field(default_factory=list)
    records: int = 0  # those measured, and the rows of the files that became no record
    # (U,) int64, crops that the tower sees for the unit alone
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    kept: list[dict[str, int]] = field(default_factory=list)  # per source, keys that stay in the meta unread, and rows
    thoughts: int = 0  # records with an answer that begins with a thought
    contents: list[str] = field(default_factory=list)  # per source, a hash of what is learned from it; see `marks`

    @property
    def illustrated(self) -> np.ndarray:
        """(I,) int64, numbers of the records with pictures, in order."""
        return np.unique(self.record[self.seen > 0])


@dataclass
class Piece:
    """What was found about some records of one source; numbers are those in the source."""

    units: np.ndarray  # (5, U) int64: record, first, last, length, crops
    pictures: np.ndarray  # (2, P) uint64: hash of a picture's key, its crops; distinct, sorted
    names: np.ndarray  # (N,) uint8, paths of picture files, one after the other
    ends: np.ndarray  # (F,) int64, where each path ends
    stamps: np.ndarray  # (F,) int64, of each file, see `picture_files.stamp`
    supervised: int
    thoughts: int
    head: tuple[int, ...] | None  # tokens all begin with; None of no record
    bad: list[list[str]]  # facts of errors
    kept: dict[str, int]  # keys that stay in the meta unread, where the source does not know them
    content: str  # a hash of what is learned from the records, in their order
    records: int
    read: Arrays = field(default_factory=table)  # picture files that were not known before

    @property
    def arrays(self) -> Arrays:
        """What is kept as arrays."""
        return {name: getattr(self, name) for name in ("units", "pictures", "names", "ends", "stamps")}

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept as JSON."""
        names = ("supervised", "thoughts", "head", "bad", "kept", "content", "records")
        return {name: getattr(self, name) for name in names}


def scan(
    data: InstructionData,
    *,
    workers: int = 0,
    numbers: Sequence[int] | np.ndarray | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Measure every record, or those of `numbers`; bad ones are listed in the result, not raised.

    Args:
        workers: processes; none for a few records.
        store: where whole sources are looked up and kept.
        progress: gets the records done and their number, now and then.
    """
    chosen = None if numbers is None else np.asarray(list(numbers), dtype=np.int64)
    total = len(data) if chosen is None else len(chosen)
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    pieces = []
    for source in range(len(data.sources)):
        if chosen is None:
            # Source by source, so that a change of one leaves what is kept of the others. Parts of a source are never
            # kept.
            places: Sequence[int] | np.ndarray = range(len(data.sources[source]))
            pieces.append(_kept(data, source, store, workers, advance))
        else:
            first = data.starts[source]
            places = chosen[(chosen >= first) & (chosen < first + len(data.sources[source]))] - first
            pieces.append(_measured(data, source, places, workers, advance, PictureFiles()))
    out = _whole(data, pieces)
    if chosen is None:
        # Rows that became no record count among the records of which a share may be bad.
        out.records += sum(opened.unreadable for opened in data.sources)
    return out


def source_key(data: InstructionData, source: int) -> str:
    """Under which a source's measurements are kept."""
    opened = data.sources[source]
    seen = None if data.preparation is None else asdict(data.preparation)
    lengths: list[Any] = [data.max_length, data.capacity, data.split_turns, data.share_prefix, data.compares]
    lengths += [] if data.choosing is None else [asdict(data.choosing)]
    # The weight is in the key because it multiplies the loss weights, of which the content hash is made.
    weight = data.source_weights[source]
    return key_of(opened.fingerprint, len(opened), data.key, weight, seen, lengths, code_version())


def is_kept(data: InstructionData, store: Store) -> bool:
    """Whether all sources have been measured."""
    keys = [source_key(data, source) for source in range(len(data.sources))]
    return bool(data.key) and all((store.folder / f"measured-{key}").is_dir() for key in keys)


def _kept(
    data: InstructionData, source: int, store: Store | None, workers: int, advance: Callable[[int], None]
) -> Piece:
    """A source's measurements, from the store if its picture files are as they were."""
    places = range(len(data.sources[source]))
    if store is None or not data.key:
        return _measured(data, source, places, workers, advance, PictureFiles())
    key = source_key(data, source)
    found = store.find("measured", key)
    if found is not None:
        facts, arrays = found
        head = None if facts["head"] is None else tuple(facts["head"])
        piece = Piece(**{**facts, **arrays, "head": head})
        # The key names rows, not pictures: a picture file that changed may give other tokens, or none.
        changed = _changed(piece, workers=workers)
        if not changed:
            advance(len(places))
            return piece
        origin = data.sources[source].origin
        store.say(f"{origin}: {changed} picture files are not as they were when they were measured: measuring again")
    known = PictureFiles(store, key_of(data.sources[source].fingerprint, len(places), code_version()))
    piece = _measured(data, source, places, workers, advance, known)
    known.keep(piece.read)
    store.keep("measured", key, piece.facts, piece.arrays)
    return piece


def _measured(
    data: InstructionData,
    source: int,
    places: Sequence[int] | np.ndarray,
    workers: int,
    advance: Callable[[int], None],
    known: PictureFiles,
) -> Piece:
    """Measure records of a source."""
    cut = [places[begin : begin + PIECE] for begin in range(0, len(places), PIECE)]
    # Pieces are measured by whoever is free and joined in order, so the result does not depend on the workers.
    workers = workers if len(places) > FEW else 0

    def results() -> Iterator[Piece]:
        for piece in in_order(lambda some: _measure(data, source, some, known), cut, workers=workers):
            advance(piece.records)
            yield piece

    return _joined(list(results()))


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one source as one."""
    # Where each piece's names begin among all names: its `ends` count from there.
    before = np.cumsum([0, *(len(piece.names) for piece in pieces)])
    contents = Contents()
    for piece in pieces:
        contents.extend(Contents(piece.content))
    units = [np.zeros((5, 0), np.int64), *(piece.units for piece in pieces)]
    ends = [np.zeros(0, np.int64), *(piece.ends + begin for piece, begin in zip(pieces, before, strict=False))]
    return Piece(
        np.ascontiguousarray(np.concatenate(units, axis=1)),
        _distinct([piece.pictures for piece in pieces]),
        np.concatenate([np.zeros(0, np.uint8), *(piece.names for piece in pieces)]),
        np.concatenate(ends),
        np.concatenate([np.zeros(0, np.int64), *(piece.stamps for piece in pieces)]),
        sum(piece.supervised for piece in pieces),
        sum(piece.thoughts for piece in pieces),
        _common_head(piece.head for piece in pieces),
        [facts for piece in pieces for facts in piece.bad],
        dict(sum((Counter(piece.kept) for piece in pieces), Counter[str]())),
        str(contents),
        sum(piece.records for piece in pieces),
        joined([piece.read for piece in pieces]),
    )


def _whole(data: InstructionData, pieces: Sequence[Piece]) -> Measurements:
    """The sources' measurements as those of the run; of one source they are not copied."""
    starts = data.starts
    # One source is the common case, and its arrays may be mapped from the store: gigabytes that need not be copied.
    if len(pieces) == 1:
        columns = list(pieces[0].units)
        source = np.zeros(len(columns[0]), dtype=np.int64)
        pictures = pieces[0].pictures
    else:
        units = np.concatenate([piece.units for piece in pieces], axis=1)
        counts = [piece.units.shape[1] for piece in pieces]
        source = np.repeat(np.arange(len(pieces)), counts)
        units[0] += np.repeat(np.asarray(starts, dtype=np.int64), counts)
        columns = list(units)
        pictures = _distinct([piece.pictures for piece in pieces])
    record, first, last, length, seen = columns
    head = _common_head(piece.head for piece in pieces)
    return Measurements(
        record,
        first,
        last,
        length,
        source,
        supervised=sum(piece.supervised for piece in pieces),
        thoughts=sum(piece.thoughts for piece in pieces),
        shared=len(head or ()) if data.share_prefix else 0,
        pictures=pictures.shape[1],
        crops=int(pictures[1].sum()),
        bad=[from_facts(facts) for piece in pieces for facts in piece.bad],
        records=sum(piece.records for piece in pieces),
        seen=seen,
        kept=[{**opened.kept, **piece.kept} for opened, piece in zip(data.sources, pieces, strict=True)],
        contents=[piece.content for piece in pieces],
    )


def _measure(data: InstructionData, source: int, places: Sequence[int] | np.ndarray, known: PictureFiles) -> Piece:
    """Measure records of a source here; picture files that are `known` are not opened."""
    units: list[tuple[int, ...]] = []
    pictures: dict[int, int] = {}
    files = Looked(known, data.preparation)
    bad: list[list[str]] = []
    kept: Counter[str] = Counter()
    supervised = thoughts = 0
    head: tuple[int, ...] | None = None
    learned = Contents()
    for begin in range(0, len(places), TOGETHER):
        numbers = [data.starts[source] + int(place) for place in places[begin : begin + TOGETHER]]
        # Stage by stage: the code and the tables of one stage stay in the core's caches. Record by record the same work
        # takes a fifth longer.
        records = [_read(data, source, number, files, kept) for number in numbers]
        found = [_samples(data, record, number, files) for record, number in zip(records, numbers, strict=True)]
        contents = [b"" if isinstance(one, RecordError) else content_of(*one, files.marks) for one in found]
        for number, record, one, content in zip(numbers, records, found, contents, strict=True):
            if isinstance(one, RecordError):
                # As facts, not as an exception: what is kept must be JSON, and comes from another process.
                bad.append(_placed(data, number, one).facts)
                continue
            samples, shown = one
            # Pictures by a hash of 8 bytes: their paths would be many times that.
            crops = {hash_of(key): picture.spread.crops for key, picture in shown.items()}
            pictures.update(crops)
            seen = sum(crops.values())
            place = number - data.starts[source]
            units += [(place, *span, seen) for span in _chunks(samples, data.capacity, data.share_prefix)]
            supervised += sum(len(sample.weights) - sample.weights.count(0.0) for sample in samples)
            thoughts += has_thought(cast("Record", record), data.own_thought)
            # The system prompt is found and not told: whatever all records begin with is stored once in a row.
            head = _common_head([head, _head(samples)])
            learned.add(content)
    names = [os.fsencode(name) for name in files.stamps]
    return Piece(
        np.array(units, dtype=np.int64).reshape(-1, 5).T,
        np.array([*zip(*sorted(pictures.items()), strict=True)] or [(), ()], dtype=np.uint64),
        np.frombuffer(b"".join(names), dtype=np.uint8),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        np.array(list(files.stamps.values()), dtype=np.int64),
        supervised,
        thoughts,
        head,
        bad,
        dict(kept),
        str(learned),
        len(places),
        files.read(),
    )


def _read(data: InstructionData, source: int, number: int, files: Looked, kept: Counter[str]) -> Record | RecordError:
    """A record, its picture files looked at, or what is wrong with it; counts the keys it keeps unread."""
    try:
        # Without the bytes of pictures: a size is all that tokens depend on.
        record = data.record(number, outline=True)
        if not data.sources[source].rows_checked:
            kept.update(kept_keys(record))
        for image in record.images:
            if not files.at(image, where=record.where):
                _refuse_missing(image.source, record.where)
    except RecordError as error:
        return error
    return record


def _samples(
    data: InstructionData, record: Record | RecordError, number: int, files: Looked
) -> tuple[list[Sample], dict[Hashable, PlacedImage]] | RecordError:
    """The samples of a record and its pictures, or what is wrong with it."""
    if isinstance(record, RecordError):
        return record
    try:
        samples, shown, _ = data.samples_of(record, number, sizes=files.sizes)
    except RecordError as error:
        return error
    return samples, shown


def _refuse_missing(file: object, where: str) -> NoReturn:
    remedy = "check image_root, or set run.on_bad_record=skip"
    raise RecordError(f"image file is missing: {file}", where=where, remedy=remedy)


def _placed(data: InstructionData, number: int, error: RecordError) -> RecordError:
    """The error with the place of its record."""
    return error if error.where else type(error)(error.problem, where=data.record(number).where, remedy=error.remedy)


# --- picture files ------------------------------------------------------------------------------------------------


def _changed(piece: Piece, *, workers: int) -> int:
    """How many picture files are not as they were."""
    count = len(piece.ends)
    cut = [range(begin, min(begin + FILES, count)) for begin in range(0, count, FILES)]

    def job(some: range) -> int:
        begin = int(piece.ends[some.start - 1]) if some.start else 0
        ends = piece.ends[some.start : some.stop].tolist()
        names = piece.names[begin : ends[-1]].tobytes()
        now, last = [], 0
        for end in ends:
            now.append(stamp(os.fsdecode(names[last : end - begin])))
            last = end - begin
        return int((piece.stamps[some.start : some.stop] != np.array(now, dtype=np.int64)).sum())

    return sum(in_order(job, cut, workers=workers if len(cut) > 4 else 0))


def _distinct(tables: Sequence[np.ndarray]) -> np.ndarray:
    """(2, P): the pictures of several tables (2, p), each once."""
    table = np.concatenate([np.zeros((2, 0), np.uint64), *tables], axis=1)
    return table[:, np.unique(table[0], return_index=True)[1]]


# --- one record ---------------------------------------------------------------------------------------------------


def _head(samples: Sequence[Sample]) -> tuple[int, ...]:
    """Tokens that all samples of a record begin with, before the first image."""
    head = samples[0].ids
    for sample in samples[1:]:
        head = head[: _common(head, sample.ids)]
    # Not past an image: its width differs, and sharing images is the trie's business.
    return head[: next((i for i, t in enumerate(head) if t < 0), None)]


def _common_head(heads: Iterable[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """The common beginning of those that are not None; None if all are."""
    found: tuple[int, ...] | None = None
    for head in heads:
        if head is not None:
            found = head if found is None else found[: _common(found, head)]
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n, most = 0, min(len(a), len(b))
    while n < most and a[n] == b[n]:
        n += 1
    return n


def _chunks(samples: Sequence[Sample], capacity: int, share: bool) -> list[tuple[int, int, int]]:
    """Cut a record's samples into units that fit a row, as (first, one past last, tokens)."""
    whole = trie_length(samples, share=share)
    if whole <= capacity:
        return [(0, len(samples), whole)]
    # A unit is a range of neighbouring pairs, filled from the first on.
    spans: list[tuple[int, int, int]] = []
    first, length = 0, 0
    for i in range(len(samples)):
        longer = trie_length(samples[first : i + 1], share=share)
        if longer > capacity and i > first:
            spans.append((first, i, length))
            first, longer = i, trie_length(samples[i : i + 1], share=share)
        length = longer
    return [*spans, (first, len(samples), length)]
