"""Loaders of benchmarks whose answers are graded by a judge: MM-Vet and LLaVA-Bench (in the wild).

In: each benchmark's folder, laid out as its makers distribute it. Out: questions; the reference is what the judge
is told beside the answer.
"""

from __future__ import annotations

from mmit.eval.layouts.common import Folder, Layout, Questions


def _mmvet(folder: Folder, split: str) -> Questions:
    pictures = folder.find("images")
    for name, row in folder.json("mm-vet.json").items():
        image = folder.picture(row["imagename"], root=pictures)
        reference = {"question": row["question"], "answer": row["answer"], "capability": row["capability"]}
        group = "+".join(sorted(row["capability"]))
        yield folder.question(row["question"], [image], id=name, reference=reference, group=group)


def _llava_bench(folder: Folder, split: str) -> Questions:
    pictures = folder.find("images")
    captions = {row["image"]: row["caption"] for _, row in folder.rows("context.jsonl")}
    answers = {row["question_id"]: row["text"] for _, row in folder.rows("answers_gpt4.jsonl")}
    for _, row in folder.rows("questions.jsonl"):
        caption = captions[row["image"]]
        reference = {
            "question": row["text"],
            "context": "\n".join(caption) if isinstance(caption, list) else caption,
            "answer": answers[row["question_id"]],
            "category": row["category"],
        }
        image = folder.picture(row["image"], root=pictures)
        yield folder.question(row["text"], [image], id=row["question_id"], reference=reference, group=row["category"])


LAYOUTS: dict[str, Layout] = {
    "mmvet": Layout(
        _mmvet,
        {"mm-vet.json": "questions and answers", "images/": "pictures"},
        "https://github.com/yuweihao/MM-Vet (mm-vet.zip)",
        ("test",),
    ),
    "llava_bench": Layout(
        _llava_bench,
        {
            "questions.jsonl": "questions",
            "context.jsonl": "descriptions of the pictures for the judge",
            "answers_gpt4.jsonl": "reference answers",
            "images/": "pictures",
        },
        "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild "
        "(hf download --repo-type dataset liuhaotian/llava-bench-in-the-wild --local-dir <data-root>/llava_bench)",
        ("test",),
    ),
}
