"""The index of a folder of shards: where every sample and member lies, its checksum, and what can be said of it unread.

Owns the files index.json and index-<hash>/{samples,members,keys}.npy and how Parts, the indexes of single tars, are
joined into them. The arrays are memory-mapped, so that opening costs the same for any number of samples.

    samples.npy   one SAMPLE each: shard, source, first member and their number, images, key, text length, flags
    members.npy   one MEMBER each: where its header starts, how long header and payload are, crc32, width, height
    keys.npy      the keys of all samples, one after the other
    index.json    shards (name, size, crc32, samples), names of sources and suffixes, the fingerprint

A sample with one picture takes about 110 bytes (a billion: 110 GB of disk, and no memory but what is looked at).
The crc32 of a member covers header, payload and padding: a changed name is noticed like a changed pixel.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmit.errors import ConfigError, ImageError, RecordError
from mmit.io import unwritable, write_atomic

VERSION = 1
INDEX = "index.json"
ARRAYS = ("samples", "members", "keys")
# Bits of SAMPLE.flags.
HAS_IMAGE, MANY_IMAGES, MANY_ANSWERS, HAS_SYSTEM = 1, 2, 4, 8
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("source", "<u4"),
        ("member", "<u8"),
        ("key", "<u8"),
        ("members", "<u2"),
        ("images", "<u2"),
        ("key_size", "<u2"),
        ("flags", "<u2"),
        ("chars", "<u4"),
    ]
)
# `lead` is the bytes from `start` to the payload. A picture inside a JSON has width and height, but no bytes.
MEMBER = np.dtype(
    [
        ("start", "<u8"),
        ("lead", "<u4"),
        ("size", "<u4"),
        ("crc", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("suffix", "<u2"),
        ("inline", "<u2"),
    ]
)
DTYPES = {"samples": SAMPLE, "members": MEMBER, "keys": np.dtype("u1")}
# More names than this are counted under one, so that a million URLs do not end up in index.json.
MAX_SOURCES, OTHER = 4096, "(other)"


@dataclass
class Part:
    """The index of one tar, before it is joined with the others; numbers start at 0 in each part."""

    name: str
    size: int
    crc: int = 0
    samples: Any = field(default_factory=list)  # tuples, an array once the scan is over
    members: Any = field(default_factory=list)
    keys: bytearray = field(default_factory=bytearray)
    sources: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    bad: list[RecordError] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)  # keys that stay in the meta unread, and in how many samples


def write_index(
    parts: Sequence[Part],
    out_dir: str | os.PathLike[str],
    *,
    caption: dict[str, Any] | None = None,
    options: dict[str, str] | None = None,
    build: Any = None,
) -> int:
    """Join the parts and write the index; index.json is replaced last, so that it never names half an index.

    Args:
        parts: one for each tar, in the order of the shards.
        out_dir: gets index.json and a folder of arrays; that of a former index is removed.
        caption: options of captions. options: those that all formats share; both decide how samples are read.
        build: what is told of the build; it does not change the fingerprint.

    Returns:
        the number of samples.

    Raises:
        ConfigError: no usable sample, too many suffixes, or a folder that cannot be written.
    """
    out = Path(out_dir)
    arrays, sources, suffixes = _joined(parts)
    if not len(arrays["samples"]):
        raise ConfigError("holds no usable sample", where=str(out), remedy="See what was reported for each.")
    if len(suffixes) > 0xFFFF:
        raise ConfigError(f"{len(suffixes)} different suffixes of members", where=str(out), remedy="Name them 0.jpg.")
    header: dict[str, Any] = {
        "mmit_index": VERSION,
        "shards": [{"name": p.name, "size": p.size, "crc32": p.crc, "samples": len(p.samples)} for p in parts],
        "sources": list(sources),
        "suffixes": list(suffixes),
        "caption": caption or {},
        "left_out": dict(sum((part.left_out for part in parts), Counter[str]())),
        "lengths": {name: len(array) for name, array in arrays.items()},
    }
    if options:
        header["options"] = options
    # Over what decides the records, and nothing else: how and when the index was built, and which keys nobody reads,
    # would make the same data look changed, and every measurement be made again.
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for array in arrays.values():
        digest.update(array.tobytes())
    header["fingerprint"] = digest.hexdigest()[:16]
    header["build"] = build
    header["kept"] = dict(sum((part.kept for part in parts), Counter[str]()))  # says nothing about the data's content
    header["folder"] = f"index-{header['fingerprint']}"
    _write_files(out, header, arrays)
    return len(arrays["samples"])


def _joined(parts: Sequence[Part]) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, int]]:
    """Join the arrays of all parts; return them with the numbers of the names of sources and suffixes."""
    sources: dict[str, int] = {}
    suffixes: dict[str, int] = {}
    joined: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    at_member = at_key = 0
    for number, part in enumerate(parts):
        samples, members = np.array(part.samples, SAMPLE), np.array(part.members, MEMBER)
        # Contract: parts number their samples, members, keys, sources and suffixes from 0. Each number moves by what
        # the parts before it hold, and names that several parts have become one.
        samples["shard"] = number
        samples["member"] += np.uint64(at_member)
        samples["key"] += np.uint64(at_key)
        if len(samples):
            samples["source"] = np.array([_number(sources, s) for s in part.sources])[samples["source"]]
        if len(members) and part.suffixes:
            table = np.array([suffixes.setdefault(s, len(suffixes)) for s in part.suffixes])
            members["suffix"] = table[members["suffix"]]
        for name, array in zip(ARRAYS, (samples, members, np.frombuffer(part.keys, np.uint8)), strict=True):
            joined[name].append(array)
        at_member, at_key = at_member + len(members), at_key + len(part.keys)
    return {name: np.concatenate(pieces) for name, pieces in joined.items()}, sources, suffixes


def _number(table: dict[str, int], name: str) -> int:
    # Known limit: which names are counted together depends on the order of the shards.
    if name not in table and len(table) >= MAX_SOURCES:
        name = OTHER
    return table.setdefault(name, len(table))


def _write_files(out: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    try:
        folder = out / header["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            write_atomic(folder / f"{name}.npy", buffer.getbuffer())
        write_atomic(out / INDEX, json.dumps(header, indent=1).encode())
        # Only once index.json names the new one. Known limit: a reader that has read the former index.json and not yet
        # opened its arrays does not find them.
        for old in out.glob("index-" + "[0-9a-f]" * 16):
            if old != folder:
                shutil.rmtree(old)
    except OSError as error:
        raise unwritable(out, error) from error


def save_part(part: Part, path: Path, digest: str) -> None:
    """Keep the index of one finished shard, for a build that is run again."""
    facts = {"digest": digest, "name": part.name, "size": part.size, "crc": part.crc}
    facts |= {"sources": list(part.sources), "suffixes": list(part.suffixes)}
    facts |= {"bad": [(type(e) is ImageError, e.problem, e.where, e.remedy) for e in part.bad]}
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    keys = np.frombuffer(part.keys, np.uint8)
    # Text as an array of bytes: an array of strings would need pickle to be read.
    np.savez(buffer, facts=text, samples=part.samples, members=part.members, keys=keys)
    write_atomic(path, buffer.getbuffer())


def load_part(path: Path, digest: str) -> Part | None:
    """Return what `save_part` kept, None if there is nothing for `digest`; damage counts as nothing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["digest"] != digest:
                return None
            part = Part(facts["name"], facts["size"], facts["crc"], file["samples"], file["members"])
            part.keys = bytearray(file["keys"].tobytes())
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    part.sources = {name: i for i, name in enumerate(facts["sources"])}
    part.suffixes = {name: i for i, name in enumerate(facts["suffixes"])}
    for is_image, problem, where, remedy in facts["bad"]:
        part.bad.append((ImageError if is_image else RecordError)(problem, where=where, remedy=remedy))
    return part
