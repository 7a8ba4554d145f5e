"""easy-VQA's test questions in the layouts of public benchmarks, so that a small model has something to be right about.

`write_all(root)` makes one folder per benchmark, the same each time; `python tests/eval/harness/data.py DIR` does so.
"""

from __future__ import annotations

import base64
import csv
import json
import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mmit.data.formats import easy_vqa

PICTURES = 40
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


class Asked(NamedTuple):
    picture: Path
    number: int
    question: str
    answer: str


def questions() -> list[Asked]:
    found = []
    for number, record in enumerate(islice(easy_vqa("test"), PICTURES)):
        picture = Path(str(record.images[0].source))
        turns = record.turns
        pairs = zip(turns[::2], turns[1::2], strict=True)
        found += [Asked(picture, number, question.text, answer.text) for question, answer in pairs]
    return found


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(path: Path, rows: list[Any]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def copy(picture: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(picture, to)


def humans(answer: str, number: int) -> list[str]:
    """Ten answers, of which some differ in case, punctuation and meaning."""
    others = [f"a {answer}.", answer.title(), "unsure"][: number % 4]
    return [answer] * (10 - len(others)) + others


def yes_no(every: int = 2) -> list[Asked]:
    return [one for one in questions() if one.answer in ("yes", "no")][::every]


def pope(at: Path) -> None:
    for part, kind in enumerate(("random", "popular", "adversarial")):
        rows = []
        for number, one in enumerate(yes_no()[part::3], 1):
            copy(one.picture, at / "val2014" / f"{one.number}.png")
            row = {"question_id": number, "image": f"{one.number}.png", "text": one.question, "label": one.answer}
            rows.append(row)
        lines(at / f"coco_pope_{kind}.json", rows)


def mme(at: Path) -> None:
    by_picture: dict[int, list[Asked]] = {}
    for one in yes_no(1):
        by_picture.setdefault(one.number, []).append(one)
    for number, pair in by_picture.items():
        if len(pair) < 2:
            continue
        folder = at / ("existence", "color", "code_reasoning")[number % 3]
        text = "".join(f"{one.question} Please answer yes or no.\t{one.answer.title()}\n" for one in pair[:2])
        write(folder / f"{number:04}.txt", text)
        copy(pair[0].picture, folder / f"{number:04}.png")


def vqav2(at: Path) -> None:
    asked, notes = [], []
    for number, one in enumerate(questions()[::3]):
        name = {"question_id": 1000 + number, "image_id": one.number}
        answers = [{"answer": text, "answer_id": n} for n, text in enumerate(humans(one.answer, number), 1)]
        asked.append({"question": one.question, **name})
        notes.append({"answers": answers, "answer_type": "other", "multiple_choice_answer": one.answer, **name})
        copy(one.picture, at / "val2014" / f"COCO_val2014_{one.number:012}.jpg")
    write(at / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(at / "v2_mscoco_val2014_annotations.json", {"annotations": notes})


def textvqa(at: Path) -> None:
    rows = []
    for number, one in enumerate(questions()[1::3]):
        row = {"question": one.question, "image_id": str(one.number), "question_id": number}
        rows.append(row | {"answers": humans(one.answer, number)})
        copy(one.picture, at / "train_images" / f"{one.number}.jpg")
    write(at / "TextVQA_0.5.1_val.json", {"data": rows})


def vizwiz(at: Path) -> None:
    rows = []
    for number, one in enumerate(questions()[::9]):
        name = f"VizWiz_val_{number:08}.jpg"
        answers = [{"answer": text, "answer_confidence": "yes"} for text in humans(one.answer, number)]
        rows.append({"image": name, "question": one.question, "answers": answers, "answerable": 1})
        copy(one.picture, at / "val" / name)
    write(at / "val.json", rows)


def gqa(at: Path) -> None:
    rows = {}
    for number, one in enumerate(questions()[2::5]):
        rows[str(number)] = {"question": one.question, "imageId": str(one.number), "answer": one.answer}
        copy(one.picture, at / "images" / f"{one.number}.jpg")
    write(at / "testdev_balanced_questions.json", rows)


class Choice(NamedTuple):
    asked: Asked
    options: list[str]
    right: int


def choices(count: int) -> list[Choice]:
    """Questions about shape and colour with options, the right one at changing places."""
    found = []
    for number, one in enumerate([one for one in questions() if one.answer in SHAPES + COLOURS]):
        pool = [text for text in (SHAPES if one.answer in SHAPES else COLOURS) if text != one.answer]
        options = (pool + ["square"])[: count - 1]
        right = number % count
        options.insert(right, one.answer)
        found.append(Choice(one, options, right))
    return found


def scienceqa(at: Path) -> None:
    problems = {}
    for number, (one, options, right) in enumerate(choices(3)):
        row = {"question": one.question, "choices": options, "answer": right, "hint": "Look." if number % 2 else ""}
        problems[str(number)] = row | {"image": "image.png", "subject": "natural science", "split": "test"}
        copy(one.picture, at / "images" / "test" / str(number) / "image.png")
    write(at / "problems.json", problems)
    write(at / "pid_splits.json", {"test": list(problems)})


def seedbench(at: Path) -> None:
    rows = []
    for number, (one, options, right) in enumerate(choices(4)):
        named = {f"choice_{letter}": text for letter, text in zip("abcd", options, strict=True)}
        row = {"question": one.question, "question_id": str(number), "data_id": str(one.number), "data_type": "image"}
        rows.append(row | named | {"answer": "ABCD"[right], "question_type_id": 1})
        copy(one.picture, at / "SEED-Bench-image" / str(one.number))
    write(at / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene Understanding": 1}})


def mmbench(at: Path) -> None:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    rows = [[*head, "comment", "split"]]
    for number, (one, options, right) in enumerate(choices(3)[:30]):
        image = base64.b64encode(one.picture.read_bytes()).decode()
        hint = "A shape." if number % 2 else "nan"
        for turn in range(3):
            turned = options[turn:] + options[:turn]
            letter = "ABC"[(right - turn) % 3]
            end = [letter, "identity", str(number) if turn else image, "x", "perception", "nan", "dev"]
            rows.append([str(number + 1_000_000 * turn), one.question, hint, *turned, "", *end])
    write(at / "mmbench_dev_20230712.tsv", "".join("\t".join(row) + "\n" for row in rows))


def ai2d(at: Path) -> None:
    for number, (one, options, right) in enumerate(choices(4)[:40]):
        asked = {"questionId": f"{number}.png-0", "answerTexts": options, "correctAnswer": right}
        content = {"imageName": f"{number}.png", "questions": {one.question: asked}}
        write(at / "questions" / f"{number}.png.json", content)
        copy(one.picture, at / "images" / f"{number}.png")
    write(at / "ai2d_test_ids.csv", "".join(f"{number}\n" for number in range(40)))


def hellaswag(at: Path) -> None:
    rows = []
    for number, (one, options, right) in enumerate(choices(4)[:40]):
        row = {"ind": number, "activity_label": "Looking", "ctx_a": one.question, "ctx_b": "the answer is"}
        endings = [f"{text} [title] of course." if number % 3 else text for text in options]
        rows.append(row | {"ctx": "", "endings": endings, "label": right, "split_type": "zeroshot"})
    lines(at / "hellaswag_val.jsonl", rows)


def gsm8k(at: Path) -> None:
    rows = [
        {"question": f"What is {n} and {n}?", "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(1, 17)
    ]
    lines(at / "train.jsonl", rows[:8])
    lines(at / "test.jsonl", rows[8:])


def mmlu(at: Path) -> None:
    for subject in ("anatomy", "astronomy"):
        for split, start, end in (("dev", 0, 5), ("test", 5, 25)):
            path = at / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="", encoding="utf-8") as file:
                for one, options, right in choices(4)[start:end]:
                    csv.writer(file).writerow([one.question, *options, "ABCD"[right]])


BENCHMARKS: dict[str, Callable[[Path], None]] = {
    "pope": pope,
    "mme": mme,
    "vqav2": vqav2,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "scienceqa": scienceqa,
    "seedbench": seedbench,
    "mmbench": mmbench,
    "ai2d": ai2d,
    "hellaswag": hellaswag,
    "gsm8k": gsm8k,
    "mmlu": mmlu,
}


def write_all(root: Path) -> None:
    for name, make in BENCHMARKS.items():
        make(root / name)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
