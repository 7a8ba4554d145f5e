"""scripts/eval: answers in the forms that official scorers and LLaVA's pipelines take."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmit.eval.tasks import load_task
from mmit.records import Record
from tests.eval.benchmarks import CASES
from tests.eval.loose import answered

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "eval"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"eval_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Says:
    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        return ["The Dog.\tYes"] * len(records)


def converted(name: str, task_name: str, folder: Path) -> Path:
    task = load_task(task_name, data_root=folder)
    CASES[task_name][0](Path(task.folder or ""))
    metric = None
    if task_name == "mmvet":
        from mmit.eval.metrics import METRICS

        def metric(answers: Any, references: Any, **options: Any) -> Any:
            return METRICS["exact"](answers, ["x"] * len(answers))

    answers = answered(Says(), task, out_dir=folder / "out", metric=metric).path
    assert script("convert").main([name, str(answers), str(folder / "made")]) == 0
    return folder / "made"


@pytest.mark.parametrize(
    ("name", "task", "first"),
    [
        ("vqav2", "vqav2", {"question_id": 42000, "answer": "dog yes"}),
        ("vizwiz", "vizwiz", {"image": "VizWiz_val_00000000.jpg", "answer": "dog yes"}),
        ("gqa", "gqa", {"questionId": "201", "prediction": "the dog.\tyes"}),
        ("seedbench", "seedbench_img", {"question_id": "101", "prediction": "The Dog.\tYes"}),
    ],
)
def test_lists_of_answers(name: str, task: str, first: dict[str, Any], tmp_path: Path) -> None:
    text = converted(name, task, tmp_path).read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    assert rows[0] == first


def test_mmvet_mme_and_llava(tmp_path: Path) -> None:
    assert json.loads(converted("mmvet", "mmvet", tmp_path / "a").read_text()).keys() == {"v1_0", "v1_1"}
    folder = converted("mme", "mme", tmp_path / "b")
    assert {path.name for path in folder.iterdir()} == {"existence.txt", "landmark.txt", "code_reasoning.txt"}
    line = (folder / "existence.txt").read_text().splitlines()[0]
    assert line == "000000006040.jpg\tIs there a dog? Please answer yes or no.\tYes\tThe Dog. Yes"
    row = json.loads(converted("llava", "pope", tmp_path / "c").read_text().splitlines()[0])
    assert row.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


def test_mmbench_is_a_sheet(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    with open(converted("mmbench", "mmbench_dev", tmp_path), "rb") as file:  # by its name alone it is no sheet
        sheet = openpyxl.load_workbook(file).active
    assert [cell.value for cell in sheet[2]][:4] == [1, "Look. Which?", "dog", "cat"]


def test_mistakes_end_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("convert").main(["vqa", "a.jsonl", "b"]) == 2
    assert "did you mean 'vqav2'" in capsys.readouterr().err
    assert script("convert").main(["gqa", str(tmp_path / "no.jsonl"), "b"]) == 2
    (tmp_path / "q.jsonl").write_text('{"text": "q"}\n')
    options = ["--model-path", "x", "--question-file", str(tmp_path / "q.jsonl"), "--answers-file", "a"]
    assert script("answer").main(options) == 2
    assert "no question_id" in capsys.readouterr().err


def test_question_files_and_chunks(tmp_path: Path) -> None:
    module = script("answer")
    rows = [{"question_id": n, "image": "a.png", "text": f"<image>\nq{n}?", "category": "c"} for n in range(5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = module.questions(str(tmp_path / "q.jsonl"), str(tmp_path))
    assert found[0][1].turns[0].text == "q0?" and found[0][1].images[0].source == str(tmp_path / "a.png")
    # LLaVA's own chunks may be fewer than asked for; these are never.
    parts = [module.chunk(found, 4, index) for index in range(4)]
    assert [len(part) for part in parts] == [1, 1, 1, 2] and sum(map(list, parts), []) == found
    assert [len(module.chunk(found, 9, index)) for index in range(9)].count(0) == 4
    module.write_answers(tmp_path / "a.jsonl", found, list("abcde"), "m")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == list("abcde") and lines[0]["question_id"] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vqav2", [{"question_id": 7, "answer": "dog"}]),
        ("vizwiz", [{"image": "a.png", "answer": "dog"}]),
        ("gqa", [{"questionId": 7, "prediction": "a dog"}]),
        ("mmvet", {"v1_7": "A dog."}),
        ("seedbench", {"question_id": 7, "prediction": "A dog."}),
    ],
)
def test_from_question_file_over_answer_file_to_submission(name: str, expected: Any, tmp_path: Path) -> None:
    answer = script("answer")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 7, "image": "a.png", "text": "What?"}) + "\n")
    answer.write_answers(tmp_path / "a.jsonl", answer.questions(str(tmp_path / "q.jsonl"), ""), ["A dog."], "m")
    assert script("convert").main([name, str(tmp_path / "a.jsonl"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out").read_text()) == expected


@pytest.mark.parametrize(
    ("name", "lines", "told"),
    [
        ("vqav2", [{"question_id": 1, "text": "a"}, {"question_id": "x-1", "text": "a"}], "a.jsonl:2"),
        ("mme", [{"question_id": 1, "text": "yes"}], "a.jsonl:1"),
        ("vizwiz", [{"question_id": 1, "text": "yes"}], "no picture's name"),
        ("gqa", [{"question_id": 1, "text": "yes"}, {"question_id": 1}], "a.jsonl:2"),
        ("gqa", ["{"], "a.jsonl:1"),
        ("gqa", [{"format": 1, "task": "gqa"}], "no answers"),
    ],
)
def test_bad_answers_name_file_and_line(
    name: str, lines: list[Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "a.jsonl").write_text(text + "\n")
    assert script("convert").main([name, str(tmp_path / "a.jsonl"), str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
