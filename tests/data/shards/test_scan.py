"""Indexing tars that mmit or others wrote: what is read of them, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmit.data.shards.reader import ShardSource, open_shards
from mmit.data.shards.records import Limits
from mmit.data.shards.scan import index_tars
from mmit.errors import ConfigError, MmitError, RecordError
from mmit.records import Image, Record
from tests.cli.commands import good, mmit
from tests.data.shards.shard_samples import Collected, picture, tar_bytes, write_tar
from tests.data.shards.test_reader import caption, indexed


def test_boxes_of_an_index_are_those_of_its_records(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}],
        "objects": {"bbox": [[3, 2, 6, 8]], "bbox_type": "real"},
    }
    members = [("k.jpg", picture(1)), ("k.json", json.dumps(row).encode())]
    source = indexed(tmp_path, members, options={"boxes": "norm1000"})
    assert source[0].turns[1].text == source.outline(0).turns[1].text == "[250, 250, 500, 1000]"
    with pytest.raises(ConfigError, match="option boxes is 'norm'"):
        index_tars([tmp_path / "foreign.tar"], tmp_path / "other", options={"boxes": "norm"})
    given = ("data", "index", tmp_path / "foreign.tar", "--out", tmp_path / "by-command")
    refused = mmit(*given)
    assert refused.exit_code == 2 and "`mmit data index`" in " ".join(refused.stderr.split())
    good(*given, "--option", "boxes=norm1")
    assert open_shards(tmp_path / "by-command")[0].turns[1].text == "[0.250, 0.250, 0.500, 1.000]"


def test_thoughts_of_an_index_are_those_of_its_records(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "[THINK]x[/THINK]a"}]}
    members = [("k.json", json.dumps(row).encode())]
    for name in ("plain", "read"):
        (tmp_path / name).mkdir()
    assert indexed(tmp_path / "plain", members)[0].turns[1].thinking is None
    answer = indexed(tmp_path / "read", members, options={"thoughts": "[THINK]...[/THINK]"})[0].turns[1]
    assert (answer.thinking, answer.text) == ("x", "a")
    with pytest.raises(ConfigError, match="option thoughts is '<think>'"):
        index_tars([tmp_path / "read" / "foreign.tar"], tmp_path / "other", options={"thoughts": "<think>"})


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_img2dataset(tmp_path: Path, format: int) -> None:
    long = "folder/" + "x" * (60 if format == tarfile.USTAR_FORMAT else 200)
    name = "" if format == tarfile.USTAR_FORMAT else "é"
    members = caption("000", 1, license="CC-BY-4.0") + caption(long + name, 2)
    source = indexed(tmp_path, members, format=format)
    assert [record.turns[-1].text for record in source] == ["a caption 1", "a caption 2"]
    assert [record.images[0].source for record in source] == [picture(1), picture(2)]
    assert source[0].turns[0].parts == (Image(picture(1)),)
    assert source[0].meta["url"] == "http://x/y.jpg"
    assert source[0].row == 1 and source[0].source == source.origin and source.key(1) == long + name


def test_captions_with_an_instruction(tmp_path: Path) -> None:
    source = indexed(tmp_path, caption("0") + caption("1"), instruction=["Describe.", "What is it?"], seed=3)
    said = [record.turns[0].text for record in source]
    assert set(said) <= {"Describe.", "What is it?"} and said == [record.turns[0].text for record in source]


def test_openflamingo_documents(tmp_path: Path) -> None:
    row = {
        "text_list": ["Before.", "A cat.", "It sleeps.", "A dog."],
        "image_info": [
            {"image_base64": base64.b64encode(picture(1)).decode(), "matched_text_index": 1},
            {"image_base64": base64.b64encode(picture(2)).decode(), "matched_text_index": 3},
        ],
        "similarity_matrix": [[0.1], [0.2]],
        "url": "http://x",
    }
    source = indexed(tmp_path, [("doc.json", json.dumps(row).encode())])
    turns = source[0].turns
    assert [turn.text for turn in turns] == ["Before.\n", "A cat. It sleeps.", "", "A dog."]
    assert [image.source for image in source[0].images] == [picture(1), picture(2)]
    assert source[0].meta == {"url": "http://x"}
    inline = source.index.members[source.index.members["inline"] == 1]
    assert inline[["width", "height"]].tolist() == [(12, 8)] * 2


def test_llava_rows_beside_their_pictures(tmp_path: Path) -> None:
    row = {
        "id": "7",
        "image": "coco/7.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    }
    source = indexed(tmp_path, [("7.jpg", picture(7)), ("7.json", json.dumps(row).encode())])
    assert source[0].id == "7" and source[0].images == (Image(picture(7)),) and source[0].turns[1].text == "A cat."


def sample(*members: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    return [*members, *caption("good")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(*caption("a"), ("a.pyd", b"x")), "type that is not accepted"),
        (sample(*caption("a"), ("a.PKL", b"x")), "type that is not accepted"),
        (sample(("a.jpg", picture(0))), "cannot tell what the sample is"),
        (sample(("a.txt", b"x")), "cannot tell what the sample is"),
        (sample(("a", b"x")), "has no extension"),
        (sample(("a.jpg", b""), ("a.txt", b"x")), "is empty"),
        (sample(("a.jpg", b"x"), ("a.txt", b"x")), "cannot read its header"),
        (sample(("a.jpg", picture(0)), ("a.txt", b"\xff")), "not UTF-8"),
        (sample(("a.json", b'{"turns": ')), "not JSON"),
        (sample(("a.json", b"[" * 100_000)), "not JSON"),
        (sample(("a.json", b'{"turns": []}')), "no user turn"),
        (sample(*caption("a"), ("a.txt", b"x")), "there twice"),
        (sample(*caption("a", status="failed_to_download")), "failed_to_download"),
        (sample(*caption("a"), *caption("b"), *caption("a")), "was there before"),
    ],
)
def test_an_unusable_sample_is_named_and_the_others_kept(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        indexed(tmp_path, members)
    reported = Collected()
    source = indexed(tmp_path, members, on_bad=reported)
    assert len(reported) == 1 and message in str(reported[0])
    assert "foreign.tar" in reported[0].where
    keys = [source.key(i) for i in range(len(source))]
    assert keys[-1] == "good" and len(keys) == len({n.partition(".")[0] for n, _ in members}) - (
        "before" not in message
    )


def test_ignored_members_are_counted(tmp_path: Path) -> None:
    members = [*caption("a"), ("a.npy", b"x"), *caption("b"), ("b.npy", b"y")]
    source = indexed(tmp_path, members, ignore=["npy"])
    assert len(source) == 2 and source.index.header["left_out"] == {"npy": 2}


def test_mmit_samples_must_use_their_pictures(tmp_path: Path) -> None:
    row = json.dumps(Record.triple("q", "a", images=["k.0.jpg"]).to_json()).encode()
    assert len(indexed(tmp_path, [("k.json", row), ("k.0.jpg", picture(0))])) == 1
    with pytest.raises(RecordError, match="shown by no image part"):
        indexed(tmp_path, [("k.json", row), ("k.0.jpg", picture(0)), ("k.1.jpg", picture(1))])
    with pytest.raises(RecordError, match="is no member"):
        indexed(tmp_path, [("k.json", row), ("k.1.jpg", picture(0))])


def odd_member(kind: bytes, **fields: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in caption("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("b.txt")
        info.type = kind
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (odd_member(tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
        (odd_member(tarfile.LNKTYPE, linkname="a.jpg"), "a hard link"),
        (odd_member(tarfile.CHRTYPE), "a character device"),
        (odd_member(tarfile.FIFOTYPE), "a pipe"),
        (tar_bytes(caption("a")) + tar_bytes(caption("b")), "data after the end-of-archive marker"),
        (tar_bytes(caption("a"))[: 512 * 8], "no end-of-archive marker"),
        (tar_bytes(caption("a"))[:2000], "cut short"),
        (b"", "cut short"),
        (b"PK\x03\x04" + bytes(600), "a zip file"),
        (b"\x1f\x8b" + bytes(600), "a gzip file"),
        (os.urandom(2048).replace(b"\x1f\x8b", b"xx"), "not a tar header"),
    ],
)
def test_what_a_tar_must_not_hold(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "odd.tar").write_bytes(data)
    with pytest.raises(RecordError, match=message) as caught:
        index_tars([tmp_path / "odd.tar"], tmp_path / "index")
    assert "odd.tar" in caught.value.where and caught.value.remedy


def test_directories_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(odd_member(tarfile.DIRTYPE))
    assert index_tars([tmp_path / "a.tar"], tmp_path) == 1


@pytest.mark.parametrize("path", ["pipe:cat x.tar", "file:///x.tar", "ssh://host/x.tar", "no/such.tar"])
def test_refused_paths(tmp_path: Path, path: str) -> None:
    with pytest.raises(MmitError, match="scheme|No such file"):
        index_tars([path], tmp_path)


def test_limits(tmp_path: Path) -> None:
    for limits in (Limits(members=2), Limits(member_bytes=50), Limits(sample_bytes=400), Limits(key_bytes=2)):
        with pytest.raises(RecordError):
            indexed(tmp_path, caption("abc"), limits=limits)
    source = indexed(tmp_path, caption("abc"))
    strict = ShardSource(source.origin, limits=Limits(member_bytes=50))
    with pytest.raises(RecordError, match="over the limit"):
        strict[0]


def test_many_tars_in_processes(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", caption(f"{n}-0", n) + caption(f"{n}-1", n)) for n in range(5)]
    seen = []
    assert index_tars(paths, tmp_path, workers=2, progress=lambda done, total: seen.append((done, total))) == 10
    source = open_shards(tmp_path)
    assert [source.key(i) for i in range(10)] == [f"{n}-{k}" for n in range(5) for k in range(2)]
    assert seen[-1] == (5, 5)
