"""The file of a model's answers: a line of settings, then one line per question.

Appended while questions are answered, written anew when they are scored. A half line that a killed process left is cut
off; answers of another model, task or setting are refused. Several ranks append to files of their own, which are merged
into the one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.errors import MmitError
from mmit.io import append, drop_half_line, write_atomic
from mmit.records import json_lines

FORMAT = "mmit answers 1"
# What must not have changed between an item and its answer on file.
ASKED = ("prompt", "images", "reference", "group")
TUNED = "answers-tuned.jsonl"  # the file of the tuned model, in a folder of results
NUMBERS = "number_format"  # of the model; low precision may answer otherwise

AnswerRow = dict[str, Any]


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as JSONL."""
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # an answer may hold half of a surrogate pair, which only an escape can keep
        return json.dumps(row)
    return text


def open_answers(
    path: Path, settings: AnswerRow, asked: Mapping[str, AnswerRow], *, overwrite: bool
) -> dict[str, AnswerRow]:
    """Return the usable rows on file by id, and leave a file that ends with a whole line.

    Args:
        settings: the first line, which the file's own must be equal to.
        asked: {id: row without its answer} of the questions asked now.
        overwrite: drop what is on file.

    Raises:
        MmitError: the answers are of another model, task or setting, or the file is damaged.
    """
    rows: dict[str, AnswerRow] = {}
    parts = list(path.parent.glob(f"{path.stem}.rank*.jsonl"))
    if overwrite:
        for part in parts:
            part.unlink()
    elif path.exists():
        drop_half_line(path)
        rows = merge(path, settings, asked) if parts else read_answers(path, settings, asked)
    if not rows:
        write_atomic(path, lines([settings]))
    return rows


def kept_settings(path: Path, settings: AnswerRow) -> AnswerRow:
    """Return the settings without the number format where the file says none, since its answers may have another."""
    found = next(json_lines(path))[1]
    return {key: value for key, value in settings.items() if key != NUMBERS or key in found}


def rank_file(path: Path, rank: int) -> Path:
    """Return the file that one of several ranks appends to."""
    return path.with_name(f"{path.stem}.rank{rank}.jsonl")


def merge(path: Path, settings: AnswerRow, asked: Mapping[str, AnswerRow]) -> dict[str, AnswerRow]:
    """Move the answers of all ranks' files, whole or cut off, into `path`; return all rows on file by id."""
    rows = read_answers(path, settings, asked)
    for part in sorted(path.parent.glob(f"{path.stem}.rank*.jsonl")):
        drop_half_line(part)
        found = read_answers(part, settings, asked) if part.stat().st_size else {}
        new = [row for name, row in found.items() if name not in rows]
        append(path, lines(new))
        rows |= {row["id"]: row for row in new}
        part.unlink()
    return rows


def read_answers(path: Path, settings: AnswerRow, asked: Mapping[str, AnswerRow]) -> dict[str, AnswerRow]:
    """Check every row on file against what is asked now. Raises MmitError for the first that does not fit."""
    rows: dict[str, AnswerRow] = {}
    for place, (line, row) in enumerate(json_lines(path)):
        problem = _row_problem(row, rows, asked) if place else _settings_problem(row, settings)
        if problem:
            remedy = "Give another output folder, or drop these answers with overwrite=True (--overwrite)."
            if problem.partition(": ")[2].startswith(NUMBERS):
                remedy = f"Go on in that format (--dtype {row[NUMBERS]}). {remedy}"
            raise MmitError(problem, where=f"{path}:{line}", remedy=remedy)
        if place:
            rows[row["id"]] = row
    return rows


def scored_answers(path: Path, *, again: str = "Let `mmit eval` finish it") -> dict[str, AnswerRow]:
    """Return the rows of a finished evaluation by id; `again` is what a user does about one that is not.

    Raises:
        MmitError: there is no such file, a line of it is no answer, or it was cut off before it was scored.
    """
    if not path.is_file():
        raise MmitError("there are no answers", where=str(path.parent), remedy=f"{again}.")
    rows: dict[str, AnswerRow] = {}
    for number, row in list(json_lines(path))[1:]:  # the first line is the settings
        if not isinstance(row, dict) or not {"id", "answer", *ASKED} <= row.keys():
            raise MmitError("not an answer", where=f"{path}:{number}", remedy="Run `mmit eval` again.")
        # Scoring writes the file anew as a whole, so one row without a verdict stands for all of them.
        if "correct" not in row:
            remedy = f"{again}: the same command goes on where it stopped."
            raise MmitError("the evaluation was cut off before it was scored", where=str(path), remedy=remedy)
        rows[row["id"]] = row
    return rows


def _settings_problem(found: Any, settings: AnswerRow) -> str:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return "not a file of answers of this version of mmit"
    changed = [key for key in settings if found.get(key) != settings[key]]
    if NUMBERS not in found and NUMBERS in changed:
        changed.remove(NUMBERS)  # an earlier version did not write it
    if not changed:
        return ""
    listed = "; ".join(f"{key} was {found.get(key)!r}, is now {settings[key]!r}" for key in changed)
    return f"the answers on file were made with another model or other settings: {listed}"


def _row_problem(row: Any, rows: Mapping[str, AnswerRow], asked: Mapping[str, AnswerRow]) -> str:
    if not isinstance(row, dict) or not {"id", *ASKED, "answer"} <= row.keys():
        return "not an answer, so the file is damaged"
    name = row["id"]
    if name in rows:
        return f"question '{name}' is answered twice: two evaluations wrote this file at once"
    now = asked.get(name, row)
    changed = [key for key in ASKED if row[key] != now[key]]
    if changed:
        return f"question '{name}' was another when it was answered: {', '.join(changed)} changed"
    return ""
