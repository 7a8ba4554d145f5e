"""Picture files that a first pass has read: upright size and content mark of each, for as long as the file stays.

Neither depends on template, tokenizer or preparation. They are kept under the source and this code alone, so that a run
with another template does not open the files again. A file counts as the same while its path, size and time are.

Letters: F picture files.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmit.data.preparation import ImagePreparation
    from mmit.data.store import Arrays, Store
    from mmit.data.tiles import Size
    from mmit.records import Image

KIND = "pictures"
MARK = 16  # bytes of a mark, see `mmit.data.marks.picture_mark`
_UNREAD = bytes(MARK)


def stamp(path: str) -> int:
    """What tells whether a picture file is as it was: 0 if there is none; else its size and time."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return 0
    if not stat.S_ISREG(found.st_mode):
        return 0
    # Known limit: a file that is replaced by one of equal size and equal time counts as the same, as it does for make
    # and rsync. The high bit keeps every stamp apart from 0, which says that there is no file.
    return ((found.st_mtime_ns * 1_000_003) ^ found.st_size) & (2**62 - 1) | 2**62


def hash_of(key: Hashable) -> int:
    """64 bits that stand for a picture's key."""
    text = key if isinstance(key, str) else repr(key)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def table(rows: Iterable[tuple[int, int, Size, bytes]] = ()) -> Arrays:
    """Rows of (hash of the path, stamp, (W, H), mark) as arrays; zeros stand for what was not read."""
    paths, stamps, sizes, marks = [*zip(*rows, strict=True)] or [(), (), (), ()]
    return {
        "paths": np.array(paths, dtype=np.uint64),  # (F,)
        "stamps": np.array(stamps, dtype=np.int64),  # (F,)
        "sizes": np.array(sizes, dtype=np.int32).reshape(-1, 2),  # (F, 2)
        "marks": np.frombuffer(b"".join(marks), dtype=np.uint8).reshape(-1, MARK),  # (F, 16)
    }


def joined(tables: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """Tables as one, sorted by path; of a path in several the last row counts."""
    whole = {name: np.concatenate([t[name] for t in (table(), *tables)]) for name in table()}
    # `unique` gives the first of equal paths; over the reversed array that is the last, whose file was looked at last.
    last = len(whole["paths"]) - 1 - np.unique(whole["paths"][::-1], return_index=True)[1]
    return {name: values[last] for name, values in whole.items()}


class PictureFiles:
    """What is known of the picture files of a source."""

    def __init__(self, store: Store | None = None, key: str = "") -> None:
        found = store.find(KIND, key) if store is not None else None
        self._store, self._key, self._known = store, key, found[1] if found else table()

    def find(self, path: str, now: int) -> tuple[Size | None, bytes]:
        """Size and mark of a file whose stamp is `now`; (None, b"") of one that is not known."""
        # Known limit: two paths of one 64-bit hash would share an entry; of a million files that happens with odds of
        # one in 37 million.
        wanted = np.uint64(hash_of(path))
        at = int(np.searchsorted(self._known["paths"], wanted))
        if at == len(self._known["paths"]) or self._known["paths"][at] != wanted or self._known["stamps"][at] != now:
            return None, b""
        width, height = self._known["sizes"][at].tolist()
        mark = self._known["marks"][at].tobytes()
        return (width, height) if width else None, mark if mark != _UNREAD else b""

    def keep(self, more: Mapping[str, np.ndarray]) -> None:
        """Keep what was read of files besides what is known."""
        if self._store is not None and len(more["paths"]):
            self._store.keep(KIND, self._key, {}, joined([self._known, more]))


class Looked:
    """Sizes and marks of the picture files of some records: those that are known, and those read on the way.

    Attributes:
        stamps: of each path. sizes: of each path, where it decides the tokens. marks: of each path; whoever reads one
            adds it.
    """

    def __init__(self, known: PictureFiles, preparation: ImagePreparation | None) -> None:
        self._known, self._preparation = known, preparation
        self._before: dict[str, tuple[Size | None, bytes]] = {}
        self.stamps: dict[str, int] = {}
        self.sizes: dict[Hashable, Size] = {}
        self.marks: dict[Hashable, bytes] = {}

    def at(self, image: Image, *, where: str) -> bool:
        """Look at a picture; False if it is a file that is missing. Raises ImageError."""
        path = image.source
        # Bytes and PIL pictures are read anyway, and an index of shards knows sizes: neither is worth a look at the
        # disk.
        if not isinstance(path, str) or image.size is not None or self.stamps.get(path):
            return True
        self.stamps[path] = stamp(path)
        if not self.stamps[path]:
            return False
        size, mark = self._before[path] = self._known.find(path, self.stamps[path])
        if mark:
            self.marks[path] = mark
        if self._preparation is not None and self._preparation.tiled:
            size = size or self._preparation.size_of(image, where=where)
        if size is not None:
            self.sizes[path] = size
        return True

    def read(self) -> Arrays:
        """What was not known before, as a table."""
        rows = []
        for path, before in self._before.items():
            # What was known is among both (see `at`), so that what another preparation did not need stays known.
            size, mark = self.sizes.get(path) or (0, 0), self.marks.get(path) or _UNREAD
            if (size, mark) != (before[0] or (0, 0), before[1] or _UNREAD):
                rows.append((hash_of(path), self.stamps[path], size, mark))
        return table(rows)
