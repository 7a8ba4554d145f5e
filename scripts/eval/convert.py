"""Answers in the form that a benchmark's server or own scorer takes.

In: answers-tuned.jsonl of `mmit eval`, or a LLaVA answer file (scripts/eval/answer.py writes one); MME and MMBench need
the former, which holds right answers and options too. Out: one file (for MME a folder). No answer is left out or
fixed; VQAv2 and VizWiz get the normalised words that their servers expect.

python scripts/eval/convert.py vqav2 RUN/eval/vqav2/answers-tuned.jsonl vqav2_submission.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, MmitError, RecordError, nearest
from mmit.eval.metrics.vqa import normalise
from mmit.records import json_lines

Rows = Sequence[dict[str, Any]]


OWN = {"id", "prompt", "images", "reference", "answer"}  # keys of a line of `mmit eval`
LLAVA = {"question_id", "text"}  # of a LLaVA answer file


def read(path: str) -> Rows:
    """Return the answered questions of a file, each with `where` it stands. Raises MmitError naming file and line."""
    found = []
    for count, (number, row) in enumerate(json_lines(path)):
        where = f"{path}:{number}"
        if isinstance(row, RecordError):
            raise row
        if count == 0 and isinstance(row, dict) and {"format", "task"} <= row.keys():
            continue  # the settings that `mmit eval` begins with
        if isinstance(row, dict) and OWN <= row.keys():
            found.append({**row, "where": where})
        elif isinstance(row, dict) and LLAVA <= row.keys():
            own = {"id": row["question_id"], "prompt": row.get("prompt", ""), "answer": row["text"]}
            image = (row.get("metadata") or {}).get("image")
            found.append({**own, "images": [image] if image else [], "reference": None, "where": where})
        else:
            remedy = f"A line has {', '.join(sorted(OWN))}; or, as LLaVA writes it, {', '.join(sorted(LLAVA))}."
            raise MmitError("not an answer", where=where, remedy=remedy)
    if not found:
        raise MmitError("no answers", where=path, remedy="Give answers-tuned.jsonl or a LLaVA answer file.")
    return found


def _each(rows: Rows, convert: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Convert every row. Raises MmitError naming the line that has not what the format needs."""
    made = []
    for row in rows:
        try:
            made.append(convert(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            problem = f"not an answer of this benchmark: {type(error).__name__} {error}"
            remedy = "Check the format's name. MME and MMBench need answers-tuned.jsonl of `mmit eval`."
            raise MmitError(problem, where=row["where"], remedy=remedy) from error
    return made


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def _jsonl(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def vqav2(rows: Rows, out: Path) -> None:
    """[{"question_id": int, "answer": words}] for the EvalAI server."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        return {"question_id": int(row["id"]), "answer": normalise(row["answer"], profile="evalai")}

    _write(out, _each(rows, one))


def vizwiz(rows: Rows, out: Path) -> None:
    """[{"image": file name, "answer": words}] for the EvalAI server."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        # mmit's ids are the file names; LLaVA's are numbers, and its pictures are in the metadata.
        name = Path(row["images"][0]).name if row["images"] else str(row["id"])
        if not Path(name).suffix:
            raise ValueError(f"'{name}' is no picture's name")
        return {"image": name, "answer": normalise(row["answer"], profile="evalai")}

    _write(out, _each(rows, one))


def gqa(rows: Rows, out: Path) -> None:
    """[{"questionId": id, "prediction": text}] for GQA's eval.py."""
    said = _each(rows, lambda row: {"questionId": row["id"], "prediction": row["answer"].rstrip(".").lower()})
    _write(out, said)


def mmvet(rows: Rows, out: Path) -> None:
    """{"v1_0": text, ...} for MM-Vet's grader."""

    def one(row: dict[str, Any]) -> tuple[str, str]:
        name = str(row["id"])
        return (name if name.startswith("v1_") else f"v1_{int(name)}"), row["answer"]

    _write(out, dict(_each(rows, one)))


def seedbench(rows: Rows, out: Path) -> None:
    """{"question_id", "prediction"} a line for SEED-Bench's leaderboard."""
    _write(out, _jsonl(_each(rows, lambda row: {"question_id": row["id"], "prediction": row["answer"]})))


def llava(rows: Rows, out: Path) -> None:
    """LLaVA's answer file, which its own scripts score."""
    keys = {"answer_id": "", "model_id": "mmit", "metadata": {}}
    said = [{"question_id": row["id"], "prompt": row["prompt"], "text": row["answer"], **keys} for row in rows]
    _write(out, _jsonl(said))


def mme(rows: Rows, out: Path) -> None:
    """A folder with <category>.txt, lines of picture, question, right answer and answer, for MME's eval_tool."""

    def one(row: dict[str, Any]) -> tuple[str, str]:
        question = row["prompt"].split("\n")[0] + " Please answer yes or no."
        cells = [Path(row["images"][0]).name, question, row["reference"]["answer"], row["answer"]]
        # A tab or a line break in an answer would be read as a new cell or line.
        return row["reference"]["category"], "\t".join(" ".join(cell.split()) for cell in cells)

    lines: dict[str, list[str]] = {}
    for category, line in _each(rows, one):
        lines.setdefault(category, []).append(line)
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

    def one(row: dict[str, Any]) -> list[Any]:
        options, reference = row["reference"]["options"], row["reference"]
        question = row["prompt"].split(" There are several options:")[0]
        cells = [reference["index"], question, *(options.get(letter, "") for letter in "ABCD")]
        return [*cells, row["answer"], reference.get("category", "")]

    for cells in _each(rows, one):
        sheet.append(cells)
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
    parser.add_argument("answers", help="answers-tuned.jsonl of `mmit eval`, or a LLaVA answer file")
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
