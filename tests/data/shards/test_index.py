"""Parts of an index are joined, kept and read again; what is damaged or of another build counts as nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmit.data.shards import index
from mmit.data.shards.index import ARRAYS, DTYPES, MAX_SOURCES, OTHER, Part, load_part, save_part, write_index
from mmit.errors import ConfigError, ImageError, RecordError


def part(name: str, samples: list[tuple[str, str, list[str]]]) -> Part:
    """A part of (key, source, suffixes of its members)."""
    out = Part(name, 1024, crc=7)
    for key, source, suffixes in samples:
        row = np.zeros(1, index.SAMPLE)[0]
        row["source"] = out.sources.setdefault(source, len(out.sources))
        row["member"], row["members"] = len(out.members), len(suffixes)
        row["key"], row["key_size"] = len(out.keys), len(key)
        out.samples.append(tuple(row))
        out.keys += key.encode()
        for suffix in suffixes:
            member = np.zeros(1, index.MEMBER)[0]
            member["suffix"] = out.suffixes.setdefault(suffix, len(out.suffixes))
            member["size"] = len(out.members) + 1
            out.members.append(tuple(member))
    return out


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    header = json.loads((folder / "index.json").read_text())
    return header, {name: np.load(folder / header["folder"] / f"{name}.npy") for name in ARRAYS}


def told(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[tuple[str, str, str, list[str]]]:
    """(shard, key, source, suffixes) of every sample."""
    keys = arrays["keys"].tobytes().decode()
    out = []
    for s in arrays["samples"]:
        members = arrays["members"][s["member"] : s["member"] + s["members"]]
        out.append((
            header["shards"][s["shard"]]["name"], keys[s["key"] : s["key"] + s["key_size"]],
            header["sources"][s["source"]], [header["suffixes"][m["suffix"]] for m in members],
        ))  # fmt: skip
    return out


# Sources and suffixes are numbered anew in each part, in another order.
ONE = [("a1", "x", ["png", "json"]), ("a2", "y", ["png"])]
TWO = [("b1", "y", ["json"]), ("b2", "z", ["txt", "png", "json"]), ("b3", "x", [])]


def test_parts_are_joined_with_every_number_moved(tmp_path: Path) -> None:
    assert write_index([part("1.tar", ONE), part("2.tar", []), part("3.tar", TWO)], tmp_path) == 5
    found = told(*read(tmp_path))
    assert found == [("1.tar", *sample) for sample in ONE] + [("3.tar", *sample) for sample in TWO]
    assert {name: array.dtype for name, array in read(tmp_path)[1].items()} == DTYPES


def test_the_fingerprint_follows_the_content_and_not_the_build(tmp_path: Path) -> None:
    def print_of(parts: list[Part], **more: Any) -> str:
        write_index(parts, tmp_path, **more)
        assert [p.name for p in tmp_path.glob("index-*")] == [read(tmp_path)[0]["folder"]]  # the former one is gone
        return str(read(tmp_path)[0]["fingerprint"])

    base = print_of([part("1.tar", ONE)])
    assert base == print_of([part("1.tar", ONE)], build={"when": "now"})
    kept = part("1.tar", ONE)
    kept.kept = Counter({"url": 2})
    assert base == print_of([kept])
    changed = part("1.tar", ONE)
    changed.members[0] = (*changed.members[0][:3], 99, *changed.members[0][4:])  # a crc
    others = [print_of([changed]), print_of([part("2.tar", ONE)]), print_of([part("1.tar", ONE)], caption={"a": 1})]
    assert len({base, *others}) == 4


def test_too_many_sources_are_counted_under_one(tmp_path: Path) -> None:
    samples = [(f"k{n}", f"source {n}", ["png"]) for n in range(MAX_SOURCES + 3)]
    write_index([part("1.tar", samples)], tmp_path)
    header, arrays = read(tmp_path)
    assert len(header["sources"]) == MAX_SOURCES + 1 and header["sources"][-1] == OTHER
    assert arrays["samples"]["source"][-3:].tolist() == [MAX_SOURCES] * 3


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no usable sample"):
        write_index([part("1.tar", [])], tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_a_part_is_kept_for_its_own_build_alone(tmp_path: Path) -> None:
    given = part("1.tar", ONE)
    given.bad = [RecordError("p", where="w", remedy="r"), ImageError("q", where="v", remedy="s")]
    given.samples, given.members = np.array(given.samples, index.SAMPLE), np.array(given.members, index.MEMBER)
    path = tmp_path / "part.npz"
    save_part(given, path, "digest")
    found = load_part(path, "digest")
    assert found is not None and load_part(path, "another") is None and load_part(tmp_path / "gone", "digest") is None
    assert (found.name, found.size, found.crc, found.keys) == (given.name, given.size, given.crc, given.keys)
    assert np.array_equal(found.samples, given.samples) and np.array_equal(found.members, given.members)
    assert found.sources == given.sources and found.suffixes == given.suffixes
    assert [(type(e), e.problem, e.where, e.remedy) for e in found.bad] == [
        (RecordError, "p", "w", "r"),
        (ImageError, "q", "v", "s"),
    ]
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        assert load_part(path, "digest") is None
