"""Shards: what goes in comes out, the same bytes every time, and nothing foreign, changed or lost goes unnoticed."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmit.data.decode import decode_rgb
from mmit.data.images import load_rgb
from mmit.data.shards import files as shard_files
from mmit.data.shards.index import HAS_IMAGE, HAS_SYSTEM, MANY_ANSWERS, MANY_IMAGES
from mmit.data.shards.reader import ShardSource, open_shards
from mmit.data.shards.scan import index_tars
from mmit.data.shards.writer import build_shards
from mmit.data.sources import SourceSpec, open_source
from mmit.errors import ConfigError, ImageError, MmitError, RecordError
from mmit.records import Image, Record, Text, Turn
from tests.data.shards.shard_samples import Collected, picture, records, write_tar

SMALL = 20_000  # bytes of a shard here


def caption(key: str, seed: int = 0, **facts: Any) -> list[tuple[str, bytes]]:
    """The three files that img2dataset writes."""
    info = {"url": "http://x/y.jpg", "status": "success", **facts}
    return [
        (f"{key}.jpg", picture(seed)),
        (f"{key}.txt", f"a caption {seed}".encode()),
        (f"{key}.json", json.dumps(info).encode()),
    ]


def indexed(tmp_path: Path, members: list[tuple[str, bytes]], **options: Any) -> ShardSource:
    """Index one tar of these members and open it."""
    path = write_tar(tmp_path / "foreign.tar", members, format=options.pop("format", tarfile.USTAR_FORMAT))
    index_tars([path], tmp_path / "index", **options)
    return open_shards(tmp_path / "index")


# --- the index ------------------------------------------------------------------------------------------------------


def test_the_index_tells_what_is_in_the_records(tmp_path: Path) -> None:
    wide = picture(0, (30, 10), orientation=6)
    talk = Record(
        (
            Turn("system", (Text("be kind"),)),
            Turn("user", (Image(wide), Image(picture(1, (5, 6), format="PNG")), Text("q"))),
            Turn("assistant", (Text("ab"),)),
            Turn("user", (Text("q"),)),
            Turn("assistant", (Text("é"),)),
        ),
        source="talks",
    )
    build_shards([Record.triple("what", "this", source="text"), talk], tmp_path)
    index = open_shards(tmp_path).index
    assert index.samples["chars"].tolist() == [8, 12]
    assert index.samples["flags"].tolist() == [0, HAS_IMAGE | MANY_IMAGES | MANY_ANSWERS | HAS_SYSTEM]
    assert [index.header["sources"][i] for i in index.samples["source"]] == ["text", "talks"]
    pictures = index.members[index.members["width"] > 0]
    assert pictures[["width", "height"]].tolist() == [(10, 30), (5, 6)]  # upright
    assert index.samples["images"].tolist() == [0, 2]
    assert isinstance(index.samples.base, np.memmap)


def test_a_folder_can_be_moved(tmp_path: Path) -> None:
    build_shards(records(3), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert list(open_shards(tmp_path / "b")) == records(3)


@pytest.mark.parametrize("file", ["index.json", "samples.npy", "members.npy", "keys.npy"])
def test_a_damaged_index_is_an_error_of_ours(tmp_path: Path, file: str) -> None:
    build_shards(records(6), tmp_path)
    path = next(tmp_path.rglob(file))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        broken[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken if rng.random() < 0.9 else broken[: int(rng.integers(len(whole)))])
        try:
            list(open_shards(tmp_path))
        except MmitError as error:
            assert error.where and error.remedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mmit_index": 2}, "version"),
        ({"folder": "../x"}, "damaged"),
        ({"caption": {"instruction": 5}}, "damaged"),
        ({"shards": [{"name": "pipe:cat", "size": 1, "crc32": 1}]}, "scheme"),
        ({"lengths": {"samples": 1, "members": 1, "keys": 1}}, "does not fit"),
    ],
)
def test_an_index_from_anywhere_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    build_shards(records(2), tmp_path)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MmitError, match=message):
        open_shards(tmp_path)


# --- reading --------------------------------------------------------------------------------------------------------


def test_an_error_names_shard_key_member_and_cause(tmp_path: Path) -> None:
    build_shards(records(3), tmp_path)
    source = open_shards(tmp_path)
    row = source.index.members[int(source.index.samples[1]["member"])]
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[int(row["start"]) + 512 + 3] ^= 4
    path.write_bytes(data)
    assert source[0] == records(1)[0]
    with pytest.raises(RecordError) as caught:
        source[1]
    assert caught.value.where == "shard-000000.tar: 000000001"
    assert "0.png" in caught.value.problem and "crc32" in caught.value.problem and caught.value.remedy
    assert [error.where for error in source.verify()] == ["shard-000000.tar"]


def test_an_outline_reads_the_text_alone(tmp_path: Path) -> None:
    given = records(6)
    build_shards(given, tmp_path / "own")
    index_tars([write_tar(tmp_path / "a.tar", caption("k") + caption("l"))], tmp_path / "foreign")
    for folder in ("own", "foreign"):
        source = open_shards(tmp_path / folder)
        whole, outlines = list(source), [source.outline(i) for i in range(len(source))]
        for record, outline in zip(whole, outlines, strict=True):
            assert [turn.text for turn in outline.turns] == [turn.text for turn in record.turns]
            assert len(outline.images) == len(record.images)
            assert replace(outline, turns=()) == replace(record, turns=())
        names = [image.source for outline in outlines for image in outline.images]
        assert len(set(names)) == len(names) and all(isinstance(name, str) for name in names)
    source = open_shards(tmp_path / "own")
    row = source.index.members[int(source.index.samples[1]["member"])]
    with open(tmp_path / "own" / "shard-000000.tar", "r+b") as file:
        file.seek(int(row["start"]))
        file.write(bytes(700))
    assert source.outline(1).images[0].source == "shard-000000.tar/000000001.0.png"
    with pytest.raises(RecordError):
        source[1]


def test_missing_and_cut_shards_are_found_when_opening(tmp_path: Path) -> None:
    build_shards(records(12), tmp_path, max_bytes=SMALL)
    source = open_shards(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ConfigError, match="shard-000001.tar: .* when indexed"):
        open_shards(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(RecordError, match="cut short"):
        list(source)
    path.unlink()
    with pytest.raises(ConfigError, match="shard-000001.tar: No such file"):
        open_shards(tmp_path)
    with pytest.raises(MmitError, match="nothing was skipped") as caught:
        list(ShardSource(str(tmp_path)))
    assert not isinstance(caught.value, RecordError)  # so that no policy skips it


def read_one(source: ShardSource, number: int) -> Record:
    return source[number]


def test_a_source_goes_to_other_processes(tmp_path: Path) -> None:
    given = records(8)
    build_shards(given, tmp_path, max_bytes=SMALL)
    source = open_shards(tmp_path)
    assert source[0] == given[0]
    sent = pickle.dumps(source)
    assert len(sent) < 2000 and pickle.loads(sent)[5] == given[5]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(read_one, [(source, i) for i in range(8)]) == given


def test_open_source_opens_a_folder_of_shards(tmp_path: Path) -> None:
    build_shards(records(6), tmp_path / "web")
    source = open_source(SourceSpec(tmp_path / "web", limit=4))
    assert isinstance(source, ShardSource) and len(source) == 4 and source.name == "web"
    assert source.fingerprint != open_source(SourceSpec(tmp_path / "web", format="shards")).fingerprint
    with pytest.raises(IndexError):
        source[4]
    with pytest.raises(ConfigError, match="no index of shards"):
        open_source(SourceSpec(tmp_path, format="shards"))


def test_remote_folders_are_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(shard_files, "REMOTE", (*shard_files.REMOTE, "memory"))
    given = records(5)
    build_shards(given, tmp_path / "local")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "local"), "/data", recursive=True)
    try:
        source = open_source("memory://data", cache=tmp_path / "cache")
        assert list(source) == given and pickle.loads(pickle.dumps(source))[3] == given[3]
        assert not list((tmp_path / "cache").rglob("*.tar"))
        header = json.loads(store.cat("/data/index.json"))
        for name in ("/etc/hostname", "../a.tar", "http://elsewhere/a.tar"):
            header["shards"][0]["name"] = name
            store.pipe("/hostile/index.json", json.dumps(header).encode())
            with pytest.raises(ConfigError, match="damaged"):
                open_source("memory://hostile", cache=tmp_path / "cache")
        index_tars(["memory://data/shard-000000.tar"], tmp_path / "other")
        assert list(open_shards(tmp_path / "other")) == given
        store.rm("/data", recursive=True)
        with pytest.raises(MmitError, match="cannot read"):
            source[0]
    finally:
        store.store.clear()


def test_reading_needs_neither_torch_nor_webdataset(tmp_path: Path) -> None:
    build_shards(records(2), tmp_path)
    code = (
        "import sys; from mmit.data.shards.reader import open_shards; print(len(list(open_shards(sys.argv[1]))),"
        "sorted({'torch', 'webdataset', 'fsspec'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.stdout == "2 []\n", result.stderr


# --- faults ---------------------------------------------------------------------------------------------------------


def encoded(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def sound_but_odd() -> dict[str, bytes]:
    """Pictures that must be read."""
    rgb = PIL.Image.open(io.BytesIO(picture(1, (40, 30), format="PNG")))
    frames = [rgb.convert("P"), rgb.transpose(PIL.Image.Transpose.ROTATE_180).convert("P")]
    return {
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "sixteen.png": encoded(PIL.Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        "palette.png": encoded(rgb.convert("P"), "PNG", transparency=0),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "exif.jpg": picture(1, (40, 30), orientation=8),
    }


def faulty() -> dict[str, list[tuple[str, bytes]]]:
    """Samples that must be reported, by kind."""
    good, wide = picture(2, (40, 30)), encoded(PIL.Image.new("1", (65500, 1)), "PNG")
    bomb = encoded(PIL.Image.new("1", (9000, 9000)), "PNG")
    two = Record.triple("q", "a", images=["x.0.jpg", "x.1.jpg"]).to_json()
    one = Record.triple("q", "a", images=["x.0.jpg"]).to_json()

    def shown(data: bytes, kind: str = "jpg") -> list[tuple[str, bytes]]:
        return [(f"x.{kind}", data), ("x.txt", b"caption")]

    return {
        "truncated": shown(good[:-80]),
        "empty": shown(b""),
        "dot": shown(encoded(PIL.Image.new("RGB", (1, 1)), "PNG"), "png"),
        "strip": shown(wide, "png"),
        "bomb": shown(bomb, "png"),
        "bad_json": [("x.json", b"{'turns': []}"), ("x.0.jpg", good)],
        "missing": [("x.json", json.dumps(two).encode()), ("x.0.jpg", good)],
        "too_many": [("x.json", json.dumps(one).encode()), ("x.0.jpg", good), ("x.1.jpg", good + b"\0")],
        "flip": shown(good),
    }


@pytest.mark.parametrize(
    ("number", "rate"),
    [
        (400, 0.15),
        pytest.param(14_000, 0.001, marks=pytest.mark.slow),
        pytest.param(3000, 0.01, marks=pytest.mark.slow),
        pytest.param(2000, 0.05, marks=pytest.mark.slow),
    ],
)
def test_faults_are_skipped_exactly_and_all_listed(tmp_path: Path, number: int, rate: float) -> None:
    """All fourteen kinds in turn, at random places; five of them must be read."""
    members, injected, rng = [], {}, np.random.default_rng(0)
    kinds = [*sound_but_odd().items(), *faulty().items()]
    assert len(kinds) == 14
    good = [picture(n) for n in range(40)]
    places = rng.permutation(number)[: round(number * rate)].tolist()
    fault_at = {place: kinds[i % len(kinds)] for i, place in enumerate(places)}
    for n in range(number):
        kind, content = fault_at.get(n, ("good.jpg", good[n % len(good)]))
        if isinstance(content, bytes):
            members += [(f"{n}.{kind.partition('.')[2]}", content), (f"{n}.txt", b"caption")]
            continue
        injected[str(n)] = kind
        for name, data in content:
            members.append(
                (name.replace("x.", f"{n}.", 1), data.replace(b"x.0", b"%d.0" % n).replace(b"x.1", b"%d.1" % n))
            )
    listed = Collected()
    source = indexed(tmp_path, members, on_bad=listed)
    shard = bytearray((tmp_path / "foreign.tar").read_bytes())
    for i in range(len(source)):
        if injected.get(source.key(i)) == "flip":
            row = source.index.members[int(source.index.samples[i]["member"])]
            shard[int(row["start"]) + int(row["lead"]) + int(row["size"]) // 2] ^= 1
    (tmp_path / "foreign.tar").write_bytes(shard)
    read = 0
    for i in range(len(source)):
        try:
            record = source[i]
            for image in record.images:
                decode_rgb(image.source, where=source.where(i))
            read += 1
        except RecordError as error:
            listed.append(error)
    assert set(injected.values()) == faulty().keys()
    assert read == number - len(injected)
    assert sorted(error.where.split("foreign.tar: ")[1].split(":")[0].split(",")[0] for error in listed) == sorted(
        injected
    )


# --- fast decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB"), ("GIF", "L"), ("BMP", "RGB")],
)
def test_fast_decoding_gives_the_pixels_of_load_rgb(format: str, mode: str, orientation: int | None) -> None:
    out, exif = io.BytesIO(), PIL.Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    original = PIL.Image.open(io.BytesIO(picture(5, (37, 21), format="PNG"))).convert(mode)
    options: dict[str, Any] = {"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}
    if format == "JPEG":
        options["progressive"] = orientation is None
    original.save(out, format, **options)
    pixels = decode_rgb(out.getvalue())
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(load_rgb(Image(out.getvalue()))))


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


@pytest.mark.parametrize("transform", [0, 1, 2])
@pytest.mark.parametrize("jfif", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_decoding_of_adobe_jpegs(transform: int, jfif: bool, mode: str) -> None:
    image = PIL.Image.open(io.BytesIO(picture(5, (37, 21), format="PNG"))).convert(mode)
    data = encoded(image, "JPEG")
    assert data[2:4] == b"\xff\xe0"
    rest = data[2:] if jfif else data[4 + int.from_bytes(data[4:6], "big") :]
    adobe = data[:2] + segment(0xEE, b"Adobe" + bytes([0, 100, 0, 0, 0, 0, transform])) + rest
    assert np.array_equal(decode_rgb(adobe).permute(1, 2, 0).numpy(), np.array(load_rgb(Image(adobe))))


@pytest.mark.parametrize("words", [b'tiff:Orientation="6"', b"nothing", b""])
def test_fast_decoding_heeds_xmp(words: bytes) -> None:
    data = picture(5, (37, 21))
    xmp = data[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x " + words + b">") + data[2:]
    pixels = decode_rgb(xmp)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(load_rgb(Image(xmp))))
    assert tuple(pixels.shape) == ((3, 37, 21) if words.startswith(b"tiff") else (3, 21, 37))


def test_fast_decoding_refuses_what_load_rgb_refuses() -> None:
    data = picture(0, (40, 30))
    for broken in (data[:200], data[:-40], b"", b"\xff\xd8", data[:300] + bytes(50) + data[350:]):
        try:
            expected = load_rgb(Image(broken) if broken else Image(b"x"), where="w")
        except ImageError:
            with pytest.raises(ImageError):
                decode_rgb(broken or b"x", where="w")
        else:
            assert np.array_equal(decode_rgb(broken).permute(1, 2, 0).numpy(), np.array(expected))
    with pytest.raises(ImageError, match="more than"):
        decode_rgb(data, max_pixels=100)
    with pytest.raises(ImageError, match="over 200 times"):
        decode_rgb(picture(0, (500, 2)))


@pytest.mark.parametrize("size", [(8, 8), (60, 40), (120, 90), (400, 300)])
@pytest.mark.parametrize("place", [0.02, 0.5, 0.999])
def test_one_changed_bit_is_noticed_in_members_of_every_size(
    tmp_path: Path, size: tuple[int, int], place: float
) -> None:
    """Noise does not compress: the pictures have 200 bytes to 360 KB."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, "PNG")
    build_shards([Record.triple("q", "a", images=[buffer.getvalue()])], tmp_path)
    index = open_shards(tmp_path).index
    member = next(m for m in index.members if int(m["width"]))
    assert int(member["size"]) == len(buffer.getvalue())
    shard = tmp_path / index.header["shards"][0]["name"]
    data = bytearray(shard.read_bytes())
    data[int(member["start"]) + int(member["lead"]) + int(place * (int(member["size"]) - 1))] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RecordError, match="crc32 differs"):
        open_shards(tmp_path)[0]
