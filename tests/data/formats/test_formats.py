"""import_file and detect_format: provenance, streaming, options, images, and errors with their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmit.data.formats import FORMATS, detect_format, import_file
from mmit.data.sources import SourceSpec, open_source
from mmit.errors import ConfigError, ImageError, RecordError
from mmit.records import Image, Record, read_jsonl, write_jsonl
from tests.data.formats.format_tools import ask, talk, write


def test_own_format_equals_read_jsonl(tmp_path: Path) -> None:
    records = [Record.triple("a", "b", images=[tmp_path / "p/a.png"], id="1", source="s", row=4, licence="MIT")]
    path = tmp_path / "x.jsonl"
    write_jsonl([*records, Record.triple("c", "d")], path)
    assert list(import_file(path, "mmit")) == list(read_jsonl(path))
    assert [r.licence for r in import_file(path, "mmit", licence="CC0")] == ["MIT", "CC0"]
    path.write_text('{"id": "q", "turns": [{"role": "user"}]}')
    with pytest.raises(RecordError) as caught:
        list(import_file(path, "mmit"))
    assert caught.value.where == f"{path}:1 (q): turn 1"


def test_import_file_fills_in_provenance_and_streams(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(talk("Hi", "Ho", image="a.png")) + "\n\nnot json\n")
    first = next(import_file(path, "llava"))
    assert (first.source, first.row, first.licence) == (str(path), 1, None)
    assert first.images == (Image(str(tmp_path / "a.png")),)
    named = next(import_file(path, "llava", image_root="pics", source="set", licence="MIT"))
    assert named.where == "set:1 (x1)" and named.licence == "MIT" and named.images == (Image("pics/a.png"),)
    bad: list[RecordError] = []
    assert len(list(import_file(path, "llava", on_bad=bad.append))) == 1
    assert bad[0].where == f"{path}:3" and "not JSON" in bad[0].problem
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        import_file(path, "lava")
    with pytest.raises(RecordError, match="cannot read"):
        list(import_file(tmp_path / "none", "llava"))


def test_wrong_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[\n {"a": 1},\n {"a": \n]')
    for action in (lambda: list(import_file(path, "llava", on_bad=lambda error: None)), lambda: detect_format(path)):
        with pytest.raises(RecordError) as caught:
            action()
        assert caught.value.where == f"{path}:4" and "JSON list" in caught.value.remedy
    path.write_bytes(b"[\xff]")
    with pytest.raises(RecordError, match="UTF-8"):
        list(import_file(path, "llava"))


def test_check_images_names_missing_files(tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(b"x")
    path = tmp_path / "d.json"
    path.write_text(json.dumps([talk("a", "b", image="here.png"), talk("<image><image>", "b", image=["u", "v"])]))
    assert len(list(import_file(path, "llava"))) == 2
    with pytest.raises(ImageError) as caught:
        list(import_file(path, "llava", check_images=True))
    assert caught.value.where == f"{path}:2 (x1)" and "2 image files are missing" in caught.value.problem
    assert str(tmp_path / "u")[-20:] in caught.value.problem and "image_root" in caught.value.remedy


@pytest.mark.parametrize(
    ("rows", "name", "reason"),
    [
        ([talk("a", "b"), talk("a", "b", image="i")], "llava", "'image'"),
        ([talk("a", "b")], "sharegpt", "none of the first 1"),
        ([{"conversations": [{"from": "user", "value": "a"}]}], "sharegpt", "speakers other than"),
        ([{"conversations": [{"role": "user", "content": "a"}]}], "messages", "'role'"),
        ([ask("x")], "messages", "'messages'"),
        ([{"instruction": "a", "output": "b"}], "alpaca", "'instruction' and 'output'"),
        ([Record.triple("a", "b").to_json()], "mmit", "'turns'"),
    ],
)
def test_detect_format(tmp_path: Path, rows: list, name: str, reason: str) -> None:
    path = tmp_path / "d"
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        path.write_text(text)
        found, why = detect_format(path)
        assert found == name and reason in why
        assert found in FORMATS


@pytest.mark.parametrize("text", ["", "[]", '{"question": "a"}', "[3]", "nonsense"])
def test_detect_format_refuses_to_guess(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        detect_format(path)
    assert str(path) in caught.value.where and caught.value.remedy


def test_a_mixture_is_no_file_of_records(tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text("data:\n  train:\n    - {path: a.jsonl}\n")
    with pytest.raises(RecordError, match="config") as error:
        detect_format(str(tmp_path / "mixture.yaml"))
    assert "data.train" in error.value.remedy


def test_sources_take_the_options_of_a_format(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("q,a,p\nWho?,Ann,x.png\nWhat?,It,y.png\n")
    options = {"columns": {"instruction": "q", "output": "a", "image": "p"}}
    source = open_source(SourceSpec(path, format="csv", options=options), cache=tmp_path / "cache")
    assert [source[n].turns[1].text for n in range(len(source))] == ["Ann", "It"]
    assert source[0].images == (Image(str(tmp_path / "x.png")),) and source[1].where.endswith("t.csv:3")
    other = open_source(SourceSpec(path, format="csv", options={"columns": "instruction=a"}), cache=tmp_path / "cache")
    assert len(other[0].turns) == 1 and other.fingerprint != source.fingerprint
    with pytest.raises(ConfigError, match="did you mean 'columns'"):
        open_source(SourceSpec(path, format="csv", options={"column": "instruction=a"}), cache=tmp_path / "cache")


def test_a_changed_second_file_is_noticed(tmp_path: Path) -> None:
    questions = {"data_subtype": "val2014", "questions": [{"image_id": 1, "question_id": 1, "question": "q"}]}
    path = write(tmp_path / "q.json", questions)
    answers, found = tmp_path / "a.json", []
    for answer in ("yes", "never"):
        write(answers, {"annotations": [{"question_id": 1, "multiple_choice_answer": answer}]})
        source = open_source(SourceSpec(path, format="vqav2", options={"annotations": str(answers)}), cache=tmp_path)
        found.append(source[0].turns[1].text)
    assert found == ["yes", "never"]
