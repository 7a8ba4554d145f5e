"""`mmit data build` and `index`: four commands from foreign files to one mixture that trains and resumes."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import PIL.Image
import pytest
import webdataset
from typer.testing import CliRunner

from mmit.cli import app
from mmit.data.sources import open_source
from mmit.train.run import run
from tests.tiny_run import tiny_config

invoke = CliRunner().invoke


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (20, 20), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LLaVA JSON, an Alpaca file, a CSV with a column mapping and an img2dataset tar."""
    (tmp_path / "a.png").write_bytes(png((255, 0, 0)))
    llava = [
        {"id": str(i), "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": f"Red {i}."}]}
        for i in range(5)
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    alpaca = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(4)]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["question", "told"], *[[f"Ask {i}?", f"Told {i}."] for i in range(3)]])
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i in range(6):
            for suffix, data in (("jpg", _jpeg(i)), ("txt", f"a picture number {i}".encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return tmp_path


def _jpeg(i: int) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (24, 24), (40 * i, 0, 200)).save(out, "JPEG")
    return out.getvalue()


def ok(*arguments: object) -> str:
    done = invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_four_commands_make_a_mixture_that_reads_every_record_once(folder: Path) -> None:
    assert "llava" in ok("data", "build", folder / "llava.json", "--out", folder / "llava", "--workers", 1)
    ok("data", "import", "auto", folder / "alpaca.json", "--out", folder / "alpaca.jsonl")
    ok("data", "import", "csv", folder / "table.csv", "--out", folder / "table.jsonl",
       "--option", "columns=instruction=question,output=told")  # fmt: skip
    say = ok("data", "index", folder / "00000.tar", "--out", folder / "web", "--instruction", "Hi.", "--workers", 1)
    assert "6 samples" in say

    names = ["llava", "alpaca.jsonl", "table.jsonl", "web"]
    sources = [{"path": str(folder / name)} for name in names]
    assert [len(open_source(folder / name)) for name in names] == [5, 4, 3, 6]
    data = {"train": sources, "max_length": 128, "pack_tokens": 160, "workers": 0}
    train = {"steps": None, "epochs": 1, "rows_per_step": 1, "precision": "fp32", "save_every": 2}
    config = tiny_config(folder / "x", run={"dir": str(folder / "run")}, data=data, train=train)
    assert run(config) == 0
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["records"] for row in rows) == 18

    shards = sorted((folder / "llava").glob("*.tar"))
    samples = [s for shard in shards for s in webdataset.WebDataset(str(shard), shardshuffle=False)]
    assert len(samples) == 5 and all(any(k.endswith("png") for k in s) for s in samples)


def test_building_again_keeps_what_is_there_and_bad_records_are_listed(folder: Path) -> None:
    ok("data", "build", folder / "llava.json", "--out", folder / "s", "--workers", 1)
    assert "there already" in ok("data", "build", folder / "llava.json", "--out", folder / "s", "--workers", 1)
    (folder / "a.png").write_bytes(b"no picture")
    done = invoke(app, ["data", "build", str(folder / "llava.json"), "--out", str(folder / "t"), "--workers", "1"])
    assert done.exit_code == 2 and "a.png" in done.output
    both = [str(folder / "llava.json"), str(folder / "alpaca.json")]
    assert "5 bad records" in ok("data", "build", *both, "--out", folder / "u", "--workers", 1, "--skip-bad")
    assert len((folder / "u" / "bad.jsonl").read_text().splitlines()) == 5
    assert len(open_source(folder / "u")) == 4


def test_a_mixing_scheme_decides_how_much_of_each_source_an_epoch_holds(folder: Path) -> None:
    ok("data", "import", "auto", folder / "alpaca.json", "--out", folder / "alpaca.jsonl")
    ok("data", "build", folder / "llava.json", "--out", folder / "llava", "--workers", 1)
    counts = {}
    for scheme in ("weights", "equal"):
        data = {
            "train": [{"path": str(folder / "alpaca.jsonl"), "weight": 3.0}, {"path": str(folder / "llava")}],
            "mixing": {"scheme": scheme},
            "max_length": 128,
            "pack_tokens": 160,
            "workers": 0,
        }
        train = {"steps": None, "epochs": 1, "rows_per_step": 1, "precision": "fp32"}
        assert run(tiny_config(folder / "x", run={"dir": str(folder / scheme)}, data=data, train=train)) == 0
        rows = [json.loads(line) for line in (folder / scheme / "metrics.jsonl").read_text().splitlines()]
        counts[scheme] = sum(row["records"] for row in rows)
    assert counts["weights"] == 3 * 4 + 5
    assert counts["equal"] == round(3 * 4.5) + 4 or counts["equal"] == round(3 * 4.5) + 5


def _tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, data in sample.items():
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def _talk(**keys: object) -> dict[str, bytes]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    return {"jpg": _jpeg(1), "json": json.dumps({"conversations": turns, **keys}).encode()}


def _caption(**keys: object) -> dict[str, bytes]:
    return {"jpg": _jpeg(2), "txt": b"a red square", "json": json.dumps(keys).encode()}


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ([_talk(topic="a"), _talk(topic="b", score=3), _talk(topic="")], "topic (2 rows), score (1 row)"),
        ([_caption(url="u", similarity=0.3), _caption(url="v")], "url (2 rows), similarity (1 row)"),
    ],
    ids=["conversations", "captions"],
)
def test_keys_that_stay_in_the_meta_are_told_by_index_check_and_run(
    samples: list, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"kept in meta only: {told}"
    tar = _tar(tmp_path / "a.tar", samples)
    said = ok("data", "index", tar, "--out", tmp_path / "web", "--instruction", "Hi.", "--workers", 1)
    assert line in said
    assert line in invoke(app, ["data", "check", str(tmp_path / "web")]).output
    data = {"train": [{"path": str(tmp_path / "web")}], "max_length": 128, "pack_tokens": 160, "workers": 0}
    options = {"steps": 1, "rows_per_step": 1, "precision": "fp32"}
    config = tiny_config(tmp_path / "x", run={"dir": str(tmp_path / "run")}, data=data, train=options)
    capsys.readouterr()
    assert run(config) == 0
    assert f"{tmp_path / 'web'}: {line}" in capsys.readouterr().err


def test_keys_are_counted_of_the_rows_that_are_taken(folder: Path) -> None:
    """Of FILE#N and a limit those rows count, not all; mmit's own meta never does."""
    rows = [{"instruction": f"Say {i}.", "output": "x", "topic": "t"} for i in range(8)]
    (folder / "rows.json").write_text(json.dumps(rows))
    assert "topic (8 rows)" in ok("data", "pack", folder / "rows.json", "--out", folder / "p", "--workers", 1)
    assert "topic (3 rows)" in ok("data", "pack", f"{folder}/rows.json#3", "--out", folder / "q", "--workers", 1)
    assert "topic (3 rows)" in invoke(app, ["data", "check", f"{folder}/rows.json#3"]).output
    assert "kept in meta" not in invoke(app, ["data", "check", str(folder / "p")]).output
    web = _tar(folder / "b.tar", [_talk(topic="a"), _talk(topic="b"), _talk(topic="c")])
    ok("data", "index", web, "--out", folder / "web", "--workers", 1)
    assert "topic (2 rows)" in invoke(app, ["data", "check", f"{folder}/web#2"]).output
