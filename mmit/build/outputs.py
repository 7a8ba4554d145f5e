"""Outputs by teachers for instructions that are there already (InstructWild, arXiv:2306.16636 and its kind).

In: instructions, with images or without. Out: one record for each instruction and teacher asked, or the reason why
there is none. The outputs of different teachers are different tasks, so that their files stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmit.build.annotated import Dropped, Made
from mmit.build.licences import combined
from mmit.build.replies import answer_turn, problem
from mmit.build.replies import asked as asked_by
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Record, Text, Turn, read_jsonl
from mmit.teachers import Desk, Draw, Reply, Request
from mmit.teachers.request import user


@dataclass(frozen=True)
class Instruction:
    """What is asked, and where it comes from."""

    id: str
    turns: tuple[Turn, ...]
    source: str
    row: int | None
    licence: str | None


def from_rows(
    rows: Iterable[tuple[int, dict[str, Any] | RecordError]],
    fields: Mapping[str, Any],
    *,
    source: str,
    licence: str | None,
) -> Iterator[Instruction | Dropped]:
    """Yield the instructions of rows, and why a row is none.

    Args:
        rows: (number from 1, row or what is wrong with it).
        fields: names of the fields `instruction`, `input` and `images`.
        source: of the rows. licence: of rows that state none.

    Raises:
        ConfigError: the first row lacks a field.
    """
    names = {"instruction": "instruction", "input": "input"} | dict(fields)
    known = False
    for number, row in rows:
        place = f"{source}:{number}"
        if isinstance(row, RecordError):
            yield Dropped("outputs", place, "", "the row cannot be read", row.problem)
            continue
        if not known and names["instruction"] not in row:
            problem_ = f"the rows have no field '{names['instruction']}'"
            raise ConfigError(problem_, where="fields.instruction", remedy=nearest(names["instruction"], map(str, row)))
        known = True
        asked, more = row.get(names["instruction"]), row.get(names["input"])
        if not isinstance(asked, str) or not asked.strip():
            yield Dropped("outputs", place, "", "the instruction is no text", repr(asked)[:200])
            continue
        images = [part for part in row.values() if isinstance(part, Image)]
        text = f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked
        own = row.get("licence") if isinstance(row.get("licence"), str) else licence
        yield Instruction(str(row.get("id", number)), user(*images, text), source, number, own)


def from_records(path: str) -> Iterator[Instruction | Dropped]:
    """Yield the first questions of mmit records, their own answers left out."""
    bad: list[RecordError] = []
    for record in read_jsonl(path, on_bad=bad.append):
        turns = []
        for turn in record.turns:
            if turn.role not in ("system", "user"):
                break
            turns.append(turn)
        yield Instruction(record.id or str(record.row), tuple(turns), record.source, record.row, record.licence)
    for error in bad:
        yield Dropped("outputs", error.where, "", "the row cannot be read", error.problem)


def requests(items: Iterable[Instruction], draw: Draw, *, seed: int, system: str = "") -> list[Request]:
    """Return one request per instruction.

    Args:
        items: the instructions. draw: how the teacher's tokens are drawn.
        seed: of all draws. system: text in front of instructions that have none.
    """
    asked = []
    for item in items:
        turns = item.turns
        if system and turns[0].role != "system":
            turns = (Turn("system", (Text(system),)), *turns)
        asked.append(Request(turns, replace(draw, seed=seed), "outputs"))
    return asked


def outputs(
    items: Iterable[Instruction | Dropped],
    desk: Desk,
    draw: Draw,
    *,
    seed: int = 0,
    system: str = "",
    all_teachers: bool = True,
) -> Iterator[Made | Dropped]:
    """Yield a record for each instruction, from every teacher or from the one whose turn it is.

    Args:
        items: instructions; what was dropped before is passed on.
        draw, seed: how a teacher writes; each instruction has a seed of its own.
        system: a turn before every instruction, "" for none.

    Raises BudgetError and MmitError as `Desk.ask` does.
    """
    usable = []
    for item in items:
        if isinstance(item, Dropped):
            yield item
        else:
            usable.append(item)
    asked = requests(usable, draw, seed=seed, system=system)
    if not all_teachers:
        replies = desk.ask(asked)
        yield from _made(usable, asked, replies, desk)
        return
    for teacher in desk.teachers:
        yield from _made(usable, asked, desk.ask(asked, teacher=teacher), desk)


def _made(items: list[Instruction], asked: list[Request], replies: list[Reply], desk: Desk) -> Iterator[Made | Dropped]:
    terms = {teacher.name: teacher.terms for teacher in desk.teachers}
    for item, request, reply in zip(items, asked, replies, strict=True):
        task = f"outputs-{reply.teacher}"
        if reason := problem(reply, item.turns[-1].text):
            yield Dropped(task, f"{item.source}:{item.row}", reply.id, reason, reply.text[:500])
            continue
        seed = request.draw.seed
        build = asked_by("outputs", request, [reply], template="as given", parents=[item.id], seed=seed)
        record = Record(
            (*item.turns, answer_turn(reply, thought=desk.keep_thoughts)),
            id=f"{item.id}/{reply.teacher}",
            source=item.source,
            row=item.row,
            licence=combined([item.licence, terms[reply.teacher]]),
            meta={"task": task, "build": build},
        )
        yield Made(task, record, False)
