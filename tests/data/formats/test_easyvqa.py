"""The easy-VQA package as records: one per image, its own split, captions from its answers."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from mmit.data.formats import easy_vqa, easy_vqa_captions
from mmit.data.formats import easyvqa as package
from mmit.errors import ConfigError, MmitError, RecordError
from tests.data.formats.format_tools import shape

QUESTIONS = [
    ["what is the blue shape?", "rectangle", 0],
    ["is there a teal shape?", "no", 0],
    ["is no triangle present?", "no", 1],
    ["what color is the triangle?", "red", 1],
    ["does the image not contain a gray shape?", "no", 2],
    ["is there not a circle?", "yes", 2],
    ["is there a circle in the image?", "yes", 3],
    ["is there a circle?", "no", 4],
    ["is there not a red shape?", "yes", 4],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "questions.json").write_text(json.dumps(QUESTIONS))
    return tmp_path


def test_easy_vqa_makes_one_record_per_image(folder: Path) -> None:
    records = list(easy_vqa("train", folder))
    assert [record.id for record in records] == [f"easy-vqa/train/{n}" for n in range(5)]
    assert [record.row for record in records] == [1, 3, 5, 7, 8]
    for record in records:
        record.validate()
        assert (record.source, record.licence) == ("easy-vqa/train", "MIT")
    picture = str(folder / "data/train/images/0.png")
    assert shape(records[0]) == [
        ("user", [f"[{picture}]", "what is the blue shape?"]),
        ("assistant", ["rectangle"]),
        ("user", ["is there a teal shape?"]),
        ("assistant", ["no"]),
    ]
    assert records[0].meta == {"answer_types": ["shape", "yes/no"]}
    assert records[1].meta == {"answer_types": ["yes/no", "color"]}
    assert next(easy_vqa("test", folder)).id == "easy-vqa/test/0"


def test_easy_vqa_captions_say_what_the_answers_imply(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(package.log, "warning", lambda text, *given: logged.append(text % given))
    skipped: list[str] = []
    records = list(easy_vqa_captions("train", folder, on_skip=skipped.append))
    captions = [record.turns[1].text for record in records]
    assert captions == ["a blue rectangle", "a red triangle", "a gray shape", "a circle"]
    assert skipped == ["easy-vqa/train/4"] and "1 of 5 images" in "".join(logged)
    for record in records:
        record.validate()
        assert record.turns[0].parts == record.images and len(record.images) == 1


def test_easy_vqa_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        easy_vqa("trian", folder)
    with pytest.raises(MmitError, match="pip install easy-vqa"):
        easy_vqa("train", folder / "elsewhere")
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(MmitError, match="not installed\n.*pip install easy-vqa"):
        easy_vqa_captions("train")
    path = folder / "data/train/questions.json"
    for text, cause in (("[", "not JSON"), ('[["q", "a", "7"]]', "found something other"), ("{}", "found")):
        path.write_text(text)
        with pytest.raises(RecordError, match=cause):
            easy_vqa("train", folder)
    path.write_text('[["what is the hue?", "pink", 0]]')
    with pytest.raises(RecordError, match="'pink' is none"):
        list(easy_vqa("train", folder))
    path.write_text('[["is there a circle?", "yes", 0], ["what shape is present?", "triangle", 0]]')
    with pytest.raises(RecordError, match="contradict each other: circle, triangle"):
        list(easy_vqa_captions("train", folder))


def test_the_installed_package() -> None:
    pytest.importorskip("easy_vqa")
    sizes = {}
    for split in ("train", "test"):
        records = list(easy_vqa(split))
        sizes[split] = (len(records), sum(len(record.turns) for record in records) // 2)
        images = {record.images[0].source for record in records}
        assert len(images) == len(records) and os.path.isfile(str(min(map(str, images))))
        types = Counter(kind for record in records for kind in record.meta["answer_types"])
        assert sum(types.values()) == sizes[split][1] and len(types) == 3
    assert sizes == {"train": (4000, 38575), "test": (1000, 9673)}
    assert len(list(easy_vqa_captions("train"))) == 3961
