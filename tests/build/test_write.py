"""The folder of a build: whole or not there, every record with its images, and counts that add up."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.build.annotated import Dropped, Made
from mmit.build.write import Stated, line_of, write_build
from mmit.errors import ConfigError
from mmit.records import Record, read_jsonl
from mmit.yamlio import parse_yaml


def picture(colour: str = "red") -> bytes:
    buffer = BytesIO()
    PIL.Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def made(task: str = "a b", question: str = "q", *, held_out: bool = False, images: Any = (), **more: Any) -> Made:
    facts: dict[str, Any] = {"licence": "MIT", "meta": {"build": {"template": "t1"}}, **more}
    return Made(task, Record.triple(question, "x", images=list(images), **facts), held_out)


STATED = Stated({"seed": 3}, inputs={"rows": "abc"}, facts=lambda: {"more": 1})


def test_what_comes_in_is_accepted_or_dropped_and_counted(tmp_path: Path) -> None:
    gone = Dropped(task="a b", row="2", template="t2", reason="too long", text="it is long")
    counts = write_build([made(), gone, made(task="c", held_out=True), made()], tmp_path / "out", STATED)
    assert (counts.total, dict(counts.accepted), dict(counts.dropped)) == (4, {"a b": 2, "c": 1}, {"too long": 1})
    stated = json.loads((tmp_path / "out" / "build.json").read_text())
    assert (stated["in"], stated["more"], stated["inputs"], stated["held_out"]) == (4, 1, {"rows": "abc"}, ["c"])
    assert json.loads((tmp_path / "out" / "dropped.jsonl").read_text())["text"] == "it is long"
    assert len(list(read_jsonl(tmp_path / "out" / "records" / "a_b.jsonl"))) == 2  # a name that every file system takes
    found, _ = parse_yaml((tmp_path / "out" / "mixture.yaml").read_text(), where="")
    assert [source["name"] for source in found["data"]["train"]] == ["a b"]
    assert [Path(source["path"]).name for source in found["data"]["eval"]] == ["c.jsonl"]
    assert "| a b | 2 | 1 |  |" in (tmp_path / "out" / "card.md").read_text()


def test_an_image_of_bytes_is_a_file_once_and_found_from_its_record(tmp_path: Path) -> None:
    given = [made(images=[picture()]), made(images=[picture(), picture("blue")])]
    write_build(given, tmp_path / "out", STATED)
    files = sorted((tmp_path / "out" / "records" / "images").iterdir())
    assert len(files) == 2 and all(file.suffix == ".png" for file in files)
    first, second = read_jsonl(tmp_path / "out" / "records" / "a_b.jsonl")
    assert Path(str(first.images[0].source)).read_bytes() == picture()
    assert [Path(str(image.source)).read_bytes() for image in second.images] == [picture(), picture("blue")]


def test_a_line_says_what_is_counted_of_its_record(tmp_path: Path) -> None:
    line = line_of(made(held_out=True, meta={"build": {"how": "judge"}}, licence=None), tmp_path)
    assert (line.template, line.licence, line.held_out, line.files) == ("judge", "", True, {})
    assert line_of(made(meta={}), tmp_path).template == ""


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"terms that are not allowed: GPL-3.0-only \(1 rows\)"):
        write_build([made(licence="GPL-3.0-only")], tmp_path / "out", STATED)
    with pytest.raises(ConfigError, match="no row gave a record: it is long"):
        write_build([Dropped(task="a", row="1", template="", reason="r", text="it is long")], tmp_path / "out", STATED)
    with pytest.raises(ConfigError, match="no row gave a record: there are no rows"):
        write_build([], tmp_path / "out", STATED)
    with pytest.raises(ConfigError, match=r"nothing was kept: r \(2\)"):
        gone = Dropped(task="a", row="1", template="", reason="r", text="")
        write_build([gone, gone], tmp_path / "out", STATED, resumed=True)

    def broken() -> Any:
        yield made()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_build(broken(), tmp_path / "out", STATED)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_folder_that_is_taken_stays_and_one_that_goes_on_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_build([made(), made(task="old")], out, STATED)
    with pytest.raises(ConfigError, match="the folder is not empty"):
        write_build([made()], out, STATED)
    (out / "journal.jsonl").write_text("{}\n")
    write_build([made(task="new")], out, STATED, resumed=True, cap=5, base=tmp_path / "base.yaml")
    assert [path.name for path in (out / "records").iterdir()] == ["new.jsonl"] and (out / "journal.jsonl").exists()
    found, _ = parse_yaml((out / "mixture.yaml").read_text(), where="")
    assert found["base"] == "../base.yaml" and found["data"]["mixing"] == {"scheme": "proportional", "cap": 5}
