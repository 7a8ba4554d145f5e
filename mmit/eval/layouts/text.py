"""Loaders of benchmarks in words, or with a table: MMLU, HellaSwag, GSM8K, IFEval, TabMWP.

In: each benchmark's folder, laid out as its makers distribute it. Out: questions, solved examples before them
where the benchmark is defined so; `choices` are the answers whose likelihood is compared.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from mmit.errors import RecordError
from mmit.eval.layouts.common import Folder, Layout, Questions, lettered

_LETTERS = ["A", "B", "C", "D"]
_BRACKETED = re.compile(r"\[.*?\]")


def _mmlu(folder: Folder, split: str, shots: int = 5) -> Questions:
    for path in folder.find_all(f"{split}/*_{split}.csv", f"data/{split}/*_{split}.csv"):
        subject = path.name.removesuffix(f"_{split}.csv")
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        if shots:
            solved = path.parents[1] / "dev" / f"{subject}_dev.csv"
            if not solved.is_file():
                raise folder.lacks(f"the solved examples {solved.relative_to(folder.path)}")
            head += "".join(f"{_mmlu_text(row)} {row[5]}\n\n" for row in _cells(folder, solved)[:shots])
        for number, row in enumerate(_cells(folder, path), 1):
            name = f"{subject}-{number}"
            text = head + _mmlu_text(row)
            yield folder.question(text, id=name, reference=row[5], group=subject, choices=_LETTERS)


def _cells(folder: Folder, path: Path) -> list[list[str]]:
    """Read MMLU's tables, which have no header: question, four options, letter."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in _LETTERS:
            where = f"{path}:{number}"
            raise RecordError("not a question, four options and a letter", where=where, remedy="Fetch the file again.")
    folder.at = str(path)
    return rows


def _mmlu_text(row: list[str]) -> str:
    return f"{row[0].strip()}\n{lettered(row[1:5])}\nAnswer:"


def _hellaswag(folder: Folder, split: str) -> Questions:
    for number, row in folder.rows(f"hellaswag_{split}.jsonl", f"data/hellaswag_{split}.jsonl"):
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        text = _hellaswag_clean(f"{row['activity_label']}: {context}")
        endings = [_hellaswag_clean(ending) for ending in row["endings"]]
        right, kind = endings[int(row["label"])], row.get("split_type")
        yield folder.question(text, id=row.get("ind", number), reference=right, group=kind, choices=endings)


def _hellaswag_clean(text: str) -> str:
    """Remove the marks that wikiHow texts hold, as the harnesses do."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETED.sub("", text).replace("  ", " ")


def _gsm8k(folder: Folder, split: str, shots: int = 5) -> Questions:
    head = ""
    if shots:
        for number, row in folder.rows("train.jsonl", "grade_school_math/data/train.jsonl"):
            head += f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
            if number == shots:
                break
    for number, row in folder.rows(f"{split}.jsonl", f"grade_school_math/data/{split}.jsonl"):
        text = f"{head}Question: {row['question']}\nAnswer:"
        yield folder.question(text, id=number, reference=row["answer"])


def _ifeval(folder: Folder, split: str) -> Questions:
    for _, row in folder.rows("input_data.jsonl", "ifeval_input_data.jsonl", "data/input_data.jsonl"):
        kwargs = [{key: value for key, value in given.items() if value is not None} for given in row["kwargs"]]
        reference = {"prompt": row["prompt"], "instruction_id_list": row["instruction_id_list"], "kwargs": kwargs}
        yield folder.question(row["prompt"], id=row["key"], reference=reference)


def _tabmwp(folder: Folder, split: str, table: str = "image") -> Questions:
    if table not in ("image", "text"):
        raise RecordError(f"table is '{table}'", where="options.table", remedy="valid: image, text")
    for name, row in folder.json(f"problems_{split}.json", f"data/tabmwp/problems_{split}.json").items():
        text = row["question"] + (f" (Unit: {row['unit']})" if row["unit"] else "")
        if row["choices"]:
            text += "\nOptions: " + ", ".join(row["choices"])
        images = []
        if table == "image":
            images = [folder.picture(f"{name}.png", root=folder.find("tables", "data/tabmwp/tables"))]
        else:
            title = f"[TITLE]: {row['table_title']}\n" if row["table_title"] else ""
            text = f"{title}{row['table']}\n\n{text}"
        answer = row["answer"]
        # 1,234 and $1,234 are the same number; the data writes some answers with and some without.
        reference: Any = list(
            dict.fromkeys((answer, answer.replace(",", ""), f"${answer}", f"{answer}{row['unit'] or ''}"))
        )
        yield folder.question(text, images, id=name, reference=reference, group=row["ques_type"])


LAYOUTS: dict[str, Layout] = {
    "mmlu": Layout(
        _mmlu,
        {"{split}/<subject>_{split}.csv": "questions", "dev/<subject>_dev.csv": "solved examples"},
        "https://github.com/hendrycks/test (data.tar)",
        ("test", "val"),
        {"shots": "solved examples of the subject before each question"},
    ),
    "hellaswag": Layout(
        _hellaswag,
        {"hellaswag_{split}.jsonl": "contexts and endings"},
        "https://github.com/rowanz/hellaswag (data/)",
        ("val", "train"),
    ),
    "gsm8k": Layout(
        _gsm8k,
        {"{split}.jsonl": "questions", "train.jsonl": "solved examples"},
        "https://github.com/openai/grade-school-math (grade_school_math/data)",
        ("test",),
        {"shots": "solved examples from train.jsonl before each question"},
    ),
    "ifeval": Layout(
        _ifeval,
        {"input_data.jsonl": "prompts and their instructions"},
        "https://github.com/google-research/google-research/tree/master/instruction_following_eval (data/)",
        ("test",),
    ),
    "tabmwp": Layout(
        _tabmwp,
        {"problems_{split}.json": "questions", "tables/": "pictures <pid>.png, for table image"},
        "https://github.com/lupantech/PromptPG (data/tabmwp)",
        ("test1k", "test", "dev", "dev1k", "train"),
        {"table": "image shows the table as a picture, text as text"},
    ),
}
