"""Instruction data: records of several sources, measured once, then served as tokenised samples by number.

Owns the units of the data order; `measure.py` measures every record before training, so that a bad one stops the run,
or is counted and listed, before an hour is spent. A unit is a record or, with `split_turns`, as many
of its question-answer pairs as fit a row. Takes an `encode` callable; knows no tokenizer. Refuses to cut a record.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mmit.data.chat_turns import OwnThought, no_marks
from mmit.data.chat_writer import Encoded
from mmit.data.choices import branches
from mmit.data.formats.boxes import WRITTEN
from mmit.data.image_identity import image_key
from mmit.data.measure import Measurements, Progress, scan
from mmit.data.packing import Sample, trie_length
from mmit.data.preference import Compares, conversations
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record

if TYPE_CHECKING:
    import numpy as np

    from mmit.data.preparation import ImagePreparation, Spread
    from mmit.data.sources import Source
    from mmit.data.store import Store

Encode = Callable[[Record], Encoded]


@dataclass(frozen=True, slots=True)
class Choosing:
    """Every record is an answer among choices, see `data.choices`, and its loss that of `models.head`."""

    lm: float = 0.0  # part of the loss on the question
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """A picture of a record and the tokens it becomes."""

    image: Image
    spread: Spread


def split_pairs(record: Record) -> list[Record]:
    """Each question-answer pair as a record of its own; all keep the system turn and the images.

    The images must stand in the first user turn, where every pair can see them.
    """
    turns = list(record.turns)
    system = tuple(t for t in turns[:1] if t.role == "system")
    dialogue = turns[len(system) :]
    if any(turn.role == "tool" for turn in dialogue):
        problem = "has tool turns, whose answers need the calls before them, so its pairs cannot be split"
        raise RecordError(problem, where=record.where, remedy="set data.split_turns=false for this data")
    # A pair repeats the pictures it may be about. Which later pictures a later question is about cannot be known, so
    # only pictures that all pairs can see are repeated.
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
        pairs.append(replace(record, turns=(*system, question, answer)))
    return pairs


@dataclass(frozen=True, slots=True)
class SampleRules:
    """What becomes of a record, and how large it may be; the further options of `InstructionData`.

    Attributes:
        max_length: longest sample in tokens, image tokens included.
        capacity: tokens in a row; a unit never exceeds it.
        split_turns: make each question-answer pair a sample of its own.
        share_prefix: count shared beginnings once.
        choosing: the loss is over the choices of each record; None for the mean over tokens.
        compares: what the method learns from, see `preference.METHODS`; the answers of a pair are never parted.
    """

    max_length: int
    capacity: int
    split_turns: bool = False
    share_prefix: bool = True
    choosing: Choosing | None = None
    compares: Compares = ""

    def __post_init__(self) -> None:
        if self.compares and self.split_turns:
            problem = "preference methods compare the last answers of whole records"
            raise ConfigError(problem, where="data.split_turns", remedy="set data.split_turns=false")


class InstructionData:
    """Records of several sources as samples.

    Args:
        sources: opened files.
        encode: record -> ids and loss weights.
        preparation: what pictures become in the model; None for one that sees nothing.
        key: stands for all that `encode` depends on, so that measurements can be kept; "" if that is not known.
        source_weights: factor on the loss weights of each source; None for 1.
        rules: fields of `SampleRules`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Encode,
        *,
        preparation: ImagePreparation | None,
        key: str = "",
        source_weights: Sequence[float] | None = None,
        **rules: Any,
    ) -> None:
        given = SampleRules(**rules)
        self.max_length, self.capacity = given.max_length, given.capacity
        self.split_turns, self.share_prefix = given.split_turns, given.share_prefix
        self.choosing, self.compares = given.choosing, given.compares
        self.sources, self.encode = list(sources), encode
        self.source_weights = list(source_weights or [1.0] * len(self.sources))
        self.preparation, self.key = preparation, key
        self.own_thought: OwnThought = no_marks  # of the chat format: what opens and closes a thought
        # Records are numbered over all sources, so that one integer names a record in orders, caches and messages.
        self._starts = [*accumulate((len(source) for source in self.sources), initial=0)]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def starts(self) -> list[int]:
        """Number of the first record of each source."""
        return self._starts[:-1]

    def record(self, number: int, *, outline: bool = False) -> Record:
        """Read record `number` (counted over all sources); an outline may lack the bytes of its pictures."""
        # Known limit: reading is by number and not by file order, so a source must be cheap to index (see `sources`).
        source = self.source_of(number)
        place = number - self._starts[source]
        return self.sources[source].outline(place) if outline else self.sources[source][place]

    def pictures(self, numbers: Iterable[int]) -> Iterator[tuple[Hashable, Image]]:
        """Yield key and picture of every image of these records, read one record at a time."""
        for number in numbers:
            for image in self.record(int(number)).images:
                yield image_key(image), image

    def source_of(self, number: int) -> int:
        """Which source record `number` belongs to."""
        # To the right of equal starts: an empty source starts where the next one does, and owns no number.
        return bisect_right(self._starts, number) - 1

    def samples(self, number: int, *, outline: bool = False) -> tuple[list[Sample], dict[Hashable, PlacedImage], str]:
        """Tokenise record `number`: its samples, its pictures, and its place for messages.

        Raises RecordError when it is invalid or longer than `max_length`.
        """
        return self.samples_of(self.record(number, outline=outline), number)

    def samples_of(
        self, record: Record, number: int, *, sizes: Mapping[Hashable, tuple[int, int]] | None = None
    ) -> tuple[list[Sample], dict[Hashable, PlacedImage], str]:
        """Tokenise a record that has been read already; see `samples`. `sizes` are the (W, H) that are known."""
        # Here and not when a row is read: data may be looked at, exported and answered although it cannot be learned.
        record.validate(for_training=True)
        images, where = record.images, record.where
        if images and self.preparation is None:
            raise RecordError("has images, but the model has no vision tower", where=where, remedy="set model.vision")
        # Boxes are shares of the whole picture.
        if WRITTEN in record.meta and self.preparation is not None and self.preparation.mode == "crop":
            raise RecordError(
                "has boxes, and fit crop cuts off what they may point at",
                where=where,
                remedy="set model.vision.fit to pad or resize",
            )
        keys = tuple(image_key(image) for image in images)
        known = sizes or {}
        # Contract: pictures are laid out before the text is tokenised, so that a missing or oversized one is told with
        # the record's place, and the sample's length counts the tokens they become.
        shown = {key: self._show(image, where, known.get(key)) for key, image in zip(keys, images, strict=True)}
        widths = tuple(shown[key].spread.tokens for key in keys)
        factor = self.source_weights[self.source_of(number)]
        samples = []
        for conversation, share in self._conversations(record):
            encoded = self.encode(conversation)
            # A source's weight multiplies loss weights, not how often it is drawn: that is `weight` of the mixture.
            weights = encoded.weights if factor == 1 else tuple(weight * factor for weight in encoded.weights)
            sample = Sample(encoded.ids, weights, keys, number, widths, share)
            # Never cut: a record without its end would teach an answer that stops half-way, and one without its
            # beginning an answer to nothing.
            if sample.length > self.max_length:
                raise RecordError(
                    f"takes {sample.length} tokens ({sum(widths)} of them for {len(keys)} images), more than "
                    f"data.max_length={self.max_length}",
                    where=where,
                    remedy="raise data.max_length and data.pack_tokens, shorten the record, or set "
                    "run.on_bad_record=skip",
                )
            if (
                self.choosing is None or share is not None or any(sample.supervised)
            ):  # a question may be a picture alone
                samples.append(sample)
        if self.choosing is not None or self.compares == "pairs":
            self._check_together(samples, where)
        return samples, shown, where

    def _conversations(self, record: Record) -> list[tuple[Record, float | None]]:
        """What the samples of a record are made of, with the share of each that is a choice."""
        # Asked of plain tuning too: a pair or a verdict that nobody looks at would teach the bad answer.
        if self.compares or record.rejected is not None or record.label is not None:
            record, *others = conversations(record, self.compares)
            if others:
                return [(part, None) for part in (record, *others)]
        if self.choosing is not None:
            return branches(record, question=self.choosing.lm > 0)
        return [(part, None) for part in (split_pairs(record) if self.split_turns else [record])]

    def _check_together(self, samples: Sequence[Sample], where: str) -> None:
        """Refuse choices, or the answers of a pair, that do not fit one row, in which their losses meet."""
        # A softmax over choices, and a comparison of two answers, need all losses of a record in one forward pass.
        tokens = trie_length(samples, share=self.share_prefix)
        if tokens > self.capacity:
            what = "choices" if self.choosing is not None else "compared answers"
            raise RecordError(
                f"takes {tokens} tokens with all of its {what}, more than data.pack_tokens={self.capacity}",
                where=where,
                remedy=f"raise data.pack_tokens, or give fewer or shorter {what}",
            )

    def _show(self, image: Image, where: str, size: tuple[int, int] | None) -> PlacedImage:
        assert self.preparation is not None
        sized = image if size is None else replace(image, size=size)
        return PlacedImage(image, self.preparation.spread(sized, where=where))

    def unit_samples(self, scan: Measurements, unit: int) -> tuple[list[Sample], dict[Hashable, PlacedImage], str]:
        """Samples of one unit of a scan, as `samples` gives them."""
        samples, images, where = self.samples(int(scan.record[unit]))
        return samples[int(scan.first[unit]) : int(scan.last[unit])], images, where

    def scan(
        self,
        *,
        workers: int = 0,
        numbers: Sequence[int] | np.ndarray | None = None,
        store: Store | None = None,
        progress: Progress | None = None,
    ) -> Measurements:
        """Measure every record, or some; see `mmit.data.measure.scan`.

        Args:
            workers: processes. numbers: records to measure, None for all.
            store: where measurements are looked up and kept. progress: is told how many are done.
        """
        return scan(self, workers=workers, numbers=numbers, store=store, progress=progress)
