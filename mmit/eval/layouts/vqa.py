"""Loaders of open questions about a picture: VQAv2, GQA, VizWiz, TextVQA, DocVQA, ChartQA, OCRBench, RealWorldQA.

In: each benchmark's folder, laid out as its makers distribute it. Out: questions without the words around them,
which are the task's prompt; references as the metrics take them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmit.eval.layouts.common import (
    Columns,
    Folder,
    Layout,
    Lmms,
    LmmsTask,
    Questions,
    asked,
    with_answer,
    with_answers,
)
from mmit.eval.questions import GROUP, REFERENCE

if TYPE_CHECKING:
    from mmit.records import Record


def _vqav2(folder: Folder, split: str) -> Questions:
    marks = folder.json(f"v2_mscoco_{split}_annotations.json", needs=("annotations",))["annotations"]
    notes = {note["question_id"]: note for note in marks}
    pictures = folder.find(split)
    asked = folder.json(f"v2_OpenEnded_mscoco_{split}_questions.json", needs=("questions",))["questions"]
    for row in asked:
        note = notes[row["question_id"]]
        image = folder.picture(f"COCO_{split}_{row['image_id']:012}.jpg", root=pictures)
        answers = [answer["answer"] for answer in note["answers"]]
        yield folder.question(
            row["question"], [image], id=row["question_id"], reference=answers, group=note["answer_type"]
        )


def _gqa(folder: Folder, split: str) -> Questions:
    pictures = folder.find("images")
    for name, row in folder.json(f"{split}_questions.json").items():
        image = folder.picture(f"{row['imageId']}.jpg", root=pictures)
        group = (row.get("types") or {}).get("structural")
        yield folder.question(row["question"], [image], id=name, reference=row["answer"], group=group)


def _vizwiz(folder: Folder, split: str) -> Questions:
    pictures = folder.find(split)
    for _, row in folder.rows(f"{split}.json", f"Annotations/{split}.json", f"annotations/{split}.json"):
        image = folder.picture(row["image"], root=pictures)
        answers = [answer["answer"] for answer in row["answers"]]
        text = row["question"].capitalize()
        yield folder.question(text, [image], id=row["image"], reference=answers, group=row.get("answer_type"))


def _textvqa(folder: Folder, split: str, ocr: bool = False) -> Questions:
    tokens: dict[str, list[str]] = {}
    if ocr:
        read = folder.json(f"TextVQA_Rosetta_OCR_v0.2_{split}.json", needs=("data",))["data"]
        tokens = {row["image_id"]: row["ocr_tokens"] for row in read}
    pictures = folder.find("train_images" if split in ("train", "val") else f"{split}_images", "train_val_images")
    for row in folder.json(f"TextVQA_0.5.1_{split}.json", needs=("data",))["data"]:
        text = row["question"].capitalize()
        if ocr:
            text += f"\nReference OCR token: {', '.join(tokens[row['image_id']])}"
        image = folder.picture(f"{row['image_id']}.jpg", root=pictures)
        yield folder.question(text, [image], id=row["question_id"], reference=row["answers"])


def _docvqa(folder: Folder, split: str) -> Questions:
    names = [f"{split}_v1.0.json", f"{split}_v1.0_withQT.json"]
    path = folder.find(*names, *(f"{split}/{name}" for name in names))
    for row in folder.json(path.relative_to(folder.path).as_posix(), needs=("data",))["data"]:
        image = folder.picture(row["image"], root=path.parent)
        group = ", ".join(row["question_types"]) if row.get("question_types") else None
        yield folder.question(row["question"], [image], id=row["questionId"], reference=row["answers"], group=group)


def _chartqa(folder: Folder, split: str) -> Questions:
    pictures = folder.find(f"{split}/png")
    for kind in ("human", "augmented"):
        for number, row in folder.rows(f"{split}/{split}_{kind}.json"):
            image = folder.picture(row["imgname"], root=pictures)
            name = f"{kind}-{number}"
            yield folder.question(row["query"], [image], id=name, reference=row["label"], group=kind)


def _ocrbench(folder: Folder, split: str) -> Questions:
    path = folder.find("OCRBench.json", "OCRBench/OCRBench.json", "data/test-*.parquet")
    if path.suffix == ".json":
        pictures = folder.find("OCRBench_Images", "OCRBench")
    for number, row in folder.rows_of(path):
        parquet = path.suffix == ".parquet"
        name = row["dataset" if parquet else "dataset_name"]
        answers: Any = row["answer" if parquet else "answers"]
        answers = [answers] if isinstance(answers, (str, int, float)) else answers
        image = folder.picture(row["image"]) if parquet else folder.picture(row["image_path"], root=pictures)
        reference = {"answers": [str(answer) for answer in answers], "dataset": name}
        group = row["question_type" if parquet else "type"]
        yield folder.question(row["question"], [image], id=number, reference=reference, group=group)


def _realworldqa(folder: Folder, split: str) -> Questions:
    number = 0
    for path in folder.find_all(f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.jsonl"):
        for _, row in folder.rows_of(path):
            number += 1
            image = folder.picture(row["image"])
            yield folder.question(row["question"], [image], id=number, reference=row["answer"])


def _vqav2_columns(record: Record) -> Columns:
    # Human answers as numbered objects.
    answers = [{"answer": text, "answer_id": number} for number, text in enumerate(record.meta[REFERENCE], 1)]
    return asked(record) | {"answers": answers}


def _chartqa_columns(record: Record) -> Columns:
    return asked(record) | {"answer": str(record.meta[REFERENCE]), "type": f"{record.meta[GROUP]}_test"}


def _ocrbench_columns(record: Record) -> Columns:
    reference = record.meta[REFERENCE]
    answers = reference["answers"]
    kinds = {"dataset": reference["dataset"], "question_type": record.meta[GROUP]}
    return asked(record) | kinds | {"answer": [answers] if isinstance(answers, str) else list(answers)}


LAYOUTS: dict[str, Layout] = {
    "vqav2": Layout(
        _vqav2,
        {
            "v2_OpenEnded_mscoco_{split}_questions.json": "questions",
            "v2_mscoco_{split}_annotations.json": "ten answers each",
            "{split}/": "pictures COCO_{split}_000000000042.jpg",
        },
        "https://visualqa.org/download.html (balanced real images: questions, annotations, images)",
        ("val2014", "train2014"),
        lmms=Lmms(_vqav2_columns, {"vqav2_val": LmmsTask("vqav2/vqav2_val.yaml", "val2014")}),
    ),
    "gqa": Layout(
        _gqa,
        {"{split}_questions.json": "questions and answers", "images/": "pictures <imageId>.jpg"},
        "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions 1.2 and images)",
        ("testdev_balanced", "val_balanced", "train_balanced"),
        lmms=Lmms(with_answer, {"gqa": LmmsTask("gqa/gqa.yaml", "testdev_balanced", more={"process_docs": None})}),
    ),
    "vizwiz": Layout(
        _vizwiz,
        {"{split}.json": "questions and answers, also found in Annotations/", "{split}/": "pictures"},
        "https://vizwiz.org/tasks-and-datasets/vqa/",
        ("val", "train"),
        lmms=Lmms(with_answers, {"vizwiz_vqa_val": LmmsTask("vizwiz_vqa/vizwiz_vqa_val.yaml", "val")}),
    ),
    "textvqa": Layout(
        _textvqa,
        {
            "TextVQA_0.5.1_{split}.json": "questions and ten answers each",
            "train_images/": "pictures <image_id>.jpg, of train and val",
            "TextVQA_Rosetta_OCR_v0.2_{split}.json": "OCR tokens, for the option ocr only",
        },
        "https://textvqa.org/dataset/",
        ("val", "train"),
        {"ocr": "true shows the OCR tokens that come with the data set after the question"},
        lmms=Lmms(with_answers, {"textvqa_val": LmmsTask("textvqa/textvqa_val.yaml", "val")}),
    ),
    "docvqa": Layout(
        _docvqa,
        {"{split}_v1.0.json": "questions, also found as {split}_v1.0_withQT.json", "documents/": "pages"},
        "https://rrc.cvc.uab.es/?ch=17 (registration; task 1, single page)",
        ("val", "train"),
        lmms=Lmms(with_answers, {"docvqa_val": LmmsTask("docvqa/docvqa_val.yaml", "val")}),
    ),
    "chartqa": Layout(
        _chartqa,
        {
            "{split}/{split}_human.json": "questions by people",
            "{split}/{split}_augmented.json": "generated questions",
            "{split}/png/": "charts",
        },
        "https://github.com/vis-nlp/ChartQA (folder 'ChartQA Dataset')",
        ("test", "val", "train"),
        lmms=Lmms(_chartqa_columns, {"chartqa": LmmsTask("chartqa/chartqa.yaml", "test")}),
    ),
    "ocrbench": Layout(
        _ocrbench,
        {
            "OCRBench.json": "questions and answers",
            "OCRBench_Images/": "pictures",
            "data/test-*.parquet": "instead of both: the Hugging Face data set echo840/OCRBench",
        },
        "https://github.com/Yuliang-Liu/MultimodalOCR",
        ("test",),
        lmms=Lmms(_ocrbench_columns, {"ocrbench": LmmsTask("ocrbench/ocrbench.yaml")}),
    ),
    "realworldqa": Layout(
        _realworldqa,
        {
            "data/{split}-*.parquet": "questions, answers and pictures",
            "{split}.jsonl": "instead: rows with image, question, answer",
        },
        "https://huggingface.co/datasets/xai-org/RealworldQA "
        "(hf download --repo-type dataset xai-org/RealworldQA --local-dir <data-root>/realworldqa)",
        ("test",),
        lmms=Lmms(with_answer, {"realworldqa": LmmsTask("realworldqa/realworldqa.yaml")}),
    ),
}
