"""`mmit build self-instruct`: seeds of either form, the plan that settings make, and what a dry run says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmit.build.self_instruct import KEYWORDS, InstructPlan, Task
from mmit.cli.build_grow import _pictures, _plan, read_seeds
from mmit.errors import ConfigError, RecordError
from mmit.records import Record, write_jsonl
from mmit.yamlio import dump_yaml
from tests.cli.commands import assert_one_message, good, mmit


def seeds_of(folder: Path, *rows: Any) -> list[Task]:
    (folder / "seeds.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return read_seeds({"seeds": "seeds.jsonl"}, folder / "c.yaml")


def test_seeds_are_tasks_or_records(tmp_path: Path) -> None:
    task = {"instruction": " Sort them. ", "instances": [{"input": "b a", "output": "a b"}, {"input": "x"}]}
    record = Record.triple(" What is it?", "A cat.", id="r").to_json()
    found = seeds_of(tmp_path, task | {"id": "s", "is_classification": True}, record, {"instruction": "Say hi."})
    assert found == [
        Task("s", "Sort them.", "b a", "a b", True),
        Task("r", "What is it?"),
        Task("3", "Say hi."),  # by its line
    ]
    assert seeds_of(tmp_path, {"instruction": "a", "instances": []}, {"instruction": "b", "instances": None})


@pytest.mark.parametrize("row", [{"instruction": " "}, {"instruction": 3}, {"input": "x"}, ["a"], 5])
def test_a_seed_without_an_instruction_is_named(tmp_path: Path, row: Any) -> None:
    with pytest.raises(ConfigError, match="the seed has no instruction") as error:
        seeds_of(tmp_path, {"instruction": "a"}, row)
    assert error.value.where.endswith("seeds.jsonl:2")


def test_files_of_seeds_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"seeds\.jsonl"):
        seeds_of(tmp_path, "{")
    for given in ({}, {"seeds": None}, {"seeds": ["a.jsonl"]}):
        with pytest.raises(ConfigError, match="'seeds' is missing"):
            read_seeds(given, tmp_path / "c.yaml")


def test_each_image_is_asked_about_once_and_every_licence_counts(tmp_path: Path) -> None:
    rows = [("a.png", "MIT"), ("b.png", "CC0-1.0"), ("a.png", "CC-BY-4.0")]
    records = [Record.triple("q", "a", images=[str(tmp_path / name)], licence=terms) for name, terms in rows]
    write_jsonl([*records, Record.triple("q", "a", licence="GPL-3.0-only")], tmp_path / "p.jsonl")
    images, licences = _pictures({"pictures": "p.jsonl"}, tmp_path / "c.yaml")
    assert [Path(str(image.source)).name for image in images] == ["a.png", "b.png"]
    assert licences == ["MIT", "CC0-1.0", "CC-BY-4.0"]  # not of a record without an image
    assert _pictures({}, tmp_path / "c.yaml") == ([], [])
    write_jsonl([Record.triple("q", "a")], tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="holds no image"):
        _pictures({"pictures": "p.jsonl"}, tmp_path / "c.yaml")


def test_a_plan_is_the_style_s_own_but_for_what_is_set() -> None:
    assert _plan({}, pictures=False) == InstructPlan(keywords=KEYWORDS)
    assert _plan({}, pictures=True).keywords == ()  # `image` is then what a question is made of
    alpaca = _plan({"style": "alpaca", "prompt": {"new": 5}, "target": 7, "requests": None}, pictures=False)
    assert (alpaca.human, alpaca.machine, alpaca.new, alpaca.target) == (3, 0, 5, 7)
    assert alpaca.requests == InstructPlan().requests
    filters = {"words": [2, 9], "rouge_l": 0.5, "keywords": ["x"], "needs_picture": False}
    found = _plan({"filters": filters}, pictures=True)
    assert (found.words, found.rouge_l, found.keywords, found.needs_picture) == ((2, 9), 0.5, ("x",), False)
    for words in ([4], 4, ["a", "b"], [1, 2, 3]):
        with pytest.raises(ConfigError, match=r"Write words: \[4, 150\]"):
            _plan({"filters": {"words": words}}, pictures=False)


@pytest.mark.parametrize(("style", "more"), [("steps", True), ("alpaca", False)])
def test_a_dry_run_asks_nobody_and_says_what_it_would_take(tmp_path: Path, style: str, more: bool) -> None:
    rows = [{"instruction": f"Name the {n} rivers of Europe", "instances": [{"output": "x"}]} for n in range(8)]
    seeds_of(tmp_path, *rows)
    teacher = {"open": "http://127.0.0.1:9/v1#m", "price": {"input": 1.0, "output": 2.0}}
    config = {
        "seeds": "seeds.jsonl",
        "licence": "MIT",
        "teacher": teacher,
        "style": style,
        "target": 100,
        "requests": 2,
    }
    (tmp_path / "c.yaml").write_text(dump_yaml(config | {"prompt": {"new": 5}}))
    said = good("build", "self-instruct", tmp_path / "c.yaml", "--out", tmp_path / "out", "--dry-run").stdout
    assert "2 requests" in said and "100 records take 10 rounds or more" in said
    assert ("takes 2 requests more" in said) == more and not (tmp_path / "out").exists()
    (tmp_path / "c.yaml").write_text(dump_yaml(config | {"filters": {"word": 3}}))
    done = mmit("build", "self-instruct", tmp_path / "c.yaml", "--out", tmp_path / "out", "--dry-run")
    assert_one_message(done, "filters", "unknown key 'word'", "did you mean 'words'")
