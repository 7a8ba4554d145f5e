"""What teachers write, taken apart: conversations with tags, numbered lists, instances of a task, tasks in one call.

In: a reply or its text. Out: its pieces, each with the reason it cannot be used or "". A parser is strict: a text that
is not in the form asked for has a reason, one of few, and is never repaired.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmit.build.replies import finish_problem, same_words, text_problem

if TYPE_CHECKING:
    from mmit.teachers import Reply

COLON = "[:\uff1a]"  # also the wide one of Chinese and Japanese texts
_ITEM = re.compile(rf"(?m)^\s*(?:Task\s*)?(\d+)\s*(?:[.)]|{COLON})\s*")
_SIDE = re.compile(rf"(?m)^\s*(Input|Output|Class label)\s*{COLON}[ \t]*", re.IGNORECASE)
_FIELD = re.compile(rf"(?m)^\s*(\d+)\s*\.\s*(Instruction|Input|Output)\s*{COLON}[ \t]*", re.IGNORECASE)
_NO_INPUT = re.compile(r"(?i)<?(?:no ?input|none|n/a)>?\.?")


@dataclass(frozen=True)
class Tags:
    """How the turns of a written conversation begin: two tags at the start of a line, and any tag anywhere."""

    first: str
    second: str
    line: re.Pattern[str]
    anywhere: re.Pattern[str]


# Baize writes [|Human|] and [|AI|].
SPEAKERS = Tags(
    "Human",
    "AI",
    re.compile(rf"(?m)^[ \t]*\[\|?(Human|AI)\|?\][ \t]*{COLON}?[ \t]*"),
    re.compile(r"\[\|?(?:human|ai|user|assistant)\|?\]", re.IGNORECASE),
)
PAIRS = Tags(
    "Question",
    "Answer",
    re.compile(rf"(?m)^[ \t]*\**(Question|Answer)\**[ \t]*{COLON}\**[ \t]*"),
    re.compile(rf"\b(?:question|answer)\s*\d*\s*{COLON}", re.IGNORECASE),
)


def alternating(reply: Reply, tags: Tags) -> tuple[list[str], str]:
    """Return the texts of a conversation, the first side's first, or [] and the reason it cannot be used."""
    if reason := finish_problem(reply):
        return [], reason
    pieces = tags.line.split(reply.text.strip())
    if not reply.text.strip():
        return [], "empty"
    if len(pieces) < 3:
        return [], "no tags of the speakers"
    if pieces[0].strip():
        return [], "text before the first tag"
    found, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
    if found[0] != tags.first:
        return [], "the wrong side speaks first"
    if any(before == after for before, after in zip(found, found[1:], strict=False)):
        return [], "one side speaks twice in a row"
    if found[-1] == tags.first:
        return [], "the last turn has no answer"
    for text in texts:
        if tags.anywhere.search(text):
            return [], "a tag inside a turn"
        if reason := text_problem(text):
            return [], "an empty turn" if reason == "empty" else reason
    return texts, ""


def numbered(reply: Reply) -> list[tuple[str, str]]:
    """Return the items of a numbered list as (text, reason it cannot be used or "")."""
    if reply.finish not in ("stop", "length"):
        return [(reply.text, finish_problem(reply))]
    pieces = _ITEM.split(reply.text)
    if len(pieces) < 3:
        return [(reply.text, finish_problem(reply) or ("" if reply.text.strip() else "empty") or "no numbered list")]
    items: list[tuple[str, str]] = []
    last = 0
    for number, text in zip(pieces[1::2], pieces[2::2], strict=True):
        value = int(number[:9])
        reason = "" if value > last else "the list's numbers repeat"
        items.append((text.strip(), reason or ("" if text.strip() else "empty")))
        last = max(last, value)
    if reply.finish == "length":
        items[-1] = (items[-1][0], finish_problem(reply))
    return items


def instances(text: str, *, classification: bool) -> list[tuple[str, str, str]]:
    """Return (input, output, reason it cannot be used or "") for the instances in a teacher's text."""
    pieces = _SIDE.split(text)
    found: list[tuple[str, str, str]] = []
    given = label = None
    for side, body in zip(pieces[1::2], pieces[2::2], strict=True):
        side, body = side.lower(), body.strip()
        if side == "class label":
            if label is not None:
                found.append(("", label, "a class label without an input"))
            label = body
        elif side == "input":
            if classification and label is not None:
                found.append((body, label, _instance_problem(body, label)))
                label = None
            else:
                if given is not None:
                    found.append((given, "", "an input without an output"))
                given = _input(body)
        else:
            found.append((given or "", body, _instance_problem(given or "", body)))
            given = None
    if label is not None:
        found.append(("", label, "a class label without an input"))
    if given is not None:
        found.append((given, "", "an input without an output"))
    return found


@dataclass(frozen=True)
class Written:
    """A task written in one call; `reason` says why it cannot be used, "" if it can."""

    instruction: str
    input: str
    output: str
    reason: str


def tasks(reply: Reply) -> list[Written]:
    """Return the tasks of a list "1. Instruction: ... 1. Input: ... 1. Output: ...", as Alpaca asks for it."""
    if reply.finish not in ("stop", "length"):
        return [Written(reply.text, "", "", finish_problem(reply))]
    blocks = [block for block in re.split(r"(?m)^\s*#{3,}\s*$", reply.text) if block.strip()]
    made = [_task(block) for block in blocks]
    if not made:
        return [Written("", "", "", finish_problem(reply) or "empty")]
    if reply.finish == "length":
        last = made[-1]
        made[-1] = Written(last.instruction, last.input, last.output, finish_problem(reply))
    return list(_unlike_before(made, blocks))


def _unlike_before(made: list[Written], blocks: list[str]) -> Iterator[Written]:
    last = 0
    for one, block in zip(made, blocks, strict=True):
        number = _FIELD.search(block)
        value = int(number[1][:9]) if number else last
        repeated = not one.reason and value <= last
        yield Written(one.instruction, one.input, one.output, "the list's numbers repeat") if repeated else one
        last = max(last, value)


def _task(block: str) -> Written:
    pieces = _FIELD.split(block)
    numbers, sides, bodies = pieces[1::3], [side.lower() for side in pieces[2::3]], pieces[3::3]
    bodies = [body.strip() for body in bodies]
    if not sides:
        return Written(block.strip(), "", "", "no instruction, input and output")
    if sides != ["instruction", "input", "output"] or pieces[0].strip():
        return Written(bodies[0], "", "", "not one instruction, one input and one output")
    if len(set(numbers)) > 1:
        return Written(bodies[0], "", "", "the parts of a task have different numbers")
    given, output = _input(bodies[1]), bodies[2]
    return Written(bodies[0], given, output, _instance_problem(given, output) if bodies[0] else "empty")


def _input(body: str) -> str:
    return "" if _NO_INPUT.fullmatch(body) else body


def _instance_problem(given: str, output: str) -> str:
    if not output:
        return "empty"
    if given and same_words(given, output):
        return "input and output are the same"
    return "the output ends with a colon" if output.endswith((":", "\uff1a")) else ""
