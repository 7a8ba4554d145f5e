"""mmit.eval.tasks: a YAML becomes questions, the same ones everywhere, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmit.configs import shipped
from mmit.errors import ConfigError, MmitError, RecordError
from mmit.eval.tasks import Item, Task, load_task, load_tasks, sample_items, task_items, training_items
from mmit.records import Image, Record, Text, Turn, write_jsonl


def turn(role: Any, *parts: str | Image) -> Turn:
    return Turn(role, tuple(part if isinstance(part, Image) else Text(part) for part in parts))


def make(folder: Path, yaml: str, *records: Record) -> Path:
    write_jsonl(records or [Record.triple("q?", "a", id="r")], folder / "data.jsonl")
    path = folder / "task.yaml"
    path.write_text("name: t\nrecords: data.jsonl\nmetric: exact\n" + yaml, encoding="utf-8")
    return path


def items_of(folder: Path, yaml: str, *records: Record) -> list[Item]:
    return task_items(load_task(make(folder, yaml, *records)))


def fails(path: Path | str, kind: type[MmitError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        task_items(load_task(path))
    return str(caught.value)


def test_every_question_is_asked_alone_with_the_pictures_shown_so_far(tmp_path: Path) -> None:
    first, second = Image(str(tmp_path / "1.png")), Image(str(tmp_path / "2.png"))
    record = Record(
        (
            turn("system", "be short"),
            turn("user", first, "colour?"),
            turn("assistant", "red"),
            turn("user", "shape?", second),
            turn("assistant", "circle"),
            turn("user", "more?"),
            turn("assistant", "no"),
        ),
        id="r",
        meta={"kind": ["c", "s", "y"], "set": "test"},
    )
    items = items_of(tmp_path, 'prompt: "Q: {question} A:"\ngroup_by: kind\n', record)
    assert [item.id for item in items] == ["r#1", "r#2", "r#3"]
    assert [item.reference for item in items] == ["red", "circle", "no"]
    assert [item.group for item in items] == ["c", "s", "y"]
    system = turn("system", "be short")
    assert items[0].prompt.turns == (system, turn("user", first, "Q: colour? A:"))
    assert items[1].prompt.turns == (system, turn("user", first, "Q: shape? A:", second))
    assert items[2].prompt.turns == (system, turn("user", first, second, "Q: more? A:"))
    for item in items:
        item.prompt.validate(for_training=False)
    assert {item.group for item in items_of(tmp_path, "group_by: set\n", record)} == {"test"}


def test_a_template_surrounds_all_text_of_a_turn(tmp_path: Path) -> None:
    image = Image(str(tmp_path / "1.png"))
    record = Record((turn("user", "left {x}", image, "right"), turn("assistant", "a")))
    (item,) = items_of(tmp_path, 'prompt: "<{question}>"\n', record)
    assert item.prompt.turns[0].parts == (Text("<left {x}"), image, Text("right>"))
    only = Record((turn("user", image), turn("assistant", "a")))
    assert items_of(tmp_path, "", only)[0].prompt.turns[0].parts == (image,)
    assert items_of(tmp_path, 'prompt: "{question}Describe."\n', only)[0].text == "Describe."


def test_references_from_meta_need_no_answer(tmp_path: Path) -> None:
    lone = Record((turn("user", "q?"),), meta={"gold": ["red", "crimson"]})
    assert items_of(tmp_path, "reference: gold\n", lone)[0].reference == ["red", "crimson"]
    several = Record((turn("user", "a?"), turn("assistant", "x"), turn("user", "b?")), meta={"gold": ["1", ["2", "3"]]})
    assert [i.reference for i in items_of(tmp_path, "reference: gold\n", several)] == ["1", ["2", "3"]]
    assert "the last question has no answer" in fails(make(tmp_path, "", lone), RecordError)
    wrong = Record(several.turns, meta={"gold": ["1"]})
    assert "2 questions" in fails(make(tmp_path, "reference: gold\n", wrong), RecordError)
    assert "did you mean 'gold'" in fails(make(tmp_path, "reference: golf\n", lone), RecordError)


def test_ids(tmp_path: Path) -> None:
    nameless = [Record.triple(f"q{i}?", "a") for i in range(3)]
    assert [item.id for item in items_of(tmp_path, "", *nameless)] == ["1", "2", "3"]
    twins = [Record.triple("q?", "a", id="same")] * 2
    assert "'same' is taken" in fails(make(tmp_path, "", *twins), RecordError)


def test_sampling_is_seeded_stable_and_in_data_order(tmp_path: Path) -> None:
    items = items_of(tmp_path, "", *[Record.triple(f"q{i}?", "a", id=str(i)) for i in range(20)])
    # Written down once: the sample must be the same on every machine and in every version.
    assert [item.id for item in sample_items(items, 5, 0)] == ["1", "8", "12", "13", "15"]
    assert sample_items(items, 5, 1) != sample_items(items, 5, 0)
    assert sample_items(items, None, 0) == sample_items(items, 99, 0) == items
    task = load_task(make(tmp_path, "sample: {n: 1, seed: 3}\n"))
    assert (task.sample and task.sample.n, task.seed) == (1, 3)
    with pytest.raises(ConfigError, match="0 questions"):
        sample_items(items, 0, 0)


def test_the_tasks_sample_yields_to_arguments(tmp_path: Path) -> None:
    records = [Record.triple(f"q{i}?", "a", id=str(i)) for i in range(20)]
    task = load_task(make(tmp_path, "sample: {n: 5, seed: 0}\n", *records))
    assert [item.id for item in task_items(task)] == ["1", "8", "12", "13", "15"]
    assert len(task_items(task, 7)) == 7
    assert task_items(task, 5, 1) == sample_items(task_items(task, 20), 5, 1)


def test_any_format_split_and_data_root(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, answer in (("train", "red"), ("test", "blue")):
        talk = [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": answer}]
        (data / f"{split}.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": talk}]))
    path = tmp_path / "t.yaml"
    lines = ["name: t", "metric: exact", 'records: "{split}.json"', "format: llava", "split: test"]
    path.write_text("\n".join([*lines, "train_split: train", 'image_root: "pictures/{split}"']))
    task = load_task(path, data_root=data)
    (item,), (learnt,) = task_items(task), training_items(task)
    assert item.prompt.images == (Image(str(data / "pictures" / "test" / "a.png")),)
    assert (item.reference, learnt.reference) == ("blue", "red")


def test_a_missing_file_tells_where_and_how_to_get_it(tmp_path: Path) -> None:
    path = make(tmp_path, "how_to_get: Ask the authors.\n")
    (tmp_path / "data.jsonl").unlink()
    message = fails(path)
    assert str(tmp_path / "data.jsonl") in message and "Ask the authors." in message
    assert "--data-root" in message


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("promt: x\n", "task.yaml:4: promt: unknown key (value x); did you mean 'prompt'?"),
        ("sample: {m: 3}\n", "sample.m: unknown key"),
        ("max_new_tokens: 0\n", "task.yaml:4: max_new_tokens: expected whole number > 0, got 0"),
        ("prompt: hello\n", "prompt: must contain {question} exactly once, got hello"),
        ("format: lava\n", "did you mean 'llava'?"),
        ("stop: [a, '']\n", "stop: holds an empty text"),
        ("train_split: train\n", "train_split:"),
        ("train_records: data.jsonl\n", "learned from the test itself"),
        ("split: test\n", "split: data.jsonl is one file; write {split} in its path"),
    ],
)
def test_wrong_keys_and_values(tmp_path: Path, yaml: str, said: str) -> None:
    assert said in fails(make(tmp_path, yaml))


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("name: a/b\nrecords: r.jsonl\nmetric: exact\n", "'a/b' cannot name a folder"),
        ("name: t\nrecords: r.jsonl\nmetric: exactt\n", "unknown metric 'exactt'; did you mean 'exact'?"),
        ("name: t\nrecords: package:easy_vqa\nmetric: exact\n", "did you mean 'package:easy-vqa'?"),
        ("name: t\nrecords: package:easy-vqa\nmetric: exact\n", "split: required"),
        ("name: t\nrecords: r.jsonl\nmetric: nlvr2:official\nanswers: [yes]\n", "no closed set"),
        ("name: t\nmetric: exact\n", "records: required"),
        ("- a\n", "expected a task"),
        ('{"name": "t"}\n{"name": "u"}\n', "A file of questions is named in such a YAML, by `records`"),
        ("name: t\nrecords: .\nmetric: exact\n", "this is a folder; name its files, for instance with /*.jsonl"),
    ],
)
def test_wrong_tasks(tmp_path: Path, yaml: str, said: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(yaml)
    assert said in fails(path)


def test_tasks_of_one_name_would_write_one_folder(tmp_path: Path) -> None:
    one, other = tmp_path / "task.yaml", tmp_path / "other.yaml"
    make(tmp_path, "")
    other.write_text(one.read_text() + "max_new_tokens: 3\n")
    assert [task.max_new_tokens for task in load_tasks([str(one)], where="--task")] == [32]
    with pytest.raises(ConfigError, match="--task: two tasks have one name, 't'"):
        load_tasks([str(one), str(other)], where="--task")


def test_names_and_paths() -> None:
    with pytest.raises(ConfigError, match="did you mean 'easy_vqa'"):
        load_task("easy_vka")
    with pytest.raises(ConfigError, match="cannot read the task"):
        load_task("no/such.yaml")


@pytest.mark.parametrize("path", shipped("eval").values(), ids=lambda path: path.stem)
def test_every_shipped_task_loads_by_its_name(path: Path) -> None:
    task = load_task(path.stem)
    assert isinstance(task, Task) and task.name == path.stem


def test_easy_vqa() -> None:
    pytest.importorskip("easy_vqa")
    task = load_task("easy_vqa")
    items = task_items(task)
    assert len(items) == 9673 and {item.group for item in items} == {"yes/no", "shape", "color"}
    assert {item.reference for item in items} == set(task.answers or ())
    assert len(training_items(task)) == 38575
    assert all(len(item.prompt.images) == 1 for item in items)
