"""`mmit pet`: settings that cannot be used are told before a model is read; the stages themselves: tests/pet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.pet.settings import Fitting, Labelling
from mmit.yamlio import dump_yaml
from tests.cli.commands import assert_one_message, good, mmit

PATTERNS = {"task": "colour", "labels": ["red", "blue"], "patterns": [{"id": "a", "input": "{{ image }}What color?"}]}


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.csv").write_text("image,colour\na.png,red\n")
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return {"model": "nowhere", "patterns": PATTERNS, "labelled": {"path": "rows.csv"}}


def run(folder: Path, stage: str, settings: dict[str, Any], **_: Any) -> Any:
    (folder / "c.yaml").write_text(dump_yaml(settings))
    return mmit("pet", stage, folder / "c.yaml", "--out", folder / "out")


@pytest.mark.parametrize("stage", ["fit", "label", "distil"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": None}, "'model' is missing"),
        ({"model": {"name": "x"}}, "Name the folder of a run or of a checkpoint"),
        ({"patterns": []}, "'patterns' is missing"),
        ({"labelled": None}, "'labelled' is missing"),
        ({"labeled": {"path": "x"}}, "did you mean 'labelled'"),
        ({"fit": {"step": 1}}, "c.yaml: fit"),
        ({"label": {"weight": 1}}, "did you mean 'weights'"),
        ({"distil": {"repetitions": 1}}, "unknown key 'repetitions'"),
        ({"generations": {"number": 2}}, "c.yaml: generations"),
        ({"seed": "x"}, "Give a whole number"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, task: dict[str, Any], stage: str, change: Any, told: str) -> None:
    assert_one_message(run(tmp_path, stage, {k: v for k, v in (task | change).items() if v is not None}), told)
    assert not (tmp_path / "out").exists()


def test_patterns_may_lie_in_a_file_beside_the_config(tmp_path: Path, task: dict[str, Any]) -> None:
    (tmp_path / "patterns.yaml").write_text(dump_yaml(PATTERNS | {"labels": ["red"]}))
    done = run(tmp_path, "fit", task | {"patterns": "patterns.yaml"})
    assert_one_message(done, "patterns.yaml", "labels")
    assert_one_message(run(tmp_path, "label", task), "'unlabelled' is missing", "Write unlabelled: {path: ...}")


def test_what_a_stage_is_given_is_what_the_config_says(
    tmp_path: Path, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr("mmit.pet.fit", lambda *a, **k: given.append((a, k)) or ["model"])
    monkeypatch.setattr("mmit.pet.distil", lambda *a, **k: given.append((a, k)) or tmp_path / "student")
    settings = task | {"seed": 3, "fit": {"steps": 5}, "distil": {"steps": 7, "over": "vocabulary"}}
    settings["label"] = {"temperature": 4.0}
    (tmp_path / "c.yaml").write_text(dump_yaml(settings))
    said = good("pet", "fit", tmp_path / "c.yaml", "--out", tmp_path / "out").stdout
    assert "1 models of 1 patterns" in said and f"mmit pet label {tmp_path / 'c.yaml'} --out {tmp_path / 'out'}" in said
    (model, patterns, labelled), more = given.pop()
    assert model == "nowhere" and [p.id for p in patterns.patterns] == ["a"] and [e.label for e in labelled] == ["red"]
    assert more["how"] == Fitting(steps=5, seed=3) and more["unlabelled"] == []  # not read for one generation
    good("pet", "distil", tmp_path / "c.yaml", "--out", tmp_path / "out")
    _, more = given.pop()
    assert more["how"] == Fitting(steps=7, lm=0.0, seed=3) and more["over"] == "vocabulary"
    assert more["temperature"] == 4.0 != Labelling().temperature
    (tmp_path / "c.yaml").write_text(dump_yaml(settings | {"generations": {"count": 2}}))
    assert_one_message(mmit("pet", "fit", tmp_path / "c.yaml", "--out", tmp_path / "out"), "'unlabelled' is missing")
