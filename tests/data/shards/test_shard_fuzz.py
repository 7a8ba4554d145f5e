"""Fuzzing: damaged tars and pictures give errors of ours or sound data, and no damage goes unnoticed.

The default run takes a few hundred cases of each kind; `-m slow` takes 100,000.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.decode import decode_rgb
from mmit.data.images import load_rgb
from mmit.data.shards.index import Part
from mmit.data.shards.reader import ShardSource, open_shards
from mmit.data.shards.records import picture_size
from mmit.data.shards.scan import ScanOptions, scan_file
from mmit.data.shards.writer import build_shards
from mmit.errors import ImageError, MmitError, RecordError
from mmit.records import Image
from tests.data.shards.shard_samples import picture, records, tar_bytes
from tests.examples import examples

pytestmark = pytest.mark.filterwarnings("ignore")
MANY = 100_000
MOST_MEMORY = 200 << 20
MOST_SECONDS = 2.0
MAX_PIXELS = 1_000_000

FORMATS = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
PICTURES = [picture(3, (24, 16), format=f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
PICTURES += [picture(4, (24, 16), orientation=6), picture(4, (24, 16), orientation=1)]
# Places and lengths of the fields of a tar header.
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "kind": (156, 1),
    "magic": (257, 8),
    "prefix": (345, 155),
}
VALUES = (
    *(b"", b"0", b"7", b"x", b"g", b"L", b"K", b"1", b"5", b"S", b"ustar\0", b"\xff" * 12, b"\x80" + b"\xff" * 11),
    *(b"00000000000", b"77777777777", b"00000000777", b"-0000000001", b"a.jpg", b"../../x.json", b"a", b"\0", b"a.pyd"),
)
KINDS = ("flip", "set", "cut", "drop", "insert", "repeat", "zero", "field", "end")
Edit = tuple[str, float, float, int]
EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1 << 16)), min_size=1, max_size=4
)


def random_edits(rng: np.random.Generator) -> list[Edit]:
    """What EDITS draws, faster."""
    return [
        (KINDS[int(rng.integers(len(KINDS)))], rng.random(), rng.random(), int(rng.integers(1 << 16)))
        for _ in range(int(rng.integers(1, 5)))
    ]


def mutate(data: bytes, edits: list[Edit]) -> bytes:
    """Damage `data`; "field" writes into a tar header and fixes its checksum, so that the damage gets further."""
    out = bytearray(data)
    for kind, where, much, value in edits:
        at = min(int(where * len(out)), max(len(out) - 1, 0))
        size = int(much * 600)
        if kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + size]
        elif kind == "insert":
            out[at:at] = bytes([value % 256]) * size
        elif kind == "repeat":
            out[at:at] = out[at : at + size]
        elif kind == "zero":
            out[at : at + size] = bytes(len(out[at : at + size]))
        elif kind == "end":
            out += bytes([value % 256]) * size
        elif kind == "field":
            _set_field(out, at // 512 * 512, value)
        elif out:
            out[at] = out[at] ^ (1 << value % 8) if kind == "flip" else value % 256
    return bytes(out)


def _set_field(out: bytearray, block: int, value: int) -> None:
    if block + 512 > len(out):
        return
    at, size = FIELDS[list(FIELDS)[value % len(FIELDS)]]
    text = VALUES[value // len(FIELDS) % len(VALUES)][:size]
    out[block + at : block + at + size] = text.ljust(size, b"\0")
    out[block + 148 : block + 156] = b" " * 8
    out[block + 148 : block + 156] = b"%06o\0 " % sum(out[block : block + 512])


def tar_of_everything(format: int) -> bytes:
    """Captions, an interleaved document, a LLaVA row and mmit samples."""
    from mmit.data.shards.records import from_record

    members = [("a.jpg", picture(0)), ("a.txt", b"a caption"), ("a.json", b'{"url": "x"}')]
    inline = {"text_list": ["x"], "image_info": [{"image_base64": base64.b64encode(picture(9)).decode()}]}
    members += [("d.json", json.dumps(inline).encode())]
    row = {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}], "image": "x"}
    members += [("l.jpg", picture(1)), ("l.json", json.dumps(row).encode())]
    for n, record in enumerate(records(3)):
        long = f"folder/{n}" + ("y" * 150 if format != tarfile.USTAR_FORMAT else "")
        pictures = [image.source for image in record.images]
        members += [(f"{long}.{suffix}", data) for suffix, data in from_record(record, long, pictures).items()]
    return tar_bytes(members, format=format)


TARS = [tar_of_everything(format) for format in FORMATS]


def scan(data: bytes) -> Part:
    return scan_file(io.BytesIO(data), len(data), name="f.tar", options=ScanOptions(max_pixels=MAX_PIXELS))


def check_tar(data: bytes) -> None:
    """A scan ends with samples that lie inside the tar, and errors that say where, what and what to do."""
    begin = time.perf_counter()
    part = scan(data)
    assert time.perf_counter() - begin < MOST_SECONDS
    assert len(part.samples) or part.bad
    for error in part.bad:
        assert isinstance(error, RecordError) and "f.tar" in error.where and error.remedy and len(str(error)) < 1000
    stored = part.members[part.members["inline"] == 0]
    ends = stored["start"].astype(np.int64) + stored["lead"] + stored["size"]
    assert (ends <= len(data)).all()


def check_picture(data: bytes) -> None:
    """Reading header or pixels succeeds or raises ImageError; the fast way and the other agree."""
    begin = time.perf_counter()
    try:
        picture_size(data, where="w")
    except ImageError as error:
        assert error.remedy
    try:
        slow = np.array(load_rgb(Image(data or b"x"), where="w", max_pixels=MAX_PIXELS))
    except ImageError as error:
        assert error.remedy and len(str(error)) < 1000
        with pytest.raises(ImageError):
            decode_rgb(data or b"x", where="w", max_pixels=MAX_PIXELS)
    else:
        assert np.array_equal(decode_rgb(data, max_pixels=MAX_PIXELS).permute(1, 2, 0).numpy(), slow)
    assert time.perf_counter() - begin < MOST_SECONDS


@settings(max_examples=examples(300), deadline=None)
@given(which=st.integers(0, len(TARS) - 1), edits=EDITS)
def test_damaged_tars(which: int, edits: list[Edit]) -> None:
    check_tar(mutate(TARS[which], edits))


@settings(max_examples=examples(300), deadline=None)
@given(which=st.integers(0, len(PICTURES) - 1), edits=EDITS)
def test_damaged_pictures(which: int, edits: list[Edit]) -> None:
    check_picture(mutate(PICTURES[which], edits))


def test_garbage_between_segments() -> None:
    check_picture(mutate(PICTURES[0], [("insert", 0.25, 0.15625, 0), ("set", 0.21875, 0.0, 1)]))


@settings(max_examples=examples(200), deadline=None)
@given(data=st.binary(max_size=2000))
def test_any_bytes(data: bytes) -> None:
    check_tar(data)
    check_picture(data)


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.parametrize(
    ("seeds", "check"), [pytest.param(TARS, check_tar, id="tars"), pytest.param(PICTURES, check_picture, id="pictures")]
)
def test_a_hundred_thousand(seeds: list[bytes], check: Callable[[bytes], None]) -> None:
    rng = np.random.default_rng(0)
    for data in seeds:
        check(data)
    before = most = memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in range(MANY):
            damaged = mutate(seeds[case % len(seeds)], random_edits(rng))
            try:
                check(damaged)
            except BaseException as error:
                raise AssertionError(f"case {case}: {damaged[:64]!r}...") from error
            if case % 100 == 0:
                most = max(most, memory())
    assert most - before < MOST_MEMORY


# --- nothing changed or lost goes unnoticed -------------------------------------------------------------------------


def flips(folder: Path, number: int) -> dict[str, int]:
    """Change single bytes of the shards, one at a time; count where it is noticed."""
    given = records(9)
    build_shards(given, folder, max_bytes=12_000)
    source = open_shards(folder)
    spans = [_span(source, i) for i in range(len(source))]
    rng = np.random.default_rng(0)
    shards = [folder / shard["name"] for shard in source.index.header["shards"]]
    sizes = np.array([path.stat().st_size for path in shards])
    found = {"reading": 0, "verifying": 0, "missed": 0}
    for _ in range(number):
        shard = int(rng.choice(len(shards), p=sizes / sizes.sum()))
        at, change = int(rng.integers(sizes[shard])), int(rng.integers(1, 256))
        hit = [i for i, (s, start, end) in enumerate(spans) if s == shard and start <= at < end]
        with open(shards[shard], "r+b", buffering=0) as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ change]))
            for i in range(len(source)):
                if spans[i][0] != shard:
                    continue
                try:
                    assert source[i] == given[i] and i not in hit
                except RecordError as error:
                    assert i in hit and source.key(i) in error.where and "crc32" in error.problem
                    found["reading"] += 1
            if not hit:
                named = [error.where for error in source.verify()]
                found["verifying" if named == [shards[shard].name] else "missed"] += 1
            file.seek(at)
            file.write(bytes([byte]))
    assert source.verify() == []
    return found


def _span(source: ShardSource, number: int) -> tuple[int, int, int]:
    row = source.index.samples[number]
    members = source.index.members[int(row["member"]) : int(row["member"]) + int(row["members"])]
    last = members[-1]
    end = int(last["start"]) + int(last["lead"]) + -(-int(last["size"]) // 512) * 512
    return int(row["shard"]), int(members[0]["start"]), end


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    found = flips(tmp_path, 1000)
    assert found["missed"] == 0 and found["reading"] + found["verifying"] == 1000
    assert found["reading"] > 500  # the rest are zeros after the end of the archive


@pytest.mark.parametrize("data", TARS, ids=["ustar", "pax", "gnu"])
def test_a_cut_tar_never_looks_like_a_shorter_one(data: bytes) -> None:
    whole = scan(data)
    assert not whole.bad and len(whole.samples) == 6
    keys = [bytes(whole.keys)[s : s + n] for s, n in whole.samples[["key", "key_size"]].tolist()]
    content = int((whole.members["start"] + whole.members["lead"] + (whole.members["size"] + 511) // 512 * 512).max())
    for length in sorted({*range(0, content + 2048, 512), *range(3, content + 1100, 237)}):
        part = scan(data[:length])
        found = [bytes(part.keys)[s : s + n] for s, n in part.samples[["key", "key_size"]].tolist()]
        assert found == keys[: len(found)] or set(found) <= set(keys)
        assert bool(part.bad) == (length < content + 1024), length


@pytest.mark.parametrize("length", [10, 700, 5000])
def test_a_cut_shard_is_never_read_as_whole(tmp_path: Path, length: int) -> None:
    given = records(6)
    build_shards(given, tmp_path)
    source = open_shards(tmp_path)
    path = tmp_path / "shard-000000.tar"
    os.truncate(path, path.stat().st_size - 10_240 - length)
    lost = 0
    for number, record in enumerate(given):
        try:
            assert source[number] == record
        except RecordError as error:
            assert "cut short" in error.problem
            lost += 1
    assert lost >= 1
    with pytest.raises(MmitError, match="when indexed"):
        open_shards(tmp_path)


def test_endless_long_names_are_not_followed() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 60_000
    block = info.tobuf(tarfile.GNU_FORMAT) + b"y" * 60_000 + bytes(-60_000 % 512)
    part = scan(block * 200 + TARS[0])
    assert "too many names" in part.bad[0].problem


@pytest.mark.parametrize(
    "header",
    [
        {"size": b"\x80" + b"\xff" * 11},
        {"size": b"77777777777\0", "kind": b"x"},
        {"size": b"00000001000\0", "kind": b"L"},
        {"size": b"00010000000\0", "kind": b"x"},
    ],
)
def test_hostile_headers_cost_nothing(header: dict[str, bytes]) -> None:
    data = bytearray(TARS[0])
    for field, value in header.items():
        at, _ = FIELDS[field]
        data[at : at + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    before, begin = memory(), time.perf_counter()
    check_tar(bytes(data))
    assert time.perf_counter() - begin < 0.2 and memory() - before < 20 << 20
