"""mmit in VLMEvalKit: a model class, and mmit's questions as the TSV files that VLMEvalKit reads.

`export`: a task of `mmit eval` becomes one TSV with index, image (base64), question, A, B, ..., answer, category. In
$LMUData, a name that VLMEvalKit does not know is a multiple-choice data set of one's own.
`run`: VLMEvalKit's own command line with the model `mmit`; needs VLMEvalKit (a git checkout, or ms-vlmeval).

python scripts/vlmevalkit.py export scienceqa_img --data-root data --out ~/LMUData/scienceqa_local.tsv
python scripts/vlmevalkit.py run RUN --data scienceqa_local --judge exact_matching
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import PIL.Image

from mmit.errors import ConfigError, MmitError, RecordError
from mmit.eval.layouts.common import split_options
from mmit.eval.questions import CHOICES, QUESTION
from mmit.eval.tasks import Task, load_task, task_items
from mmit.records import Image, Text, Turn

NAME = "mmit"


def rows(task: Task) -> Iterator[dict[str, str]]:
    """Yield a task's questions as cells, without the words of its prompt, which VLMEvalKit has its own for.

    Raises RecordError for a question without exactly one picture and one answer in words.
    """
    bare = task.model_copy(update={"prompt": QUESTION})
    for number, item in enumerate(task_items(bare)):
        where, question, options = item.prompt.where, item.text, list[str]()
        if item.choices and item.choices == tuple(ascii_uppercase[: len(item.choices)]):
            question, options = split_options(replace(item.prompt, meta={CHOICES: list(item.choices)}))
        answer = item.reference["answer"] if isinstance(item.reference, dict) else item.reference
        if not isinstance(answer, str):
            raise RecordError("not one answer in words", where=where, remedy="Export tasks with one right answer.")
        if len(item.prompt.images) != 1:
            problem = f"{len(item.prompt.images)} pictures"
            raise RecordError(problem, where=where, remedy="Export tasks with one picture per question.")
        image = base64.b64encode(picture(item.prompt.images[0], where)).decode()
        row = {"index": str(number), "image": image, "question": question}
        row |= dict(zip(ascii_uppercase, options, strict=False))
        yield row | {"answer": answer, "category": item.group or "all"}


def picture(image: Image, where: str) -> bytes:
    """Return a picture file's bytes as they are. Raises RecordError."""
    if isinstance(image.source, bytes):
        return image.source
    if isinstance(image.source, PIL.Image.Image):
        out = io.BytesIO()
        image.source.save(out, "PNG")
        return out.getvalue()
    try:
        return Path(image.source).read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read the picture: {error}", where=where, remedy="Check its path.") from error


def export(task: Task, out: Path) -> int:
    """Write a task as TSV; return the number of its questions. Raises MmitError."""
    found = list(rows(task))
    letters = [letter for letter in ascii_uppercase if any(letter in row for row in found)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8", newline="") as file:
        columns = ["index", "image", "question", *letters, "answer", "category"]
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(found)
    return len(found)


def conversation(message: Sequence[dict[str, Any]], where: str = "message") -> tuple[Turn, ...]:
    """Turn VLMEvalKit's list of {"type": "image" or "text", "value"} into a user's turn. Raises RecordError."""
    parts: list[Text | Image] = []
    for part in message:
        if part["type"] not in ("image", "text"):
            problem = f"a part of type '{part['type']}'"
            raise RecordError(problem, where=where, remedy="mmit sees pictures: choose data sets without video.")
        parts.append(Text(part["value"]) if part["type"] == "text" else Image(str(part["value"])))
    return (Turn("user", tuple(parts)),)


def model_class() -> type:
    """Return VLMEvalKit's view of an mmit model. Raises ConfigError if VLMEvalKit is not installed."""
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        problem = f"cannot import {error.name}"
        remedy = "Install VLMEvalKit (https://github.com/open-compass/VLMEvalKit) into this environment."
        raise ConfigError(problem, where="run", remedy=remedy) from error

    class Mmit(BaseModel):
        """Answers one question at a time, as VLMEvalKit asks."""

        INTERLEAVE = True

        def __init__(self, model_path: str, max_new_tokens: int = 512, **_: Any) -> None:
            from mmit.generate import load

            super().__init__()
            self.model, self.max_new_tokens = load(model_path), max_new_tokens

        def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
            from mmit.records import Record

            record = Record(conversation(message), dataset or "VLMEvalKit")
            return self.model.generate([record], max_new_tokens=self.max_new_tokens, temperature=0.0)[0]

    return Mmit


def run(model_path: str, max_new_tokens: int, arguments: Sequence[str]) -> None:
    """Start VLMEvalKit's own command line with the model `mmit`. Raises ConfigError."""
    made = model_class()
    from vlmeval.config import supported_VLM
    from vlmeval.run import main as vlmeval_main

    supported_VLM[NAME] = partial(made, model_path=model_path, max_new_tokens=max_new_tokens)
    sys.argv = ["run.py", "--model", NAME, *arguments]
    vlmeval_main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Export or run; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("export", help="write a task as TSV")
    one.add_argument("task", help="name or YAML of a task")
    one.add_argument("--data-root", default=None)
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("run", help="VLMEvalKit's command line; what follows goes to it")
    two.add_argument("model", help="a run, checkpoint or llava-hf folder")
    two.add_argument("--max-new-tokens", type=int, default=512)
    given, rest = parser.parse_known_args(arguments)
    if rest and given.command == "export":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if given.command == "run":
            run(given.model, given.max_new_tokens, rest)
            return 0
        count = export(load_task(given.task, data_root=given.data_root), given.out)
    except MmitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count:,} questions written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
