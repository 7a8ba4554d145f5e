"""Patterns, verbalizers and rows: what they become, and one error for each that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.errors import ConfigError, RecordError
from mmit.pet import Patterns, patterns_of, read_patterns, read_rows
from mmit.records import Image, Text

WHAT = {"id": "what", "input": "{{ image }}What colour is it?"}
NOTE = {
    "id": "note",
    "input": "Look: {{ image }}It is",
    "verbalizer": {"red": "a red one", "blue": "a blue one"},
}


def described(**changes: Any) -> dict[str, Any]:
    given = {"task": "colour", "fields": ["image"], "labels": ["red", "blue"], "patterns": [WHAT, NOTE]}
    return {key: value for key, value in (given | changes).items() if value is not None}


def test_a_pattern_ends_where_the_answer_begins_and_a_label_is_said_as_its_text() -> None:
    what, note = patterns_of(described()).patterns
    record = what.record({"image": Image("a.png")}, "blue", id="a")
    assert record.turns[0].parts == (Image("a.png"), Text("What colour is it?"))
    assert record.turns[1].text == "blue" and record.meta == {"choices": ["red", "blue"]}
    record = note.record({"image": Image("a.png")}, "blue", shares=[0.25, 0.75], meta={"of": 1})
    assert record.turns[0].parts == (Text("Look: "), Image("a.png"), Text("It is"))
    assert record.turns[1].text == "a blue one"
    assert record.meta == {"of": 1, "choices": ["a red one", "a blue one"], "shares": [0.25, 0.75]}


def pattern(**changes: Any) -> dict[str, Any]:
    return {"patterns": [WHAT | changes]}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"verbalizer": {"red": "warm", "blue": "warm"}}, "'red' and 'blue' are both said as 'warm'"),
        ({"verbalizer": {"red": "it", "blue": "it is blue"}}, r"'it' \('red'\) is the beginning of 'it is blue'"),
        ({"verbalizer": {"red": "red", "blue": " "}}, "the text for 'blue' is empty"),
        ({"verbalizer": {"red": "red", "blue": None}}, "the text for 'blue' is empty"),
        ({"verbalizer": {"red": "red", "blue": True}}, "the text for 'blue' is no text"),
        ({"verbalizer": {"red": "red"}}, "the label 'blue' is missing"),
        ({"verbalizer": {"red": "r", "blue": "b", "green": "g"}}, "'green' is no label"),
        ({"verbalizer": ["red", "blue"]}, "is a list"),
        ({"labels": ["red"]}, "there are 1 labels"),
        ({"labels": ["red", "red"]}, "two labels are the same"),
        ({"labels": None}, "'labels' is missing"),
        ({"task": None}, "'task' is missing"),
        ({"fields": ["image", "answer"]}, "a field is named 'answer'"),
        ({"patterns": []}, "'patterns' is missing"),
        (pattern(input=" "), "'input' is missing"),
        (pattern(input="{{ image }}It is ||| red"), r"'input' holds '\|\|\|'"),
        (pattern(input="{{ image }}Is it {{ answer }}?"), "reads 'answer', and so tells it"),
        (pattern(input="{{ image }}Is the {{ thing }} red?"), "reads the field 'thing'"),
        ({"patterns": [WHAT, WHAT]}, "two templates have the id 'what'"),
        (pattern(target="x"), "unknown key 'target'"),
        ({"words": 1}, "unknown key 'words'"),
    ],
)
def test_patterns_that_cannot_be_used(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        patterns_of(described(**changes), where="pvps.yaml")
    assert "pvps.yaml" in str(refused.value) and refused.value.remedy


def test_a_number_may_begin_another() -> None:
    digits = patterns_of(described(labels=["1", "10"], patterns=[WHAT]))
    assert digits.patterns[0].answers == ("1", "10")


@pytest.mark.parametrize(
    ("asked", "fields", "problem"),
    [
        ("{{ image }}{{ image }}What?", {"image": Image("a.png")}, "shows 2 image.*the row has 1"),
        ("{{ image[0] }}What?", {"image": [Image("a.png"), Image("b.png")]}, "shows 1 image.*the row has 2"),
        ("What?", {"image": Image("a.png")}, "the template shows none"),
    ],
)
def test_a_pattern_whose_images_are_not_the_rows(asked: str, fields: dict[str, Any], problem: str) -> None:
    (only,) = patterns_of(described(patterns=[{"id": "x", "input": asked}])).patterns
    with pytest.raises(RecordError, match=problem) as refused:
        only.record(fields, where="few.csv:2")
    assert "few.csv:2" in refused.value.where and "x" in refused.value.where


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "unknown").mkdir()
    for name in ("a.png", "b.png", "unknown/d.png", "unknown/c.jpg"):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "unknown" / "notes.txt").write_text("no picture")
    (tmp_path / "few.csv").write_text("image,colour\na.png,red\nb.png, blue\n")
    (tmp_path / "pvps.yaml").write_text(
        "task: colour\nlabels: [red, blue]\npatterns:\n  - {id: what, input: '{{ image }}What colour is it?'}\n"
    )
    return tmp_path


def patterns(world: Path) -> Patterns:
    return read_patterns(world / "pvps.yaml")


def test_rows_of_a_table_and_pictures_of_a_folder(world: Path) -> None:
    rows = read_rows({"path": "few.csv"}, patterns(world), labelled=True, folder=str(world))
    assert [(row.label, row.fields) for row in rows] == [
        ("red", {"image": Image(str(world / "a.png"))}),
        ("blue", {"image": Image(str(world / "b.png"))}),
    ]
    bare = read_rows({"path": "unknown"}, patterns(world), labelled=False, folder=str(world))
    assert [(row.label, Path(row.fields["image"].source).name) for row in bare] == [(None, "c.jpg"), (None, "d.png")]
    assert len(read_rows({"path": "unknown", "limit": 1}, patterns(world), labelled=False, folder=str(world))) == 1
    table = read_rows({"path": "few.csv"}, patterns(world), labelled=False, folder=str(world))
    assert [row.label for row in table] == [None, None]


@pytest.mark.parametrize(
    ("text", "described", "problem"),
    [
        ("image,colour\na.png,green\n", {}, "the label 'green' is not among"),
        ("image,colour\na.png,\n", {}, "'colour' is empty"),
        ("image,color\na.png,red\n", {}, "there is no column 'colour'"),
        ("image,colour\nz.png,red\n", {}, "there is no image file"),
        ("image,colour\n", {}, "there are no rows"),
        ("image,colour\na.png,red\n", {"label": "hue"}, "there is no column 'hue'"),
        ("image,colour\na.png,red\n", {"colour": "hue"}, "unknown key 'colour'"),
        ("image,colour\na.png,red\n", {"path": "unknown"}, "is a folder, where no picture has a label"),
    ],
)
def test_rows_that_cannot_be_used(world: Path, text: str, described: dict[str, Any], problem: str) -> None:
    (world / "few.csv").write_text(text)
    with pytest.raises((ConfigError, RecordError), match=problem) as refused:
        read_rows({"path": "few.csv", **described}, patterns(world), labelled=True, folder=str(world), key="labelled")
    assert refused.value.where and refused.value.remedy


def test_a_folder_without_pictures_or_for_patterns_of_several_fields(world: Path) -> None:
    (world / "empty").mkdir()
    with pytest.raises(ConfigError, match="there is no picture in the folder"):
        read_rows({"path": "empty"}, patterns(world), labelled=False, folder=str(world))
    two = patterns_of(described(fields=["image", "size"]))
    with pytest.raises(ConfigError, match="the patterns read image, size"):
        read_rows({"path": "unknown"}, two, labelled=False, folder=str(world))
