"""What was found out about data and is kept for the next start: arrays and facts under a key, checked when read.

An entry is a folder `<kind>-<key>` with one .npy for each array and entry.json, which names their types, shapes and
checksums. It appears whole or not at all, is memory-mapped when read, so that ranks share one copy, and is thrown away
with a word if a byte of it changed. Knows nothing of what it keeps; the key says what an entry depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
ENTRY = "entry.json"
Arrays = dict[str, np.ndarray]


def _say_nothing(text: str) -> None: ...


@dataclass(frozen=True)
class Store:
    """A folder of entries.

    Args:
        folder: made when the first entry is kept.
        say: gets a line when an entry is damaged or cannot be kept.
    """

    folder: Path
    say: Callable[[str], Any] = _say_nothing

    def find(self, kind: str, key: str) -> tuple[dict[str, Any], Arrays] | None:
        """Facts and arrays of an entry, or None where there is none that can be trusted."""
        place = self.folder / f"{kind}-{key}"
        if not place.is_dir():
            return None
        try:
            return _read(place, [kind, key])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.say(f"{place} is damaged or of another program ({error}): it is made again")
            shutil.rmtree(place, ignore_errors=True)
            return None

    def keep(self, kind: str, key: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
        """Write an entry.

        Args:
            kind, key: its name. facts: plain JSON. arrays: numpy arrays by name, each kept with a checksum.

        Returns:
            False, with a line told, if the folder cannot be written.
        """
        place = self.folder / f"{kind}-{key}"
        draft: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # In the same folder, so that the rename is one step of the file system and never a copy.
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.folder))
            draft.chmod(0o755)  # others of a group may share the folder
            _write(draft, [kind, key], facts, arrays)
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            os.rename(draft, place)
            return True
        except OSError as error:
            if place.is_dir() and draft is not None and not isinstance(error, PermissionError):
                return True  # another process was faster
            self.say(f"{self.folder} cannot be written ({error.strerror}), so the data is measured again at each start")
            return False
        finally:
            if draft is not None and draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def borrowed(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that starts with links to all that `folder` keeps, and is removed afterwards.

    Whatever is kept in it, or thrown away, leaves `folder` as it is.
    """
    with tempfile.TemporaryDirectory(prefix="mmit-") as name:
        for file in [*folder.glob("[!.]*"), *folder.glob("[!.]*/*")]:
            # Without its verdicts a conversion is made again, and a file is written through a link.
            if file.is_file() and (file.suffix != ".jsonl" or file.with_suffix(".verdicts.json").is_file()):
                place = Path(name) / file.relative_to(folder)
                place.parent.mkdir(exist_ok=True)
                place.symlink_to(file.resolve())
        yield Path(name)


def _write(folder: Path, name: Sequence[str], facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    told = {}
    for label, array in arrays.items():
        array = np.ascontiguousarray(array)
        with open(folder / f"{label}.npy", "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        told[label] = {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": _crc(array)}
    body = json.dumps({"mmit_store": VERSION, "name": list(name), "arrays": told, "facts": facts})
    # The body as a string inside JSON: a checksum over text does not depend on how JSON would be written again.
    text = json.dumps({"crc32": zlib.crc32(body.encode()), "body": body})
    with open(folder / ENTRY, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path, name: Sequence[str]) -> tuple[dict[str, Any], Arrays]:
    text = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    if zlib.crc32(text["body"].encode()) != text["crc32"]:
        raise ValueError("entry.json is not what was written")
    entry = json.loads(text["body"])
    if entry["mmit_store"] != VERSION or entry["name"] != list(name):
        raise ValueError("another version or key")
    arrays = {}
    for label, told in entry["arrays"].items():
        try:
            array = np.load(folder / f"{label}.npy", mmap_mode="r", allow_pickle=False)
        except Exception as error:
            # numpy reads the header as a Python literal: damage surfaces as whatever its tokenizer raises.
            raise ValueError(f"{label}.npy cannot be read") from error
        # Read whole once for the checksum; mapped pages stay in the page cache, where the ranks of a node share them.
        if [array.dtype.str, list(array.shape)] != [told["dtype"], told["shape"]] or _crc(array) != told["crc32"]:
            raise ValueError(f"{label}.npy is not what was written")
        arrays[label] = array.view(np.ndarray)
    return entry["facts"], arrays


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data) if array.size else 0


def key_of(*facts: Any) -> str:
    """A name for JSON values: equal ones, and only those, get the same."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def digest(path: Path, store: Store | None = None) -> str:
    """A hash of a file's content; `store` remembers it for as long as size and time of the file stay."""
    stat = path.stat()
    now = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    found = None if store is None else store.find("file", key_of(now[0]))
    if found is not None and found[0]["file"] == now:
        return str(found[0]["digest"])
    hashed = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    # A file that is still being written may change again within the resolution of its time.
    if store is not None and time.time_ns() - stat.st_mtime_ns > 2 * 10**9:
        store.keep("file", key_of(now[0]), {"file": now, "digest": hashed.hexdigest()}, {})
    return hashed.hexdigest()


@lru_cache(maxsize=1)
def code_version() -> str:
    """A hash of the code that reads, converts and tokenises records: what it found holds for this code alone."""
    package = Path(__file__).resolve().parent
    files = sorted([*package.rglob("*.py"), *package.parent.glob("record*.py")])
    hashed = hashlib.blake2b(digest_size=12)
    for file in files:
        hashed.update(file.relative_to(package.parent).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return hashed.hexdigest()
