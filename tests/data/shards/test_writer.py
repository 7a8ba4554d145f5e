"""Building shards: the same bytes whoever builds, resumed where it was interrupted, nothing left out unsaid."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmit.data.images import load_rgb
from mmit.data.shards import writer as shards
from mmit.data.shards.reader import open_shards
from mmit.data.shards.records import Limits
from mmit.data.shards.scan import index_tars
from mmit.data.shards.writer import build_shards
from mmit.errors import ConfigError, ImageError, RecordError, WriteError
from mmit.records import Image, Record, Text, Turn
from tests.data.shards.shard_samples import Collected, picture, records, write_tar
from tests.data.shards.test_reader import SMALL, caption


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    given = records(20)
    report = build_shards(given, tmp_path, max_bytes=SMALL)
    source = open_shards(tmp_path)
    assert [source[i] for i in range(len(source))] == given == list(source)
    assert (report.records, report.bad, report.kept) == (20, 0, 0) and report.shards == len(tars(tmp_path)) > 2
    assert source.verify() == []
    with pytest.raises(IndexError):
        source[20]


def test_plain_webdataset_reads_the_tars(tmp_path: Path) -> None:
    import webdataset

    given = records(9)
    build_shards(given, tmp_path, max_bytes=SMALL)
    paths = [str(tmp_path / name) for name in tars(tmp_path)]
    read = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{i:09d}" for i in range(9)]
    for sample, record in zip(read, given, strict=True):
        row = json.loads(sample["json"])
        names = [part["image"] for turn in row["turns"] for part in turn["parts"] if "image" in part]
        found = [sample[name.removeprefix(f"{sample['__key__']}.")] for name in names]
        assert found == [image.source for image in record.images]
        assert row["id"] == record.id and row["meta"] == record.meta


def test_the_bytes_do_not_depend_on_workers_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = records(15)
    build_shards(given, tmp_path / "a", max_bytes=SMALL, workers=1)
    monkeypatch.setattr("time.time", lambda: 4e9)
    build_shards(iter(given), tmp_path / "b", max_bytes=SMALL, workers=3)
    assert tars(tmp_path / "a") == tars(tmp_path / "b")
    assert open_shards(tmp_path / "a").fingerprint == open_shards(tmp_path / "b").fingerprint


def test_paths_bytes_and_pil_pictures_are_kept(tmp_path: Path) -> None:
    data = picture(1)
    (tmp_path / "a.jpg").write_bytes(data)
    pil = PIL.Image.open(io.BytesIO(picture(2, format="PNG")))
    given = Record.triple("q", "a", images=[str(tmp_path / "a.jpg"), data, pil], id="x")
    build_shards([given], tmp_path / "out")
    source = open_shards(tmp_path / "out")
    first, second, third = (image.source for image in source[0].images)
    assert first == second == data
    assert list(source.members(0)) == ["0.jpg", "1.png", "json"]  # equal pictures are stored once
    assert np.array_equal(load_rgb(Image(third)), pil)


def test_a_build_is_resumed_and_keeps_what_is_unchanged(tmp_path: Path) -> None:
    given = records(20)
    build_shards(given, tmp_path / "whole", max_bytes=SMALL)

    class Killed(Exception):
        pass

    def kill(done: int, shards_done: int) -> None:
        if shards_done == 2:
            raise Killed

    out = tmp_path / "resumed"
    with pytest.raises(Killed):
        build_shards(given, out, max_bytes=SMALL, progress=kill)
    with pytest.raises(ConfigError, match="no index of shards"):
        open_shards(out)
    report = build_shards(given, out, max_bytes=SMALL)
    assert report.kept == 2 and tars(out) == tars(tmp_path / "whole")
    assert open_shards(out).fingerprint == open_shards(tmp_path / "whole").fingerprint
    assert build_shards(given, out, max_bytes=SMALL).kept == report.shards

    changed = [replace(given[0], meta={"n": 9}), *given[1:]]
    assert build_shards(changed, out, max_bytes=SMALL).kept == report.shards - 1
    assert list(open_shards(out)) == changed


def test_a_changed_file_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(picture(1))
    given = [Record.triple("q", "a", images=[str(path)])]
    build_shards(given, tmp_path / "out")
    path.write_bytes(picture(2, (13, 9)))
    assert build_shards(given, tmp_path / "out").kept == 0
    assert open_shards(tmp_path / "out")[0].images[0].source == path.read_bytes()


def test_a_smaller_build_leaves_no_old_shards(tmp_path: Path) -> None:
    build_shards(records(20), tmp_path, max_bytes=SMALL)
    (tmp_path / ".shard-000000.tar.1.tmp").write_bytes(b"left by a kill")
    report = build_shards(records(4), tmp_path, max_bytes=SMALL)
    assert len(tars(tmp_path)) == report.shards and len(list(tmp_path.glob("index-*"))) == 1
    assert list(open_shards(tmp_path)) == records(4) and not list(tmp_path.glob(".shard*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_counted_and_named(tmp_path: Path, workers: int) -> None:
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    good = records(3)
    bad = [
        Record.triple("q", "a", images=[str(tmp_path / "missing.jpg")], id="missing"),
        Record.triple("q", "a", images=[str(tmp_path / "text.jpg")], id="html"),
        Record.triple("q", "a", images=[b"\x89PNG\r\n\x1a\n"], id="cut"),
        Record((Turn("user", (Text("q"),)), Turn("user", (Text("q"),))), id="twice"),
    ]
    reported = Collected()
    report = build_shards([*good, *bad], tmp_path / "out", on_bad=reported, workers=workers)
    assert report.bad == len(reported) == 4 and report.records == 3
    for name in ("missing", "html", "cut", "twice"):
        assert sum(f"({name})" in str(error) for error in reported) == 1
    assert all(error.remedy for error in reported)
    assert list(open_shards(tmp_path / "out")) == good
    again = Collected()
    build_shards([*good, *bad], tmp_path / "out", on_bad=again, workers=workers)
    assert sorted(map(str, again)) == sorted(map(str, reported))  # a kept shard still says what it lacks
    with pytest.raises(RecordError, match="missing.jpg"):
        build_shards([*good, *bad], tmp_path / "strict", workers=workers)


def test_a_maximum_side_scales_and_keeps_the_rest(tmp_path: Path) -> None:
    small, large, turned = picture(1, (8, 8)), picture(2, (64, 32)), picture(3, (64, 32), orientation=6)
    png = picture(4, (64, 32), format="PNG")
    given = [
        Record.triple("q", "a", images=[data], row=i, source="s")
        for i, data in enumerate((small, large, turned, png), 1)
    ]
    build_shards(given, tmp_path, max_side=16)
    source = open_shards(tmp_path)
    got = [record.images[0].source for record in source]
    assert got[0] == small
    assert [PIL.Image.open(io.BytesIO(data)).size for data in got] == [(8, 8), (16, 8), (8, 16), (16, 8)]
    assert [PIL.Image.open(io.BytesIO(data)).format for data in got] == ["JPEG", "JPEG", "JPEG", "PNG"]


def test_what_a_build_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no record to write"):
        build_shards([], tmp_path / "none")
    with pytest.raises(ConfigError, match="max_side"):
        build_shards(records(1), tmp_path / "side", max_side=0)
    with pytest.raises(ImageError, match="pixels are more than"):
        build_shards([Record.triple("q", "a", images=[picture(0)])], tmp_path / "bomb", max_pixels=50)
    with pytest.raises(RecordError, match="over the limit"):
        build_shards(records(3), tmp_path / "large", limits=Limits(member_bytes=100))
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        build_shards(records(1), tmp_path / "file")
    with shards._locked(tmp_path / "busy"), pytest.raises(ConfigError, match="another build"):
        build_shards(records(1), tmp_path / "busy")


def test_a_build_does_not_replace_an_index_of_foreign_tars(tmp_path: Path) -> None:
    index_tars([write_tar(tmp_path / "a.tar", caption("k"))], tmp_path)
    with pytest.raises(ConfigError, match="index of other tars"):
        build_shards(records(1), tmp_path)
