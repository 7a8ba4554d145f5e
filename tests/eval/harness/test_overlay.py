"""Overlays: the columns are what lmms-eval's prompts are made of, the YAMLs point at local files, mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmit.cli import main
from mmit.errors import ConfigError, RecordError
from mmit.eval import layouts
from mmit.eval.harness.overlay import LMMS, write_overlay
from mmit.eval.layouts.common import split_options
from mmit.eval.questions import CHOICES, REFERENCE
from mmit.records import Record, Text, Turn
from tests.eval.benchmarks import CASES


def first(layout: str, task: str, folder: Path) -> tuple[Record, dict[str, Any]]:
    CASES[task][0](folder)
    record = next(iter(layouts.read(layout, folder, task=task)))
    lmms = layouts.LAYOUTS[layout].lmms
    assert lmms is not None
    return record, lmms.columns(record)


@pytest.mark.parametrize(
    ("layout", "task", "expected"),
    [
        ("pope", "pope", {"question": "Is there a snowboard in the image?", "answer": "yes", "category": "random"}),
        ("mme", "mme", {"question": "Is there a dog?", "category": "existence", "answer": "Yes"}),
        ("textvqa", "textvqa", {"question": "What brand is it?", "answers": ["nokia"] * 10, "question_id": "34602"}),
        ("gqa", "gqa", {"question": "Is it red?", "answer": "yes"}),
        ("scienceqa", "scienceqa_img", {"question": "Context: Look.\nWhich?", "choices": ["dog", "cat"], "answer": 1}),
        ("seedbench", "seedbench_img", {"question": "Which?", "choice_a": "option a", "choice_d": "option d"}),
        ("mmbench", "mmbench_dev", {"question": "Look. Which?", "A": "dog", "C": "nan", "index": 1, "answer": "A"}),
    ],
)
def test_columns(layout: str, task: str, expected: dict[str, Any], tmp_path: Path) -> None:
    _, columns = first(layout, task, tmp_path)
    assert {key: columns[key] for key in expected} == expected


def test_vqav2_answers_are_ten_objects_that_differ(tmp_path: Path) -> None:
    _, columns = first("vqav2", "vqav2", tmp_path)
    assert len({json.dumps(answer) for answer in columns["answers"]}) == 10  # lmms-eval leaves out by equality


def test_options_come_off_the_question_as_they_went_on() -> None:
    text = "A. is it\nB. or not?\nA. red\nB. \nC. A. green"
    record = Record((Turn("user", (Text(text),)),), meta={CHOICES: list("ABC"), REFERENCE: "A"})
    assert split_options(record) == ("A. is it\nB. or not?", ["red", "", "A. green"])


def shipped(folder: Path) -> Path:
    """A harness's tasks as far as an overlay reads them: the files are there."""
    names = [task.yaml for _, task in LMMS.values()]
    names += ["hellaswag/hellaswag.yaml", "gsm8k/gsm8k.yaml", "mmlu/default/mmlu_anatomy.yaml"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_text_tasks_read_the_downloaded_files(tmp_path: Path) -> None:
    for task in ("hellaswag", "gsm8k", "mmlu"):
        CASES[task][0](tmp_path / "data" / task)
    root = tmp_path / "data" / "mmlu"
    for table in list(root.rglob("*.csv")):
        table.rename(table.with_name(f"anatomy_{table.parent.name}.csv"))
    names = ["hellaswag", "gsm8k", "mmlu"]
    options: dict[str, Any] = {"harness": "lm-eval", "data_root": tmp_path / "data", "out": tmp_path / "out"}
    assert write_overlay(names, tasks_root=shipped(tmp_path / "own"), **options) == [f"{name}_local" for name in names]
    task = yaml.safe_load((tmp_path / "out" / "hellaswag_local.yaml").read_text())
    assert task["include"] == str(tmp_path / "own" / "hellaswag" / "hellaswag.yaml") and task["dataset_path"] == "json"
    assert Path(task["dataset_kwargs"]["data_files"]["validation"]).is_file()
    group = yaml.safe_load((tmp_path / "out" / "mmlu_local.yaml").read_text())
    assert group["task"] == ["mmlu_anatomy_local"]
    row = json.loads((tmp_path / "out" / "data" / "mmlu" / "anatomy_test.jsonl").read_text().splitlines()[0])
    assert row.keys() == {"question", "choices", "answer"} and len(row["choices"]) == 4
    (root / "test" / "anatomy_test.csv").write_text("q,a,b,c,d,E\n")
    with pytest.raises(RecordError, match=r"anatomy_test\.csv:1"):
        write_overlay(["mmlu"], tasks_root=tmp_path / "own", **options)


@pytest.mark.parametrize("name", ["seedbench", "mmbench_en_dev_static"])
def test_pictures_are_named_or_kept(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    layout, task = LMMS[name]
    CASES[{"seedbench": "seedbench_img"}.get(name, "mmbench_dev")][0](tmp_path / "data" / (task.data or layout))
    options: dict[str, Any] = {"harness": "lmms-eval", "data_root": tmp_path / "data", "out": tmp_path / "out"}
    assert write_overlay([name], tasks_root=shipped(tmp_path / "own"), **options) == [f"{name}_local"]
    files = yaml.safe_load((tmp_path / "out" / f"{name}_local.yaml").read_text())["dataset_kwargs"]["data_files"]
    rows = datasets.load_dataset("parquet", data_files=files, split="test", cache_dir=str(tmp_path / "cache"))
    image = rows[0]["image"]
    assert (image[0] if isinstance(image, list) else image).size == (8, 6)


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"data_root": tmp_path, "out": tmp_path / "out", "tasks_root": tmp_path}
    with pytest.raises(ConfigError, match="did you mean 'lmms-eval'"):
        write_overlay(["pope"], harness="lmms_eval", **options)
    with pytest.raises(ConfigError, match="did you mean 'textvqa_val'"):
        write_overlay(["textvqa"], harness="lmms-eval", **options)
    with pytest.raises(ConfigError, match=r"coco_pope_random\.json"):
        write_overlay(["pope"], harness="lmms-eval", **options)
    with pytest.raises(ConfigError, match=r"hellaswag_val\.jsonl"):
        write_overlay(["hellaswag"], harness="lm-eval", **options)
    with pytest.raises(SystemExit) as stopped:
        main(["harness", "overlay", "--tasks", "popo", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "did you mean 'pope'" in capsys.readouterr().err
