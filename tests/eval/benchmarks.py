"""Small folders in each benchmark's real layout, made for the tests; and what the first question must become."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(path: Path, colour: str = "red") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 6), colour).save(path, format="JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG")
    return path.read_bytes()


def picture(colour: str = "red") -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), colour).save(out, "PNG")
    return out.getvalue()


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def lines(path: Path, rows: Sequence[Any]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def vqav2(at: Path) -> None:
    asked, notes = [], []
    for number, answer in enumerate(["yes", "2", "red"]):
        name = 42000 + number
        asked.append({"image_id": 42, "question": f"What {number}?", "question_id": name})
        given = [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
        note = {"question_type": "what", "multiple_choice_answer": answer, "answers": given, "image_id": 42}
        notes.append(note | {"answer_type": ["yes/no", "number", "other"][number], "question_id": name})
    write(at / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": asked})
    write(at / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": notes})
    png(at / "val2014" / "COCO_val2014_000000000042.jpg")


def gqa(at: Path) -> None:
    row = {"question": "Is it red?", "imageId": "n1", "answer": "yes", "fullAnswer": "Yes, it is."}
    write(at / "testdev_balanced_questions.json", {"201": row | {"types": {"structural": "verify"}}})
    png(at / "images" / "n1.jpg")


def vizwiz(at: Path) -> None:
    given = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    row = {"image": "VizWiz_val_00000000.jpg", "question": "what IS this?", "answers": given}
    write(at / "val.json", [row | {"answer_type": "unanswerable", "answerable": 0}])
    png(at / "val" / "VizWiz_val_00000000.jpg")


def textvqa(at: Path) -> None:
    row = {"question": "what Brand is it?", "image_id": "ab12", "question_id": 34602, "answers": ["nokia"] * 10}
    write(at / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    write(at / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "ab12", "ocr_tokens": ["NOKIA", "4"]}]})
    png(at / "train_images" / "ab12.jpg")


def vqa_rad(at: Path) -> None:
    row = {
        "qid": "1",
        "image_name": "synpic54610.jpg",
        "question": "Are regions of the brain infarcted? ",
        "answer": "Yes",
    }
    row |= {"phrase_type": "test_freeform", "answer_type": "CLOSED ", "question_type": "PRES"}
    more = {"phrase_type": "test_para", "answer": 3, "answer_type": "OPEN"}
    rows = [row | {"phrase_type": "freeform"}, row, row | more, row | {"phrase_type": "para"}]
    write(at / "VQA_RAD Dataset Public.json", rows)
    png(at / "VQA_RAD Image Folder" / "synpic54610.jpg")


def slake(at: Path) -> None:
    row = {
        "img_id": 0,
        "img_name": "xmlab0/source.jpg",
        "question": "What modality is used?",
        "answer": "MRI",
        "qid": 9,
    }
    row |= {"q_lang": "en", "answer_type": "OPEN", "content_type": "Modality", "base_type": "vqa"}
    for name in ("test", "train"):
        write(at / f"{name}.json", [row, row | {"q_lang": "zh", "question": "?", "qid": 10}])
    png(at / "imgs" / "xmlab0" / "source.jpg")


def pmc_vqa(at: Path) -> None:
    head = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
    row = 'PMC1_F1.jpg,What is the uptake? ,Focal, A:Diffuse , B:Focal , C:None ," D:x, y ",B\n'
    write(at / "test_clean.csv", head + row)
    png(at / "images" / "PMC1_F1.jpg")


def scienceqa(at: Path) -> None:
    row = {"question": "Which?", "choices": ["dog", "cat"], "answer": 1, "hint": "Look.", "image": "image.png"}
    problems = {"7": row | {"subject": "natural science", "split": "test"}, "8": row | {"image": None}}
    write(at / "problems.json", problems)
    write(at / "pid_splits.json", {"test": ["7", "8"], "train": []})
    png(at / "images" / "test" / "7" / "image.png")


def pope(at: Path) -> None:
    for kind in ("random", "popular", "adversarial"):
        row = {"image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?"}
        rows = [row | {"question_id": 1, "label": "yes"}, row | {"question_id": 2, "label": "no"}]
        lines(at / f"coco_pope_{kind}.json", rows)
    png(at / "val2014" / "COCO_val2014_000000310196.jpg")


def mme(at: Path) -> None:
    ask = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    write(at / "existence" / "000000006040.txt", ask)
    png(at / "existence" / "000000006040.jpg")
    write(at / "landmark" / "questions_answers_YN" / "a.txt", ask)
    png(at / "landmark" / "images" / "a.jpg")
    write(at / "code_reasoning" / "0001.txt", ask)
    png(at / "code_reasoning" / "0001.png")


def mmbench(at: Path) -> None:
    image = base64.b64encode(picture()).decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"
    one = f"1\tWhich?\tLook.\tdog\tcat\t\t\tA\tidentity\t{image}\tx\tperception\tnan\tdev"
    two = "1000001\tWhich?\tLook.\tcat\tdog\t\t\tB\tidentity\t1\tx\tperception\tnan\tdev"
    write(at / "mmbench_dev_20230712.tsv", "\n".join([head, one, two]) + "\n")


def seedbench(at: Path) -> None:
    row = {"answer": "B", "data_id": "1_2", "data_type": "image", "question": "Which?", "question_type_id": 1}
    row |= {f"choice_{letter}": f"option {letter}" for letter in "abcd"} | {"question_id": "101"}
    video = row | {"data_type": "video", "question_id": "102"}
    write(at / "SEED-Bench.json", {"questions": [row, video], "question_type": {"Scene Understanding": 1}})
    png(at / "SEED-Bench-image" / "1_2.png")
    (at / "SEED-Bench-image" / "1_2.png").rename(at / "SEED-Bench-image" / "1_2")


MMMU_ROWS: list[dict[str, Any]] = [
    {
        "id": "validation_Art_1",
        "question": "Look at <image 2>, then <image 1>: which?",
        "options": "['dog', \"cat's\"]",
        "answer": "B",
        "question_type": "multiple-choice",
        "subfield": "x",
    },
    {
        "id": "validation_Art_2",
        "question": "How many? <image 1>",
        "options": "[]",
        "answer": "['12', 'twelve']",
        "question_type": "open",
        "subfield": "x",
    },
]


def mmmu(at: Path) -> None:
    for name in ("1.png", "2.png"):
        png(at / name)
    pictures = {"image_1": "1.png", "image_2": "2.png"}
    empty = {f"image_{n}": None for n in range(2, 8)}
    lines(at / "validation.jsonl", [MMMU_ROWS[0] | empty | pictures, MMMU_ROWS[1] | empty | {"image_1": "1.png"}])


def mathvista(at: Path) -> None:
    row = {"question": "How many?", "image": "images/1.jpg", "choices": None, "unit": "cm", "precision": None}
    row |= {"answer": "3", "question_type": "free_form", "answer_type": "integer", "pid": "1"}
    pick = row | {"choices": ["dog", "cat"], "unit": None, "question_type": "multi_choice", "answer_type": "text"}
    meta = {"metadata": {"task": "figure question answering"}}
    write(at / "testmini.json", {"1": row | meta, "2": pick | meta | {"answer": "cat"}})
    png(at / "images" / "1.jpg")


def chartqa(at: Path) -> None:
    for kind in ("human", "augmented"):
        write(at / "test" / f"test_{kind}.json", [{"imgname": "1.png", "query": "How much?", "label": "14"}])
    png(at / "test" / "png" / "1.png")


def docvqa(at: Path) -> None:
    row = {"questionId": 49153, "question": "Which page?", "image": "documents/a_1.png", "answers": ["3", "three"]}
    write(at / "val_v1.0.json", {"dataset_name": "docvqa", "data": [row | {"docId": 14465}]})
    png(at / "documents" / "a_1.png")


def ai2d(at: Path) -> None:
    row = {"abcLabel": False, "answerTexts": ["leaf", "root"], "correctAnswer": 1, "questionId": "0.png-0"}
    for name in ("0", "1"):
        data = {"imageName": f"{name}.png", "questions": {"Which part?": row | {"questionId": f"{name}.png-0"}}}
        write(at / "questions" / f"{name}.png.json", data)
        png(at / "images" / f"{name}.png")
    write(at / "ai2d_test_ids.csv", "0\n")


def ocrbench(at: Path) -> None:
    row = {"dataset_name": "IIIT5K", "id": 2843, "image_path": "IIIT5K/test/1.png", "type": "Regular Text Recognition"}
    first = row | {"question": "what is written in the image?", "answers": "CENTRE"}
    write(at / "OCRBench.json", [first, first | {"answers": ["12", "twelve"]}])
    png(at / "OCRBench_Images" / "IIIT5K" / "test" / "1.png")


def realworldqa(at: Path) -> None:
    png(at / "0.png")
    lines(at / "test.jsonl", [{"image": "0.png", "question": "Which?\n\nA. left\nB. right", "answer": "B"}])


def nlvr(at: Path) -> None:
    row = {"sentence": "There is a tower.", "directory": "0", "evals": {"r1": "true"}, "structured_rep": [[], [], []]}
    rows = [row | {"identifier": f"72-{n}", "label": label} for n, label in enumerate(["true", "false"])]
    lines(at / "dev" / "dev.json", rows)
    for n in range(2):
        for turn in range(6):
            png(at / "dev" / "images" / "0" / f"dev-72-{n}-{turn}.png")


def nlvr2(at: Path) -> None:
    row = {"sentence": "Both are red.", "synset": "x", "left_url": "", "right_url": ""}
    rows = [row | {"identifier": f"test1-0-{n}-0", "label": label} for n, label in enumerate(["True", "False"])]
    lines(at / "test1.json", rows)
    for n in range(2):
        for side in (0, 1):
            png(at / "test1" / f"test1-0-{n}-img{side}.png")


def coco_captions(at: Path) -> None:
    images = [{"id": n, "file_name": f"{n:012}.jpg"} for n in (139, 285)]
    notes = [{"id": n * 2 + i, "image_id": n, "caption": f"A {n} {i}."} for n in (139, 285) for i in range(2)]
    write(at / "annotations" / "captions_val2017.json", {"images": images, "annotations": notes})
    for n in (139, 285):
        png(at / "val2017" / f"{n:012}.jpg")


def _karpathy(at: Path, dataset: str, folder: str) -> None:
    row: dict[str, Any] = {"filename": "1.jpg", "imgid": 0, "sentences": [{"raw": "A dog."}, {"raw": "One dog."}]}
    if dataset == "coco":
        row |= {"filepath": folder, "cocoid": 391895}
    rows = [row | {"split": "test"}, row | {"split": "train"}]
    write(at / f"dataset_{dataset}.json", {"dataset": dataset, "images": rows})
    png(at / folder / "1.jpg")


def coco_karpathy(at: Path) -> None:
    _karpathy(at, "coco", "val2014")


def flickr30k(at: Path) -> None:
    _karpathy(at, "flickr30k", "flickr30k-images")


def tabmwp(at: Path) -> None:
    row = {"question": "How much?", "choices": None, "answer": "1,234", "unit": "$", "table_title": "Prices"}
    row |= {"table": "a | 1\nb | 2", "ques_type": "free_text", "ans_type": "integer_number", "grade": 4}
    pick = row | {"choices": ["dog", "cat"], "answer": "cat", "unit": None, "ques_type": "multi_choice"}
    write(at / "problems_test1k.json", {"1": row, "2": pick})
    for name in ("1", "2"):
        png(at / "tables" / f"{name}.png")


def mmlu(at: Path) -> None:
    solved = "".join(f"Solved {n}?,a,b,c,d,{'ABCDA'[n]}\n" for n in range(5))
    write(at / "dev" / "high_school_biology_dev.csv", solved)
    write(at / "test" / "high_school_biology_test.csv", '"Which, of these?",w,x,y,z,C\nOther?,w,x,y,z,A\n')


def hellaswag(at: Path) -> None:
    row = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he"}
    row |= {"ctx": "A man is sitting on a roof. he", "label": 3, "split_type": "indomain", "source_id": "x"}
    endings = ["is [x] one.", "is two [title] Next.", "is  three.", "starts."]
    lines(at / "hellaswag_val.jsonl", [row | {"endings": endings}])


def gsm8k(at: Path) -> None:
    rows = [{"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(6)]
    lines(at / "train.jsonl", rows)
    lines(at / "test.jsonl", [{"question": "What is 2*3?", "answer": "2*3=6\n#### 6"}])


def ifeval(at: Path) -> None:
    row = {"key": 1000, "prompt": "No commas, please.", "instruction_id_list": ["punctuation:no_comma"]}
    lines(at / "input_data.jsonl", [row | {"kwargs": [{"num_words": None}]}])


def mmvet(at: Path) -> None:
    row = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1 <AND> -5", "capability": ["ocr", "math"]}
    rows = {"v1_0": row, "v1_1": row | {"question": "Who?", "answer": "Ada", "capability": ["rec"]}}
    write(at / "mm-vet.json", rows)
    png(at / "images" / "v1_0.png")


def llava_bench(at: Path) -> None:
    lines(at / "questions.jsonl", [{"question_id": 0, "image": "001.jpg", "text": "Where is it?", "category": "conv"}])
    lines(at / "context.jsonl", [{"image": "001.jpg", "caption": "A beach in Hawaii."}])
    lines(at / "answers_gpt4.jsonl", [{"question_id": 0, "text": "In Hawaii.", "answer_id": "x", "model_id": "gpt"}])
    png(at / "images" / "001.jpg")


# name of the task: how its folder is made, questions there are, what the first is asked as, its reference, group
Case = tuple[Callable[[Path], None], int, str, Any, "str | None"]
CASES: dict[str, Case] = {
    "vqav2": (vqav2, 3, "What 0?" + WORD, ["yes"] * 10, "yes/no"),
    "gqa": (gqa, 1, "Is it red?" + WORD, "yes", "verify"),
    "vizwiz": (
        vizwiz,
        1,
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD,
        ["unanswerable"] * 10,
        "unanswerable",
    ),
    "textvqa": (textvqa, 1, "What brand is it?" + WORD, ["nokia"] * 10, None),
    "textvqa_ocr": (textvqa, 1, "What brand is it?\nReference OCR token: NOKIA, 4" + WORD, ["nokia"] * 10, None),
    "scienceqa_img": (scienceqa, 1, "Context: Look.\nWhich?\nA. dog\nB. cat" + LETTER, "B", "natural science"),
    "pope": (pope, 6, "Is there a snowboard in the image?" + WORD, "yes", "random"),
    "pope_popular": (pope, 2, "Is there a snowboard in the image?" + WORD, "yes", "popular"),
    "mme": (
        mme,
        6,
        "Is there a dog?" + WORD,
        {"answer": "Yes", "category": "existence", "image": "existence/000000006040"},
        "existence",
    ),
    "mmbench_dev": (
        mmbench,
        2,
        "Look. Which? There are several options:\nA. dog\nB. cat" + LETTER,
        {"index": 1, "answer": "A", "options": {"A": "dog", "B": "cat"}, "category": "identity"},
        "identity",
    ),
    "seedbench_img": (
        seedbench,
        1,
        "Which?\nA. option a\nB. option b\nC. option c\nD. option d" + LETTER,
        "B",
        "Scene Understanding",
    ),
    "mmmu_val": (
        mmmu,
        2,
        "Look at , then : which?\nA. dog\nB. cat's\n" + LETTER,
        {"question_type": "multiple-choice", "options": ["dog", "cat's"], "answer": "B"},
        "Art",
    ),
    "mathvista": (
        mathvista,
        2,
        "How many? (Unit: cm)\nAnswer the question using a single integer number.",
        {"question_type": "free_form", "answer_type": "integer", "choices": None, "precision": None, "answer": "3"},
        "figure question answering",
    ),
    "chartqa": (chartqa, 2, "How much?\nAnswer the question with a single word.", "14", "human"),
    "docvqa": (docvqa, 1, "Which page?" + WORD, ["3", "three"], None),
    "ai2d": (ai2d, 1, "Which part?\nA. leaf\nB. root" + LETTER, "B", None),
    "ocrbench": (
        ocrbench,
        2,
        "what is written in the image?",
        {"answers": ["CENTRE"], "dataset": "IIIT5K"},
        "Regular Text Recognition",
    ),
    "realworldqa": (realworldqa, 1, "Which?\n\nA. left\nB. right", "B", None),
    "nlvr": (
        nlvr,
        12,
        "There is a tower.\nIs this statement about the picture true? Answer with true or false.",
        {"label": "true", "identifier": "72-0-0"},
        None,
    ),
    "nlvr2": (
        nlvr2,
        2,
        "Both are red.\nIs this statement about the two pictures true? Answer with True or False.",
        {"label": "True", "identifier": "test1-0-0-0"},
        None,
    ),
    "coco_captions": (
        coco_captions,
        2,
        "Provide a one-sentence caption for the provided image.",
        ["A 139 0.", "A 139 1."],
        None,
    ),
    "coco_karpathy": (
        coco_karpathy,
        1,
        "Provide a one-sentence caption for the provided image.",
        ["A dog.", "One dog."],
        None,
    ),
    "flickr30k": (flickr30k, 1, "Provide a one-sentence caption for the provided image.", ["A dog.", "One dog."], None),
    "tabmwp": (tabmwp, 2, "How much? (Unit: $)" + WORD, ["1,234", "1234", "$1,234", "1,234$"], "free_text"),
    "mmlu": (
        mmlu,
        2,
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        + "".join(f"Solved {n}?\nA. a\nB. b\nC. c\nD. d\nAnswer: {'ABCDA'[n]}\n\n" for n in range(5))
        + "Which, of these?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        "C",
        "high_school_biology",
    ),
    "hellaswag": (
        hellaswag,
        1,
        "Roof shingle removal: A man is sitting on a roof. He",
        "starts.",
        "indomain",
    ),
    "gsm8k": (
        gsm8k,
        1,
        "".join(f"Question: What is {n}+1?\nAnswer: {n}+1={n + 1}\n#### {n + 1}\n\n" for n in range(5))
        + "Question: What is 2*3?\nAnswer:",
        "2*3=6\n#### 6",
        None,
    ),
    "ifeval": (
        ifeval,
        1,
        "No commas, please.",
        {"prompt": "No commas, please.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        None,
    ),
    "mmvet": (
        mmvet,
        2,
        "What is x?",
        {"question": "What is x?", "answer": "-1 <AND> -5", "capability": ["ocr", "math"]},
        "math+ocr",
    ),
    "llava_bench": (
        llava_bench,
        1,
        "Where is it?",
        {"question": "Where is it?", "context": "A beach in Hawaii.", "answer": "In Hawaii.", "category": "conv"},
        "conv",
    ),
    "vqa_rad": (vqa_rad, 2, "Are regions of the brain infarcted?" + WORD, "Yes", "CLOSED"),
    "slake": (slake, 1, "What modality is used?" + WORD, "MRI", "OPEN"),
    "pmc_vqa": (
        pmc_vqa,
        1,
        "What is the uptake?\nA. Diffuse\nB. Focal\nC. None\nD. x, y" + LETTER,
        {"answer": "B", "options": ["Diffuse", "Focal", "None", "x, y"]},
        None,
    ),
}
