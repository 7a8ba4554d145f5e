"""Instruction data: records of several sources, measured once, then served as tokenised samples by number.

Owns the scan that measures every record before training (so that a bad one stops the run, or is counted and
listed, before an hour is spent) and the units of the data order. A unit is a record or, with `split_turns`, as many
of its question-answer pairs as fit a row. Takes an `encode` callable; knows no tokenizer. Refuses to cut a record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import numpy as np

from mmit.data.chat import Encoded
from mmit.data.packing import Sample, trie_length
from mmit.data.preparation import ImagePreparation, Spread
from mmit.data.sources import Source
from mmit.errors import MmitError, RecordError
from mmit.processes import worker_pool
from mmit.records import Image, Record, Turn

Encode = Callable[[Sequence[Turn]], Encoded]


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of a record and the tokens it becomes."""

    image: Image
    spread: Spread


def image_key(image: Image) -> Hashable:
    """What identifies a picture: its path, or the hash of its bytes."""
    if isinstance(image.source, str):
        return image.source
    if isinstance(image.source, bytes):
        return hashlib.sha256(image.source).hexdigest()
    return ("pil", id(image.source))


def split_pairs(record: Record) -> list[tuple[Turn, ...]]:
    """Each question-answer pair as a conversation of its own; all keep the system turn and the images.

    The images must stand in the first user turn, where every pair can see them.
    """
    turns = list(record.turns)
    system = tuple(t for t in turns[:1] if t.role == "system")
    dialogue = turns[len(system) :]
    if any(turn.role == "tool" for turn in dialogue):
        problem = "has tool turns, whose answers need the calls before them, so its pairs cannot be split"
        raise RecordError(problem, where=record.where, remedy="set data.split_turns=false for this data")
    first = tuple(p for p in dialogue[0].parts if isinstance(p, Image))
    if len(first) != len(record.images):
        raise RecordError(
            "has images after its first user turn, so its pairs cannot be split",
            where=record.where,
            remedy="set data.split_turns=false for this data",
        )
    pairs = []
    for i in range(0, len(dialogue), 2):
        question, answer = dialogue[i], dialogue[i + 1]
        if i:
            question = replace(question, parts=(*first, *question.parts))
        pairs.append((*system, question, answer))
    return pairs


@dataclass
class Scan:
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
    illustrated: list[int] = field(default_factory=list)  # numbers of the records with pictures
    bad: list[RecordError] = field(default_factory=list)
    records: int = 0  # those measured, and the rows of the files that became no record
    # (U,) int64, crops that the tower sees for the unit alone
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class InstructionData:
    """Records of several sources as samples.

    Args:
        sources: opened files.
        encode: turns -> ids and mask.
        preparation: what pictures become in the model; None for one that sees nothing.
        max_length: longest sample in tokens, image tokens included.
        capacity: tokens in a row; a unit never exceeds it.
        split_turns: make each question-answer pair a sample of its own.
        share_prefix: count shared beginnings once.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Encode,
        *,
        preparation: ImagePreparation | None,
        max_length: int,
        capacity: int,
        split_turns: bool = False,
        share_prefix: bool = True,
    ) -> None:
        self.sources, self.encode = list(sources), encode
        self.preparation, self.max_length, self.capacity = preparation, max_length, capacity
        self.split_turns, self.share_prefix = split_turns, share_prefix
        self._starts = np.cumsum([0] + [len(s) for s in self.sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def starts(self) -> list[int]:
        """Number of the first record of each source."""
        return self._starts[:-1].tolist()

    def record(self, number: int, *, outline: bool = False) -> Record:
        """Read record `number` (counted over all sources); an outline may lack the bytes of its pictures."""
        source = self.source_of(number)
        place = number - int(self._starts[source])
        return self.sources[source].outline(place) if outline else self.sources[source][place]

    def pictures(self, numbers: Iterable[int]) -> Iterator[tuple[Hashable, Image]]:
        """Yield key and picture of every image of these records, read one record at a time."""
        for number in numbers:
            for image in self.record(number).images:
                yield image_key(image), image

    def source_of(self, number: int) -> int:
        """Which source record `number` belongs to."""
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def samples(self, number: int, *, outline: bool = False) -> tuple[list[Sample], dict[Hashable, Shown], str]:
        """Tokenise record `number`: its samples, its pictures, and its place for messages.

        Raises RecordError when it is invalid or longer than `max_length`.
        """
        record = self.record(number, outline=outline)
        record.validate(for_training=True)
        if record.weight != 1 or record.tools or record.template_args:
            problem = "the record has a weight, tools or template_args, which training does not use"
            raise RecordError(problem, where=record.where, remedy="leave it out: set run.on_bad_record=skip")
        if record.images and self.preparation is None:
            raise RecordError(
                "has images, but the model has no vision tower", where=record.where, remedy="set model.vision"
            )
        shown = {image_key(i): self._show(i, record.where) for i in record.images}
        keys = tuple(image_key(i) for i in record.images)
        widths = tuple(shown[key].spread.tokens for key in keys)
        conversations = split_pairs(record) if self.split_turns else [record.turns]
        samples = []
        for turns in conversations:
            encoded = self.encode(turns)
            sample = Sample(encoded.ids, encoded.supervised, keys, number, widths)
            if sample.length > self.max_length:
                raise RecordError(
                    f"takes {sample.length} tokens ({sum(widths)} of them for {len(keys)} images), more than "
                    f"data.max_length={self.max_length}",
                    where=record.where,
                    remedy="raise data.max_length and data.pack_tokens, shorten the record, or set "
                    "run.on_bad_record=skip",
                )
            samples.append(sample)
        return samples, shown, record.where

    def _show(self, image: Image, where: str) -> Shown:
        assert self.preparation is not None
        return Shown(image, self.preparation.spread(image, where=where))

    def unit_samples(self, scan: Scan, unit: int) -> tuple[list[Sample], dict[Hashable, Shown], str]:
        """Samples of one unit of a scan, as `samples` gives them."""
        samples, images, where = self.samples(int(scan.record[unit]))
        return samples[int(scan.first[unit]) : int(scan.last[unit])], images, where

    def _measure(self, number: int) -> _Measured | RecordError:
        try:
            samples, images, _ = self.samples(number, outline=True)
        except RecordError as error:
            where = error.where or self.record(number).where
            return type(error)(error.problem, where=where, remedy=error.remedy)
        spans = _chunks(samples, self.capacity, self.share_prefix)
        supervised = sum(sum(s.supervised) for s in samples)
        head = samples[0].ids
        for s in samples[1:]:
            head = head[: _common(head, s.ids)]
        head = head[: next((i for i, t in enumerate(head) if t < 0), None)]
        return _Measured(spans, supervised, head, {hash(key): shown.spread.crops for key, shown in images.items()})

    def scan(self, *, workers: int = 0, numbers: Iterable[int] | None = None) -> Scan:
        """Measure every record, in `workers` processes; bad ones are listed in the result, not raised."""
        numbers = range(len(self)) if numbers is None else list(numbers)
        if workers > 1 and len(numbers) > 2000:
            global _scanned
            _scanned = self
            try:
                with worker_pool(workers) as pool:
                    results = list(pool.map(_measure_one, numbers, chunksize=256))
            except BrokenProcessPool as error:
                remedy = "it was probably out of memory: use fewer data.workers"
                raise MmitError("a worker process that measures the data was killed", remedy=remedy) from error
            finally:
                _scanned = None
        else:
            results = [self._measure(n) for n in numbers]
        rows: list[tuple[int, int, int, int, int, int]] = []
        # Rows that became no record count among the records of which a share may be bad.
        unreadable = sum(source.unreadable for source in self.sources) if len(numbers) == len(self) else 0
        out = Scan(*(np.zeros(0, dtype=np.int64),) * 5, records=len(numbers) + unreadable)
        head: tuple[int, ...] | None = None
        seen: dict[int, int] = {}
        for number, result in zip(numbers, results, strict=True):
            if isinstance(result, RecordError):
                out.bad.append(result)
                continue
            source = self.source_of(number)
            rows.extend((number, *span, source, sum(result.images.values())) for span in result.spans)
            out.supervised += result.supervised
            if result.images:
                out.illustrated.append(number)
                seen.update(result.images)
            head = result.head if head is None else head[: _common(head, result.head)]
        table = np.array(rows, dtype=np.int64).reshape(-1, 6)
        out.record, out.first, out.last, out.length, out.source, out.seen = table.T
        out.shared = len(head or ()) if self.share_prefix else 0
        out.pictures, out.crops = len(seen), sum(seen.values())
        return out


@dataclass(slots=True)
class _Measured:
    spans: list[tuple[int, int, int]]  # first pair, one past the last, tokens
    supervised: int
    head: tuple[int, ...]
    images: dict[int, int]  # hashes of their keys -> crops


_scanned: InstructionData | None = None


def _measure_one(number: int) -> _Measured | RecordError:
    assert _scanned is not None
    return _scanned._measure(number)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _chunks(samples: Sequence[Sample], capacity: int, share: bool) -> list[tuple[int, int, int]]:
    """Cut a record's samples into units that fit a row, as (first, one past last, tokens)."""
    whole = trie_length(samples, share=share)
    if whole <= capacity:
        return [(0, len(samples), whole)]
    spans: list[tuple[int, int, int]] = []
    first, length = 0, 0
    for i in range(len(samples)):
        longer = trie_length(samples[first : i + 1], share=share)
        if longer > capacity and i > first:
            spans.append((first, i, length))
            first, longer = i, trie_length(samples[i : i + 1], share=share)
        length = longer
    return [*spans, (first, len(samples), length)]
