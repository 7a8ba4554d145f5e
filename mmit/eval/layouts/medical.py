"""Loaders of questions about medical images: VQA-RAD, SLAKE, PMC-VQA.

In: each set's folder, laid out as its makers distribute it. Out: questions without the words around them, which are the
task's prompt. The type of a question is its makers' CLOSED (yes, no, or one of what the question names) or OPEN.
"""

from __future__ import annotations

from typing import Any

from mmit.data.formats.multimodal import pmc_vqa
from mmit.data.formats.vqa import is_test_phrase
from mmit.eval.layouts.common import Folder, Layout, Questions, lettered


def _vqa_rad(folder: Folder, split: str) -> Questions:
    images = folder.find("VQA_RAD Image Folder", "images")
    for number, row in folder.rows("VQA_RAD Dataset Public.json"):
        if is_test_phrase(row["phrase_type"]) == (split == "test"):
            yield _answered(folder, row, folder.picture(row["image_name"], root=images), number)


def _slake(folder: Folder, split: str, language: str = "en") -> Questions:
    images = folder.find("imgs")
    names = [f"{split}.json", *(["validate.json"] if split == "validation" else [])]
    for _, row in folder.rows(*names):
        if row["q_lang"] == language:
            yield _answered(folder, row, folder.picture(row["img_name"], root=images), row["qid"])


def _answered(folder: Folder, row: dict[str, Any], image: Any, name: Any) -> Any:
    kind = str(row["answer_type"]).strip().upper()  # "CLOSED " occurs
    answer = str(row["answer"]).strip()  # numbers occur
    return folder.question(str(row["question"]).strip(), [image], id=name, reference=answer, group=kind)


def _pmc_vqa(folder: Folder, split: str) -> Questions:
    images = folder.find("images_2", "images", "figures") if split.endswith("_2") else folder.find("images", "figures")
    for number, row in folder.rows(f"{split}.csv"):
        letter = pmc_vqa(row, style="letter").turns[1].text
        texts = [str(row[f"Choice {name}"]).strip().removeprefix(f"{name}:").strip() for name in "ABCD"]
        body = f"{str(row['Question']).strip()}\n{lettered(texts)}"
        image = folder.picture(row["Figure_path"], root=images)
        reference = {"answer": letter, "options": texts}
        yield folder.question(body, [image], id=number, reference=reference, choices=list("ABCD"))


LAYOUTS: dict[str, Layout] = {
    "vqa_rad": Layout(
        _vqa_rad,
        {
            "VQA_RAD Dataset Public.json": "questions and answers of both splits; phrase_type tells which",
            "VQA_RAD Image Folder/": "images such as synpic54610.jpg; also found as images/",
        },
        "https://osf.io/89kps/ (CC0-1.0). Images of the test questions are in the training questions too.",
        ("test", "train"),
    ),
    "slake": Layout(
        _slake,
        {
            "{split}.json": "questions and answers (validate.json in the first release)",
            "imgs/": "images xmlab0/source.jpg",
        },
        "https://www.med-vqa.com/slake/ (CC-BY-4.0), "
        "or hf download --repo-type dataset BoKelvin/SLAKE --local-dir <data-root>/slake and unzip imgs.zip there",
        ("test", "validation", "train"),
        {"language": "en (default) or zh, the language of the questions"},
    ),
    "pmc_vqa": Layout(
        _pmc_vqa,
        {
            "{split}.csv": "questions, four choices and the right one",
            "images/": "images PMC1064097_F1.jpg; of the second version also found as images_2/",
        },
        "https://huggingface.co/datasets/xmcmic/PMC-VQA "
        "(hf download --repo-type dataset xmcmic/PMC-VQA --local-dir <data-root>/pmc_vqa, and unzip images.zip there)",
        ("test_clean", "test", "test_2", "train", "train_2"),
    ),
}
