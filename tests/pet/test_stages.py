"""The three stages on tiny models: what each writes, how it goes on, and what distillation with certain labels is."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mmit
from mmit.cli import app
from mmit.errors import ConfigError
from mmit.pet import distil, fit, label, patterns_of, read_rows
from mmit.pet.settings import Fitting, Generations, Labelling
from mmit.pet.stages import confident, scored, weighted_answers
from mmit.records import Record, read_jsonl, write_jsonl
from mmit.train.checkpoint import folders
from mmit.train.run import run
from tests.tiny_run import COLOURS, tiny_config

PATTERNS = {
    "task": "colour",
    "labels": ["red", "green", "blue", "black"],
    "patterns": [
        {"id": "what", "input": "{{ image }}What color is it?"},
        {"id": "a/b", "input": "{{ image }}It is"},
    ],
}
HOW = Fitting(repetitions=1, steps=1)


class World:
    """A start, four labelled pictures in a table, and a folder of eight without a label."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = tiny_config(folder, train={"steps": 1})
        assert run(config) == 0
        self.start = folder / "run"
        (folder / "unknown").mkdir()
        lines = ["image,colour"]
        for n, colour in enumerate([*COLOURS] * 3):
            path = folder / (f"few{n}.png" if n < 4 else f"unknown/{n:02}.png")
            PIL.Image.new("RGB", (20 + n, 24), COLOURS[colour]).save(path)
            if n < 4:
                lines.append(f"{path.name},{colour}")
        (folder / "few.csv").write_text("\n".join(lines) + "\n")
        self.patterns = patterns_of(PATTERNS)
        self.labelled = read_rows({"path": "few.csv"}, self.patterns, labelled=True, folder=str(folder))
        self.unlabelled = read_rows({"path": "unknown"}, self.patterns, labelled=False, folder=str(folder))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("pet"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = folders.newest(folder)
    assert newest is not None
    return {f"{path.name}.{k}": v for path in sorted(newest.rglob("*.safetensors")) for k, v in load_file(path).items()}


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_three_commands_make_a_labelled_set_and_a_tuned_model(world: World, tmp_path: Path) -> None:
    config = {
        "model": str(world.start),
        "patterns": PATTERNS,
        "labelled": {"path": "few.csv"},
        "unlabelled": {"path": "unknown"},
        "fit": {"repetitions": 1, "steps": 1},
        "distil": {"steps": 1},
    }
    (world.folder / "few.yaml").write_text(json.dumps(config))
    out = tmp_path / "task"
    for stage in ("fit", "label", "distil"):
        done = CliRunner().invoke(app, ["pet", stage, str(world.folder / "few.yaml"), "--out", str(out)])
        assert done.exit_code == 0, done.output
    assert "mmit chat" in done.output.replace("\n", " ")
    state = json.loads((out / "fit.json").read_text())
    assert list(state["models"]) == ["g0/1_what-0", "g0/2_a_b-0"] and state["before"].keys() == {"what", "a/b"}
    (file,) = (out / "labelled" / "records").iterdir()
    found = list(read_jsonl(file))
    assert len(found) == 8 and {Path(r.images[0].source).parent.name for r in found} == {"unknown"}
    for record in found:
        shares = record.meta["shares"]
        assert sum(shares) == pytest.approx(1) and record.turns[1].text == PATTERNS["labels"][int(np.argmax(shares))]
        assert record.meta["build"]["how"] == "pet" and record.meta["build"]["models"] == list(state["models"])
    for command in (["data", "check"], ["data", "stats"], ["data", "show", "--text"]):
        done = CliRunner().invoke(app, [*command, str(file)])
        assert done.exit_code == 0, done.output
    assert mmit.load(out / "student").chat(found[0].images[0], "What color is it?", max_new_tokens=1) is not None


def test_generations_train_on_what_others_are_sure_of_and_a_stopped_one_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"dir": tmp_path / "task", "unlabelled": world.unlabelled, "how": HOW}
    fit(world.start, world.patterns, world.labelled, generations=Generations(factor=2.0), **given)
    more = Generations(count=2, factor=2.0)
    models = fit(world.start, world.patterns, world.labelled, generations=more, **given)
    assert [(m.generation, m.rows > 4) for m in models] == [(0, False)] * 2 + [(1, True)] * 2
    new = list(read_jsonl(tmp_path / "task" / models[2].run / "data.jsonl"))
    assert [Path(r.images[0].source).parent.name for r in new[4:]] == ["unknown"] * (len(new) - 4)
    monkeypatch.setattr("mmit.pet.stages._trained", lambda *a, **k: pytest.fail("trained again"))
    assert fit(world.start, world.patterns, world.labelled, generations=more, **given) == models
    counts = label(tmp_path / "task", world.patterns, world.unlabelled, how=Labelling(weights="uniform"))
    assert counts.accepted == {"colour": 8}
    other = {**given, "how": replace(HOW, steps=2)}
    with pytest.raises(ConfigError, match="was begun with other settings of 'fit'"):
        fit(world.start, world.patterns, world.labelled, **other)


def test_other_rows_images_or_wordings_are_no_part_of_a_task_that_was_begun(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmit.pet.stages._trained", lambda *a, **k: None)
    asked: list[int] = []
    monkeypatch.setattr("mmit.pet.stages._loaded_scores", lambda m, p, rows, **k: asked.append(1) or np.eye(len(rows)))
    monkeypatch.setattr("mmit.pet.stages._before", lambda *a: {"what": 0.5, "a/b": 0.5})
    given: dict[str, Any] = {"dir": tmp_path / "task", "how": HOW}
    begun = fit(world.start, world.patterns, world.labelled, **given)
    (tmp_path / "moved").mkdir()
    for path in world.folder.glob("few*"):
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    again = lambda: read_rows({"path": "few.csv"}, world.patterns, labelled=True, folder=str(tmp_path / "moved"))  # noqa: E731
    assert fit(world.start, world.patterns, again(), **given) == begun  # the same rows in another place
    (tmp_path / "moved" / "few0.png").write_bytes((tmp_path / "moved" / "few1.png").read_bytes())
    turned = [replace(row, label="blue") for row in world.labelled]
    for rows in (again(), turned, world.labelled[:3]):
        with pytest.raises(ConfigError, match="was begun with other rows of 'labelled'"):
            fit(world.start, world.patterns, rows, **given)
    worded = json.loads(json.dumps(PATTERNS))
    worded["patterns"][0]["input"] = "{{ image }}Which color?"
    with pytest.raises(ConfigError, match="was begun with other wordings or answers of 'patterns'"):
        fit(world.start, patterns_of(worded), world.labelled, **given)
    with pytest.raises(ConfigError, match="models of pattern 'what' were fitted with another wording"):
        label(tmp_path / "task", patterns_of(worded), world.unlabelled)
    scored(tmp_path, begun[0], world.patterns, world.unlabelled)
    asked.clear()
    scored(tmp_path, begun[0], world.patterns, world.unlabelled)
    assert not asked
    scored(tmp_path, begun[0], world.patterns, [*world.unlabelled[1:], world.unlabelled[0]])
    assert asked


def test_distilling_certain_labels_is_plain_tuning_bit_for_bit(world: World, tmp_path: Path) -> None:
    """Over the vocabulary as `mmit.train` on the answers; over the labels as fitting to hard ones."""
    pattern = world.patterns.patterns[0]
    hard = [pattern.record(row.fields, row.label, id=row.where) for row in world.labelled]
    soft = []
    for record, row in zip(hard, world.labelled, strict=True):
        shares = [float(name == row.label) for name in world.patterns.labels]
        soft.append(replace(record, meta={**record.meta, "shares": shares}))
    for over, objective in (("vocabulary", {"kind": "sft"}), ("labels", {"kind": "choices", "lm": 0.0})):
        task = tmp_path / over
        (task / "labelled" / "records").mkdir(parents=True)
        write_jsonl(soft, task / "labelled" / "records" / "colour.jsonl")
        student = distil(world.start, task, how=replace(HOW, lm=0.0), over=over, temperature=1.0)
        settings = {f"train.objective.{key}": value for key, value in objective.items()}
        settings |= {"run.seed": 0, "data.split_turns": False}
        plain = mmit.train(world.start, hard, dir=tmp_path / f"{over}-plain", steps=1, settings=settings)
        assert same(student, plain.dir) and not same(student, world.start), over


def test_an_uncertain_answer_is_each_answer_with_its_share() -> None:
    record = Record.triple("q", "red", meta={"choices": ["red", "blue", "green"], "shares": [0.7, 0.3, 0.0]})
    found = [(r.turns[-1].text, r.weight, dict(r.meta)) for r in weighted_answers(replace(record, weight=2.0))]
    assert found == [("red", 1.4, {}), ("blue", 0.6, {})]


def test_rows_are_drawn_by_label_and_no_more_than_there_are() -> None:
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [1.0, 0.0]])
    found = confident(shares, ["a", "b"], {"a": 2, "b": 5}, draw=random.Random(0))
    assert sorted(found)[-1][1] in "ab" and [name for _, name in found] == ["a", "a", "b"] and (2, "b") in found
    counts = np.zeros(4)
    for seed in range(400):
        for row, _ in confident(shares, ["a", "b"], {"a": 1, "b": 0}, draw=random.Random(seed)):
            counts[row] += 1
    assert counts[2] == 0 and np.abs(counts / 400 - np.array([0.9, 0.6, 0, 1.0]) / 2.5).max() < 0.08


def test_stages_out_of_order_and_options_that_cannot_be_used(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model was fitted here"):
        label(tmp_path, world.patterns, world.unlabelled)
    with pytest.raises(ConfigError, match="there is no labelled set here"):
        distil(world.start, tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'vocabulary'"):
        distil(world.start, tmp_path, over="vocabulry")
    with pytest.raises(ConfigError, match="there are none"):
        fit(world.start, world.patterns, world.labelled, dir=tmp_path, how=HOW, generations=Generations(count=2))
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="holds no fit.json"):
        fit(world.start, world.patterns, world.labelled, dir=tmp_path, how=HOW)
