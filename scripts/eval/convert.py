"""Answers of `mmit eval` in the form that a benchmark's server or own scorer takes.

In: answers-tuned.jsonl. Out: one file (for MME a folder). No answer is left out or mended; VQAv2 and VizWiz get the
normalised words that their servers expect.

python scripts/eval/convert.py vqav2 RUN/eval/vqav2/answers-tuned.jsonl vqav2_submission.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, MmitError, nearest
from mmit.eval.metrics.vqa import normalise
from mmit.records import json_lines

Rows = Sequence[dict[str, Any]]


def read(path: str) -> Rows:
    """Return the answered questions of a file. Raises MmitError."""
    rows = [row for _, row in json_lines(path)][1:]
    for number, row in enumerate(rows, 2):
        if not isinstance(row, dict) or not {"id", "prompt", "images", "reference", "answer"} <= row.keys():
            raise MmitError("not an answer of `mmit eval`", where=f"{path}:{number}", remedy="Evaluate again.")
    return rows


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def _jsonl(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def vqav2(rows: Rows, out: Path) -> None:
    """[{"question_id": int, "answer": words}] for the EvalAI server."""
    said = [{"question_id": int(row["id"]), "answer": normalise(row["answer"], profile="evalai")} for row in rows]
    _write(out, said)


def vizwiz(rows: Rows, out: Path) -> None:
    """[{"image": file name, "answer": words}] for the EvalAI server."""
    _write(out, [{"image": row["id"], "answer": normalise(row["answer"], profile="evalai")} for row in rows])


def gqa(rows: Rows, out: Path) -> None:
    """[{"questionId": id, "prediction": text}] for GQA's eval.py."""
    _write(out, [{"questionId": row["id"], "prediction": row["answer"].rstrip(".").lower()} for row in rows])


def mmvet(rows: Rows, out: Path) -> None:
    """{"v1_0": text, ...} for MM-Vet's grader."""
    _write(out, {row["id"]: row["answer"] for row in rows})


def seedbench(rows: Rows, out: Path) -> None:
    """{"question_id", "prediction"} a line for SEED-Bench's leaderboard."""
    _write(out, _jsonl([{"question_id": row["id"], "prediction": row["answer"]} for row in rows]))


def llava(rows: Rows, out: Path) -> None:
    """LLaVA's answer file, which its own scripts score."""
    keys = {"answer_id": "", "model_id": "mmit", "metadata": {}}
    said = [{"question_id": row["id"], "prompt": row["prompt"], "text": row["answer"], **keys} for row in rows]
    _write(out, _jsonl(said))


def mme(rows: Rows, out: Path) -> None:
    """A folder with <category>.txt, lines of picture, question, right answer and answer, for MME's eval_tool."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        question = row["prompt"].split("\n")[0] + " Please answer yes or no."
        cells = [Path(row["images"][0]).name, question, row["reference"]["answer"], row["answer"]]
        # A tab or a line break in an answer would be read as a new cell or line.
        lines.setdefault(row["reference"]["category"], []).append("\t".join(" ".join(cell.split()) for cell in cells))
    for category, found in lines.items():
        _write(out / f"{category}.txt", "\n".join(found) + "\n")


def mmbench(rows: Rows, out: Path) -> None:
    """An Excel sheet with index, answer, prediction, category and options for MMBench's server; needs openpyxl."""
    try:
        import openpyxl
    except ImportError as error:
        raise ConfigError("writing .xlsx needs openpyxl", where=str(out), remedy="pip install openpyxl") from error
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["index", "question", "A", "B", "C", "D", "prediction", "category"])
    for row in rows:
        options, reference = row["reference"]["options"], row["reference"]
        question = row["prompt"].split(" There are several options:")[0]
        cells = [reference["index"], question, *(options.get(letter, "") for letter in "ABCD")]
        sheet.append([*cells, row["answer"], reference.get("category", "")])
    out.parent.mkdir(parents=True, exist_ok=True)
    book.save(out)


FORMATS: dict[str, Callable[[Rows, Path], None]] = {
    "vqav2": vqav2,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "mmvet": mmvet,
    "seedbench": seedbench,
    "mme": mme,
    "mmbench": mmbench,
    "llava": llava,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", help=", ".join(FORMATS))
    parser.add_argument("answers", help="answers-tuned.jsonl of `mmit eval`")
    parser.add_argument("out", type=Path, help="file, for mme a folder")
    given = parser.parse_args(arguments)
    try:
        if given.format not in FORMATS:
            problem = f"unknown format '{given.format}'"
            raise ConfigError(problem, where="format", remedy=nearest(given.format, FORMATS))
        rows = read(given.answers)
        FORMATS[given.format](rows, given.out)
    except MmitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows):,} answers written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
