"""Where the rows of a JSON file lie, so that any of them can be read by itself.

In: a JSON list or JSONL. Out: a table of byte places, 24 bytes a row, that can be kept and memory-mapped. Reads no
row's meaning: a line that is not JSON has a place like any other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmit.data.formats.common import is_list
from mmit.data.formats.json_stream import list_places
from mmit.data.store import Store, key_of


@dataclass
class RowTable:
    """Byte places of rows, one entry each."""

    starts: np.ndarray  # (n,) int64
    stops: np.ndarray  # (n,) int64, one past the row's last byte
    numbers: np.ndarray  # (n,) int64, line or position from 1, for messages

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, chosen: slice | np.ndarray) -> RowTable:
        """The table of some of the rows."""
        return RowTable(self.starts[chosen], self.stops[chosen], self.numbers[chosen])


def row_table(path: Path, digest: str, store: Store | None) -> RowTable:
    """The table of a file whose content has the hash `digest`; of one that `store` knows it is not read.

    Raises RecordError where a JSON list is broken.
    """
    key = key_of(digest)
    found = store.find("rows", key) if store is not None else None
    if found is not None:
        return RowTable(**found[1])
    table = _list_table(path) if is_list(str(path)) else _line_table(path)
    if store is not None:
        store.keep("rows", key, {}, vars(table))
    return table


def _list_table(path: Path) -> RowTable:
    places = np.fromiter((place for span in list_places(str(path)) for place in span), dtype=np.int64)
    starts, stops = places.reshape(-1, 2).T
    return RowTable(starts.copy(), stops.copy(), np.arange(1, len(starts) + 1))


def _line_table(path: Path) -> RowTable:
    def places() -> Any:
        at = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                # An empty line is no row, and still counts as a line in messages.
                if not line.isspace():
                    yield at
                    yield at + len(line)
                    yield number
                at += len(line)

    table = np.fromiter(places(), dtype=np.int64).reshape(-1, 3)
    return RowTable(*(column.copy() for column in table.T))


@dataclass
class RowFile:
    """A file read at any place. Processes forked from one that has it open share its descriptor, not its position."""

    path: Path
    _descriptor: int | None = field(default=None, repr=False)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of a row. Raises OSError."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        # pread takes the place as an argument: workers that share the descriptor do not move each other.
        return os.pread(self._descriptor, stop - start, start)

    def __getstate__(self) -> dict[str, Any]:
        # A process that was not forked has no such descriptor; it opens its own at the first row.
        return {"path": self.path, "_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
