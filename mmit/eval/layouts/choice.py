"""Loaders of multiple-choice questions about pictures: ScienceQA, MMBench, SEED-Bench, MMMU, MathVista, AI2D.

In: each benchmark's folder, laid out as its makers distribute it. Out: questions with their options, one a line;
references as the metrics of the same names take them.
"""

from __future__ import annotations

import ast
import re
from string import ascii_uppercase
from typing import Any

from mmit.errors import RecordError
from mmit.eval.layouts.common import (
    LETTER,
    SHORT,
    Columns,
    Folder,
    Layout,
    Lmms,
    LmmsTask,
    Questions,
    asked,
    by_letter,
    lettered,
    options_in,
    split_options,
)
from mmit.eval.questions import REFERENCE
from mmit.records import Image, Record, Text

_PLACE = re.compile(r"<image (\d+)>")
_ROTATION = 1_000_000


def _scienceqa(folder: Folder, split: str, only_images: bool = True) -> Questions:
    problems = folder.json("problems.json")
    for name in folder.json("pid_splits.json", needs=(split,))[split]:
        row = problems[name]
        if only_images and not row["image"]:
            continue
        images = []
        if row["image"]:
            root = folder.find(f"images/{split}", split)
            images = [folder.picture(f"{name}/{row['image']}", root=root)]
        hint = f"Context: {row['hint']}\n" if row["hint"] else ""
        text = f"{hint}{row['question']}\n{lettered(row['choices'])}"
        letter, subject = ascii_uppercase[row["answer"]], row.get("subject")
        yield folder.question(text, images, id=name, reference=letter, group=subject, choices=options(row["choices"]))


def options(texts: list[Any]) -> list[str]:
    """Return the letters of options, the answers to choose from."""
    return list(ascii_uppercase[: len(texts)])


def _mmbench(folder: Folder, split: str, rotate: bool = False) -> Questions:
    path = folder.find(f"{split}.tsv", f"mmbench_{split}*.tsv", f"MMBench_{split.upper()}.tsv")
    pictures: dict[str, str] = {}
    rows = []
    for _, row in folder.rows_of(path):
        pictures[row["index"]] = row["image"]
        rows.append((folder.at, row))
    for folder.at, row in rows:
        picture = row["image"]
        if len(picture) < 16:  # not a picture, but the index of the row that has it
            picture = pictures[picture]
        texts = options_in(row)
        turns = len(texts) if rotate else 1
        for turn in range(turns):
            turned = texts[turn:] + texts[:turn]
            answer = ascii_uppercase[(ascii_uppercase.index(row["answer"]) - turn) % len(texts)]
            index = int(row["index"]) + turn * _ROTATION
            reference = {"index": index, "answer": answer, "options": by_letter(turned)}
            category = row.get("category") or "all"
            reference["category"] = category
            hint = row.get("hint") or ""
            hint = "" if hint == "nan" else f"{hint} "
            text = f"{hint}{row['question']} There are several options:\n{lettered(turned)}"
            image = folder.picture({"bytes": _decoded(picture, folder.at), "path": None})
            yield folder.question(text, [image], id=index, reference=reference, group=category, choices=options(texts))


def _decoded(text: str, where: str) -> bytes:
    from mmit.data.formats.pictures import base64_image

    try:
        source = base64_image(text, "image").source
    except RecordError as error:
        raise RecordError(error.problem, where=where, remedy=error.remedy) from error
    assert isinstance(source, bytes)
    return source


def _seedbench(folder: Folder, split: str) -> Questions:
    data = folder.json("SEED-Bench.json", needs=("questions", "question_type"))
    names = {number: name for name, number in data["question_type"].items()}
    for row in data["questions"]:
        video = row["data_type"] == "video"
        if split != "all" and video != (split == "video"):
            continue
        if video:
            image = folder.picture(f"{row['question_id']}.png", root=folder.find("SEED-Bench-video-image"))
        else:
            image = folder.picture(row["data_id"], root=folder.find("SEED-Bench-image"))
        texts = [row[f"choice_{letter}"] for letter in "abcd"]
        group = names[row["question_type_id"]]
        yield folder.question(
            f"{row['question']}\n{lettered(texts)}",
            [image],
            id=row["question_id"],
            reference=row["answer"],
            group=group,
            choices=options(texts),
        )


def _mmmu(folder: Folder, split: str) -> Questions:
    stem = "dev" if split == "dev" else split
    for path in folder.find_all(f"*/{stem}-*.parquet", f"data/{stem}-*.parquet", f"{stem}.jsonl"):
        for _, row in folder.rows_of(path):
            choice = row["question_type"] == "multiple-choice"
            texts = _literal(row["options"], folder.at)
            body = f"{row['question']}\n{lettered(texts)}\n{LETTER}" if choice else f"{row['question']}\n{SHORT}"
            reference: dict[str, Any] = {"question_type": row["question_type"], "options": texts}
            reference["answer"] = row["answer"] if choice else _list_or_text(row["answer"], folder.at)
            subject = re.sub(r"^(dev|validation|test)_|_\d+$", "", row["id"])
            parts = _interleaved(folder, body, row)
            marks = options(texts) if choice else None
            yield folder.question("", id=row["id"], reference=reference, group=subject, choices=marks, parts=parts)


def _literal(value: Any, where: str) -> list[str]:
    """Read a list, written as Python writes it."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise RecordError("options are no list", where=where, remedy="Fetch the file again.") from error
    return [str(item) for item in value]


def _list_or_text(value: str, where: str) -> str | list[str]:
    return _literal(value, where) if value.startswith("[") else value


def _interleaved(folder: Folder, text: str, row: dict[str, Any]) -> list[Text | Image]:
    """Put pictures where the text says <image 1>; those that it does not name come first."""
    named = set(map(int, _PLACE.findall(text)))
    pictures = {n: row[f"image_{n}"] for n in range(1, 8) if row.get(f"image_{n}") is not None}
    parts: list[Text | Image] = [folder.picture(pictures[n]) for n in pictures if n not in named]
    for place, piece in enumerate(_PLACE.split(text)):
        if place % 2 == 0:
            parts += [Text(piece)] if piece else []
        elif int(piece) in pictures:
            parts.append(folder.picture(pictures[int(piece)]))
        else:
            problem = f"the text names picture {piece}, which the row does not have"
            raise RecordError(problem, where=folder.at, remedy="Fetch the file again.")
    return parts


_FORMS = {
    "integer": "Answer the question using a single integer number.",
    "list": "Answer the question using a Python list.",
    "text": SHORT.strip(),
}


def _mathvista(folder: Folder, split: str) -> Questions:
    for name, row in folder.json(f"{split}.json", f"data/{split}.json").items():
        choices, places = row["choices"], int(row["precision"] or 1)
        if row["question_type"] == "multi_choice":
            form = LETTER.strip()
        elif row["answer_type"] == "float":
            form = "Answer the question using a single floating-point number with "
            form += {1: "one decimal place.", 2: "two decimal places."}.get(places, f"{places} decimal places.")
        else:
            form = _FORMS[row["answer_type"]]
        unit = f" (Unit: {row['unit']})" if row["unit"] else ""
        body = f"{row['question']}{unit}\n" + (f"{lettered(choices)}\n" if choices else "") + form
        keys = ("question_type", "answer_type", "choices", "precision", "answer")
        reference = {key: row[key] for key in keys}
        group = (row.get("metadata") or {}).get("task")
        marks = options(choices) if choices else None
        image = folder.picture(row["image"])
        yield folder.question(body, [image], id=name, reference=reference, group=group, choices=marks)


def _ai2d(folder: Folder, split: str) -> Questions:
    tables = sorted(folder.path.glob(f"data/{split}-*.parquet"))
    if tables:
        number = 0
        for path in tables:
            for _, row in folder.rows_of(path):
                number += 1
                texts = list(row["options"])
                yield _ai2d_question(folder, row["question"], row["image"], number, texts, int(row["answer"]))
        return
    wanted = set()
    if split == "test":
        listed = folder.find("ai2d_test_ids.csv").read_text("utf-8-sig").split()
        wanted = {line.strip() for line in listed}
    pictures = folder.find("images")
    for path in sorted(folder.find("questions").glob("*.json")):
        data = folder.json(f"questions/{path.name}", needs=("questions", "imageName"))
        if wanted and path.name.split(".")[0] not in wanted:
            continue
        image = str(pictures / data["imageName"])
        for text, row in data["questions"].items():
            texts, name = row["answerTexts"], row["questionId"]
            yield _ai2d_question(folder, text, image, name, texts, row["correctAnswer"])


def _ai2d_question(folder: Folder, text: str, picture: Any, name: Any, *more: Any) -> Any:
    texts, correct = more
    body = f"{text}\n{lettered(texts)}"
    letter = ascii_uppercase[correct]
    return folder.question(body, [folder.picture(picture)], id=name, reference=letter, choices=options(texts))


def _scienceqa_columns(record: Record) -> Columns:
    # A hint stays in the question, where the prompt has it anyway.
    question, choices = split_options(record)
    answer = ascii_uppercase.index(record.meta[REFERENCE])
    return asked(record) | {"question": question, "choices": choices, "hint": "", "answer": answer}


def _ai2d_columns(record: Record) -> Columns:
    question, choices = split_options(record)
    answer = str(ascii_uppercase.index(record.meta[REFERENCE]))
    return asked(record) | {"question": question, "options": choices, "answer": answer}


def _seedbench_columns(record: Record) -> Columns:
    # Its pictures come in a list.
    question, choices = split_options(record)
    named = {f"choice_{letter}": text for letter, text in zip("abcd", choices, strict=True)}
    more = {"question": question, "answer": record.meta[REFERENCE], "data_type": "image"}
    return asked(record) | {"image": list(record.images)} | named | more


def _mmbench_columns(record: Record) -> Columns:
    # A hint stays in the question, where the prompt has it anyway.
    reference = record.meta[REFERENCE]
    question = record.turns[-1].text.split(" There are several options:\n")[0]
    options = {letter: reference["options"].get(letter, "nan") for letter in "ABCDE"}
    named = {"index": reference["index"], "answer": reference["answer"], "category": reference["category"]}
    unused = {"hint": "nan", "source": "", "split": "dev", "L2-category": reference["category"]}
    return asked(record) | options | named | unused | {"question": question}


LAYOUTS: dict[str, Layout] = {
    "scienceqa": Layout(
        _scienceqa,
        {
            "problems.json": "questions of all splits",
            "pid_splits.json": "which question is in which split",
            "images/{split}/": "pictures <pid>/image.png",
        },
        "https://github.com/lupantech/ScienceQA (tools/download.sh)",
        ("test", "val", "train", "minitest", "minival"),
        {"only_images": "false asks the questions without a picture too"},
        lmms=Lmms(_scienceqa_columns, {"scienceqa_img": LmmsTask("scienceqa/scienceqa_img.yaml", "test")}),
    ),
    "mmbench": Layout(
        _mmbench,
        {"mmbench_{split}*.tsv": "rows with index, question, hint, A to D, answer, image in base64; {split}.tsv too"},
        "https://github.com/open-compass/MMBench (mmbench_dev_20230712.tsv holds the rotated rows too)",
        ("dev", "dev_en", "dev_cn", "test"),
        {"rotate": "true makes the rotations of every question, for files that lack them"},
        lmms=Lmms(_mmbench_columns, {"mmbench_en_dev_static": LmmsTask("mmbench/mmbench_en_dev_static.yaml", "dev")}),
    ),
    "seedbench": Layout(
        _seedbench,
        {
            "SEED-Bench.json": "questions",
            "SEED-Bench-image/": "pictures",
            "SEED-Bench-video-image/": "one frame <question_id>.png per video, for the splits video and all",
        },
        "https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
        ("image", "video", "all"),
        lmms=Lmms(
            _seedbench_columns,
            {
                "seedbench": LmmsTask("seedbench/seedbench.yaml", "image"),
                "seedbench_ppl": LmmsTask("seedbench/seedbench_ppl.yaml", "image"),
            },
        ),
    ),
    "mmmu": Layout(
        _mmmu,
        {"<subject>/{split}-*.parquet": "questions with their pictures; {split}.jsonl of the same columns too"},
        "https://huggingface.co/datasets/MMMU/MMMU "
        "(hf download --repo-type dataset MMMU/MMMU --local-dir <data-root>/mmmu)",
        ("validation", "dev", "test"),
    ),
    "mathvista": Layout(
        _mathvista,
        {"{split}.json": "questions, also found in data/", "images/": "pictures"},
        "https://github.com/lupantech/MathVista (data/) and https://huggingface.co/datasets/AI4Math/MathVista (images)",
        ("testmini", "test"),
    ),
    "ai2d": Layout(
        _ai2d,
        {
            "data/{split}-*.parquet": "the Hugging Face data set lmms-lab/ai2d; or instead of it:",
            "questions/": "one <picture>.json per picture",
            "images/": "pictures",
            "ai2d_test_ids.csv": "which pictures are the test's",
        },
        "https://prior.allenai.org/projects/diagram-understanding or https://huggingface.co/datasets/lmms-lab/ai2d",
        ("test", "all"),
        lmms=Lmms(_ai2d_columns, {"ai2d": LmmsTask("ai2d/ai2d.yaml", "test")}),
    ),
}
