"""Question files: VQAv2, GQA, TextVQA and LLaVA's, in their official layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import detect_format, import_file
from mmit.errors import ConfigError, RecordError
from tests.data.formats.format_tools import bad_rows, imported, shape, texts, write

QUESTIONS: dict[str, Any] = {
    "info": {"version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {"name": "CC BY 4.0"},
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
        {"image_id": 9, "question": "Is it hot?", "question_id": 9002},
    ],
}


def annotation(question_id: int, *answers: str, choice: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question_id": question_id,
        "image_id": question_id // 1000,
        "question_type": "what is",
        "answer_type": "other",
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)],
    }
    return row | ({"multiple_choice_answer": choice} if choice else {})


@pytest.fixture
def vqa(tmp_path: Path) -> tuple[Path, Path]:
    # In another order than the questions, as in the official file.
    found = [
        annotation(9002, "yes", "no", "no", choice="no"),
        annotation(458752001, "pitcher", "catcher", "pitcher"),
        annotation(458752000, "net", choice="net"),
    ]
    return write(tmp_path / "q.json", QUESTIONS), write(tmp_path / "a.json", {"annotations": found})


def test_vqav2(vqa: tuple[Path, Path]) -> None:
    path, answers = vqa
    assert detect_format(path)[0] == "vqav2"
    records = imported(path, "vqav2", annotations=str(answers), image_root="train2014")
    assert texts(records[0]) == [
        ["[train2014/COCO_train2014_000000458752.jpg]", "What is this photo taken looking through?"],
        ["net"],
    ]
    # OK-VQA has no multiple_choice_answer: the commonest of the answers.
    assert [r.turns[1].text for r in records] == ["net", "pitcher", "no"]
    assert [r.id for r in records] == ["458752000", "458752001", "9002"]
    assert records[2].meta["answers"] == ["yes", "no", "no"] and records[2].meta["answer_type"] == "other"
    assert records[2].meta["image_id"] == 9


def test_vqav2_without_annotations_is_for_generation(vqa: tuple[Path, Path]) -> None:
    records = imported(vqa[0], "vqav2", suffix="\nAnswer shortly.", image_pattern="{image_id}.png")
    assert shape(records[2]) == [("user", [f"[{vqa[0].parent}/9.png]", "Is it hot?\nAnswer shortly."])]
    records[0].validate(for_training=False)


def test_vqav2_errors(vqa: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.json", {"annotations": [annotation(1, "x")]})
    bad = bad_rows(vqa[0], "vqav2", annotations=str(other))
    assert len(bad) == 3 and bad[0].problem == "the annotation file has no question 458752000"
    assert "same split" in bad[0].remedy and bad[0].where == f"{vqa[0]}:1 (458752000)"
    broken = [
        {"question": "a", "question_id": 1},
        {"image_id": 1, "question_id": 2},
        {"image_id": "cat", "question": "a"},
    ]
    bad = bad_rows(write(tmp_path / "b.json", {**QUESTIONS, "questions": broken}), "vqav2")
    assert [e.problem.split(",")[0] for e in bad][:2] == ["image_id is 'None'", "the question is 'None'"]
    assert "does not fit the image_pattern" in bad[2].problem
    with pytest.raises(ConfigError, match="image_pattern.*\n.*valid: image_id, data_subtype"):
        list(import_file(vqa[0], "vqav2", image_pattern="{split}.jpg"))
    with pytest.raises(RecordError, match="no 'annotations'"):
        list(import_file(vqa[0], "vqav2", annotations=str(vqa[0])))
    with pytest.raises(ConfigError, match="did you mean 'annotations'"):
        import_file(vqa[0], "vqav2", anotations="a")


GQA = {
    "02930152": {
        "imageId": "2354786",
        "question": "Is the sky dark?",
        "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "types": {"structural": "verify", "semantic": "attr"},
        "semantic": [{"operation": "select", "argument": "sky (2486325)", "dependencies": []}],
        "annotations": {"question": {"2": "2486325"}},
    },
    "07333408": {"imageId": "n161313", "question": "What is on the wall?", "answer": "pipe", "fullAnswer": "A pipe."},
    "07333409": {"imageId": "1", "question": "Who?"},
}


def test_gqa(tmp_path: Path) -> None:
    path = write(tmp_path / "train_balanced_questions.json", GQA)
    assert detect_format(path)[0] == "gqa"
    records = imported(path, "gqa", image_root="images")
    assert texts(records[0]) == [["[images/2354786.jpg]", "Is the sky dark?"], ["yes"]]
    assert [r.id for r in records] == list(GQA) and len(records[2].turns) == 1
    assert records[0].meta["types"]["semantic"] == "attr" and "semantic" not in records[0].meta
    assert imported(path, "gqa", answer="fullAnswer")[1].turns[1].text == "A pipe."
    with pytest.raises(ConfigError, match="did you mean 'fullAnswer'"):
        list(import_file(path, "gqa", answer="fullanswer"))
    bad = bad_rows(write(tmp_path / "b.json", {"1": {"question": "a"}, "2": 3}), "gqa")
    assert [e.problem for e in bad] == ["imageId is 'None'", "found a int, not an object"]


TEXTVQA = {
    "dataset_type": "train",
    "dataset_name": "textvqa",
    "data": [
        {
            "question": "what is the brand?",
            "image_id": "0054c91397f2fe05",
            "image_classes": ["Camera"],
            "flickr_original_url": "https://x.org/a.jpg",
            "question_tokens": ["what"],
            "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", "dakota", *["dakota"] * 5],
            "question_id": 0,
            "set_name": "train",
        },
        {"question": "tie?", "image_id": "b", "question_id": 1, "answers": ["b", "a", "a", "b"]},
        {"question": "test?", "image_id": "c", "question_id": 2, "set_name": "test"},
    ],
}


def test_textvqa(tmp_path: Path) -> None:
    path = write(tmp_path / "TextVQA_0.5.1_train.json", TEXTVQA)
    assert detect_format(path)[0] == "textvqa"
    records = imported(path, "textvqa", image_root="train_images")
    assert texts(records[0]) == [["[train_images/0054c91397f2fe05.jpg]", "what is the brand?"], ["dakota"]]
    assert records[1].turns[1].text == "b" and len(records[2].turns) == 1
    assert len(records[0].meta["answers"]) == 10 and records[0].id == "0"
    broken = [{"question": "a", "image_id": "b", "answers": "c"}, {"question": "a", "image_id": "b", "answers": [1]}]
    bad = bad_rows(write(tmp_path / "b.json", {"data": broken}), "textvqa")
    assert [e.problem for e in bad] == ["answers is 'c', not a list", "an answer is '1', not text"]


def test_llava_questions(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "image": "a.jpg", "text": "What?\nReference OCR token: X", "category": "conv"},
        {"question_id": "b", "image": "b.jpg", "text": "<image> tag?"},
        {"question_id": 3, "text": "No picture"},
    ]
    path = write(tmp_path / "qa90_questions.jsonl", rows, lines=True)
    assert detect_format(path)[0] == "llava_questions"
    records = imported(path, "llava_questions", suffix="!")
    assert [shape(r)[0][1][-1] for r in records] == ["What?\nReference OCR token: X!", "<image> tag?!", "No picture!"]
    assert [len(r.images) for r in records] == [1, 1, 0] and records[0].meta == {"category": "conv"}
    assert bad_rows(write(tmp_path / "b.json", [{"question_id": 1, "image": "a"}]), "llava_questions")


def test_an_answer_file_is_no_question_file(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "prompt": "What?", "text": "A cat.", "answer_id": "x", "model_id": "m", "metadata": {}}]
    with pytest.raises(RecordError, match="cannot tell the format"):
        detect_format(write(tmp_path / "answers.jsonl", rows, lines=True))


RAD: dict[str, Any] = {
    "qid": "1",
    "phrase_type": "freeform",
    "image_name": "synpic54610.jpg",
    "image_organ": "HEAD",
    "question": "Are regions of the brain infarcted? ",
    "question_rephrase": "NULL",
    "answer": "Yes",
    "answer_type": "CLOSED ",
}


def test_vqa_rad_learns_from_its_training_questions_alone(tmp_path: Path) -> None:
    rows = [RAD, RAD | {"phrase_type": "test_para", "qid": "2"}, RAD | {"phrase_type": "para", "answer": 4, "qid": "3"}]
    path = write(tmp_path / "VQA_RAD Dataset Public.json", rows)
    assert detect_format(path)[0] == "vqa_rad"
    records = imported(path, "vqa_rad", image_root="images")
    assert [(record.id, record.turns[1].text) for record in records] == [("1", "Yes"), ("3", "4")]
    assert records[0].turns[0].text == "Are regions of the brain infarcted?"
    assert shape(records[0])[0] == ("user", ["[images/synpic54610.jpg]", "Are regions of the brain infarcted?"])
    assert records[0].meta["answer_type"] == "CLOSED" and records[0].licence == "CC0-1.0"
    assert [record.id for record in imported(path, "vqa_rad", split="test")] == ["2"]
    assert len(imported(path, "vqa_rad", split="all")) == 3
    with pytest.raises(ConfigError, match="split"):
        list(import_file(path, "vqa_rad", split="dev"))
    bad = [
        {**RAD, "answer": None},
        *({k: v for k, v in RAD.items() if k != key} for key in ("image_name", "phrase_type")),
    ]
    assert len(bad_rows(write(tmp_path / "bad.json", bad), "vqa_rad")) == 3


def test_slake_in_one_language_or_both(tmp_path: Path) -> None:
    row = {"img_id": 0, "img_name": "xmlab0/source.jpg", "question": "What modality?", "answer": "MRI", "qid": 9}
    rows = [row | {"q_lang": "en"}, row | {"q_lang": "zh", "question": "什么?", "qid": 10}]
    path = write(tmp_path / "train.json", rows)
    assert detect_format(path)[0] == "slake"
    assert [record.id for record in imported(path, "slake", image_root="imgs")] == ["9", "10"]
    (english,) = imported(path, "slake", image_root="imgs", language="en", suffix="!")
    assert shape(english) == [("user", ["[imgs/xmlab0/source.jpg]", "What modality?!"]), ("assistant", ["MRI"])]
    assert english.licence == "CC-BY-4.0"
