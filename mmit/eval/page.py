"""Reports as one HTML file: tables, prompts, and the worst answers beside their pictures.

In: a report, the rows of its table, its file of answers and its questions. Out: HTML that needs nothing beside it:
pictures are small and inside. Everything that comes from data or models is escaped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from mmit.data.images import load_rgb
from mmit.errors import ImageError
from mmit.pages import inline_image, pre, table
from mmit.records import Image, Text, json_lines
from mmit.text import escape

if TYPE_CHECKING:
    from mmit.eval.questions import Item

EXAMPLES = 12
MISTAKES = 8  # lines of the table of frequent mistakes
SIDE = 220  # pixels of a picture's longer side


def section(
    report: Mapping[str, Any],
    cells: Sequence[Sequence[str]],
    answers: Path,
    *,
    items: Sequence[Item],
    caption: Sequence[str] = (),
    number: Callable[[float], str] = "{:.4g}".format,
    n: int = EXAMPLES,
) -> str:
    """Return one task's part of a page.

    Args:
        report: the content of report.json.
        cells: the rows of its table, the first being the header.
        answers: the file of the tuned model's answers.
        items: the questions asked.
        caption: lines under the table.
        number: how a score is written.
        n: how many of the worst answers are shown.
    """
    shown = {item.id: item for item in items}
    rows = [row for _, row in json_lines(answers)][1:]
    worst, note = worst_answers(rows, shown, n=n)
    parts = [f'<section id="{escape(report["task"])}"><h2>{escape(report["task"])}</h2>', table(cells)]
    parts += [f'<p class="small">{escape(line)}</p>' for line in caption]
    parts.append(f"<details open><summary>First question as asked</summary>{pre(report['first_question'])}</details>")
    spread = report.get("wordings")
    if spread:
        each = [(one["prompt"], number(one["accuracy"]), f"{one['n']:,}") for one in spread["each"]]
        parts += ["<h3>Wordings</h3>", table([("prompt", "score", "questions"), *each])]
    parts += [_numbers(name, content) for name, content in report["details"].items()]
    frequent = mistakes([row for row in rows if isinstance(row, dict) and row.get("id") in shown])
    if frequent:
        parts += ["<h3>Frequent mistakes</h3>", table([("reference", "read as", "answers"), *frequent], kind="words")]
    parts.append(f"<h3>{escape(note)}</h3>")
    parts += [_example(row, shown[row["id"]]) for row in worst]
    settings = json.dumps(report["task_config"], indent=2, ensure_ascii=False)
    parts.append(f"<details><summary>The task's settings</summary>{pre(settings)}</details></section>")
    return "\n".join(parts)


def worst_answers(rows: Sequence[Any], shown: Mapping[str, Item], *, n: int) -> tuple[list[dict[str, Any]], str]:
    """Return up to n answers of the lowest verdict, each type of question in turn, and a heading for them."""
    asked = [row for row in rows if isinstance(row, dict) and row.get("id") in shown]
    judged = [row for row in asked if row.get("correct") is not None]
    if not judged:
        return asked[:n], "Some answers (the metric has no verdict on single ones)"
    wrong = sorted((row for row in judged if float(row["correct"]) < 1), key=lambda row: float(row["correct"]))
    if not wrong:
        return [], "No answer is wrong"
    by_group: dict[Any, list[dict[str, Any]]] = {}
    for row in wrong:
        by_group.setdefault(row["group"], []).append(row)
    turns = [(place, row) for group in by_group.values() for place, row in enumerate(group)]
    picked = [row for _, row in sorted(turns, key=lambda turn: turn[0])][:n]
    heading = f"{len(picked)} of the {len(wrong):,} answers that are wrong or partly so"
    return sorted(picked, key=lambda row: float(row["correct"])), heading


def mistakes(rows: Sequence[Mapping[str, Any]], *, n: int = MISTAKES) -> list[tuple[str, str, str]]:
    """Return (reference, what was read, how often) of the most frequent wrong answers; [] where none repeats."""
    wrong = [row for row in rows if row.get("correct") is False and isinstance(row["reference"], str)]
    pairs = Counter((row["reference"], str(row.get("parsed") or row["answer"] or "(empty)")) for row in wrong)
    if not pairs or pairs.most_common(1)[0][1] == 1:
        return []
    return [(gold, said, f"{count:,}") for (gold, said), count in pairs.most_common(n)]


def _numbers(name: str, content: Any) -> str:
    """Return a detail that is a mapping of numbers, or of mappings of numbers, as a table; "" for any other."""
    if not isinstance(content, Mapping) or not content:
        return ""
    lines = {key: value if isinstance(value, Mapping) else {"": value} for key, value in content.items()}
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    if not all(isinstance(value, (int, float)) for line in lines.values() for value in line.values()):
        return ""
    cells = [
        (key, *(f"{line[column]:.4g}" if column in line else "" for column in columns)) for key, line in lines.items()
    ]
    head = (name.replace("_", " "), *(column.replace("_", " ") for column in columns))
    return f"<details><summary>{escape(head[0])}</summary>{table([head, *cells])}</details>"


def words_of(item: Item) -> str:
    """Return what is asked, with a mark where a picture stands between words."""
    parts = [part for turn in item.prompt.turns for part in turn.parts]
    first = next((place for place, part in enumerate(parts) if isinstance(part, Text)), len(parts))
    number = sum(isinstance(part, Image) for part in parts[:first])
    if not any(isinstance(part, Image) for part in parts[first:]):
        return item.text
    words = []
    for part in parts[first:]:
        number += isinstance(part, Image)
        words.append(f"[picture {number}]" if isinstance(part, Image) else part.text)
    return "".join(words)


def _example(row: Mapping[str, Any], item: Item) -> str:
    verdict = row.get("correct")
    mark = "good" if verdict is True else "bad" if verdict is not None else ""
    entries = [("asked", words_of(item)), ("answer", row["answer"] or "(empty)")]
    if row.get("parsed") not in (None, row["answer"]):
        entries.append(("read as", str(row["parsed"])))
    entries.append(("reference", _plain(row["reference"])))
    if isinstance(verdict, float) and verdict not in (0, 1):
        entries.append(("credit", f"{verdict:.2f}"))
    listed = "".join(
        f"<dt>{name}</dt><dd{' class=' + mark if name == 'answer' and mark else ''}>{pre(text)}</dd>"
        for name, text in entries
    )
    name = escape(" ".join(filter(None, [row["id"], row.get("group")])))
    pictures = "".join(_picture(image) for image in item.prompt.images)
    left = f'<div class="pictures">{pictures}<div class="small name">{name}</div></div>'
    return f'<div class="example">{left}<dl>{listed}</dl></div>'


def _plain(reference: Any) -> str:
    if isinstance(reference, str):
        return reference
    if isinstance(reference, list) and all(isinstance(one, str) for one in reference):
        return " | ".join(dict.fromkeys(reference))
    return json.dumps(reference, ensure_ascii=False)


def _picture(image: Image) -> str:
    try:
        picture = load_rgb(image)
    except ImageError as error:
        return f'<p class="small">{escape(error.problem)}</p>'
    scale = SIDE / max(picture.size)
    if scale >= 2:  # a picture of few pixels is enlarged without blurring them
        picture = picture.resize([side * int(scale) for side in picture.size], PIL.Image.Resampling.NEAREST)
    else:
        picture.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    return inline_image(picture)
