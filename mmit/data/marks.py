"""What is learned from a record, as a hash: to tell whether data is the same after days, on another disk or machine.

Token ids, masks and whatever else a sample holds, and its pictures. Not paths, names or formats of files, so that data
may be moved and converted, as long as the same is learned from it in the same order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import TYPE_CHECKING

from mmit.data.packing import Sample

if TYPE_CHECKING:
    from mmit.data.dataset import PlacedImage
    from mmit.records import Image

# What records say is added up as digits of a number: the same sum whatever pieces the records were measured in.
_PRIME = 2**127 - 1
_BASE = 0x5BD1E9955BD1E9955BD1E9955BD1E995 % _PRIME
_FACTS = [f.name for f in fields(Sample) if f.name not in ("images", "record", "share")]
ENDS = 4096  # bytes at either end of a picture file that tell it from another


def content_of(
    samples: Sequence[Sample], images: Mapping[Hashable, PlacedImage], marks: dict[Hashable, bytes] | None = None
) -> bytes:
    """Return 16 bytes that stand for every number of a record's samples and for its pictures.

    Pictures inside shards are left to the index of their shards, which has a checksum of every member. `marks` are
    those of picture files that are known; what is read is added.
    """
    marks = {} if marks is None else marks
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        # All fields but number and share of the sample, found by name: a new field is learned from as well, and must
        # not be forgotten here.
        facts = [getattr(sample, name) for name in _FACTS]
        written = [written_floats(fact) if fact is sample.weights else repr(fact) for fact in facts]
        written += [] if sample.share is None else [repr(sample.share)]
        digest.update(f"[{', '.join(written)}]".encode())
        for key in sample.images:
            mark = marks.get(key) or picture_mark(images[key].image)
            if isinstance(images[key].image.source, str):  # the key of any other may be another's next time
                marks[key] = mark
            digest.update(mark)
    return digest.digest()


def written_floats(values: Sequence[float]) -> str:
    """Return repr of a tuple of floats; of runs of equal ones, as loss weights are, in a quarter of the time."""
    if len(values) < 2:
        return repr(tuple(values))
    runs = (", ".join([repr(value)] * len(list(run))) for value, run in groupby(values))
    return f"({', '.join(runs)})"


class Contents:
    """The contents of records in their order; those of pieces that follow each other join to those of the whole."""

    def __init__(self, text: str = "0-0") -> None:
        value, _, count = text.partition("-")
        self._value, self._count = int(value, 16), int(count)

    def add(self, content: bytes) -> None:
        """Append a record's `content_of`."""
        self._value = (self._value * _BASE + int.from_bytes(content, "little") + 1) % _PRIME
        self._count += 1

    def extend(self, after: Contents) -> None:
        """Append the contents of the records that follow."""
        # The digits of the pieces before move up by as many places as this one has records.
        self._value = (self._value * pow(_BASE, after._count, _PRIME) + after._value) % _PRIME
        self._count += after._count

    def __str__(self) -> str:
        return f"{self._value:032x}-{self._count}"


def picture_mark(image: Image) -> bytes:
    """Return what tells a picture from another: the hash of its bytes; of a file the size, and 4 KiB at either end.

    Reading hundreds of thousands of picture files whole would take minutes to hours. A file that is changed in its
    middle alone and keeps its size counts as the same; any other picture, or the same one encoded otherwise, does not.
    A BMP is read whole: it is not compressed, so painting in its middle changes neither size nor ends.
    """
    if isinstance(image.source, bytes):
        return hashlib.blake2b(image.source, digest_size=16).digest()
    if not isinstance(image.source, str):
        return b""
    try:
        with open(image.source, "rb", buffering=0) as file:  # a quarter less time than with a buffer
            size = os.fstat(file.fileno()).st_size
            ends = file.read(ENDS)
            if ends.startswith(b"BM"):
                ends += file.read()
            elif size > ENDS:
                file.seek(max(size - ENDS, ENDS))
                ends += file.read(ENDS)
    except OSError:  # a member of a shard, or a file that has been named as missing
        return b""
    return hashlib.blake2b(b"%d " % size + ends, digest_size=16).digest()
