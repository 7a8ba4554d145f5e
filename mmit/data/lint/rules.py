"""The linter's rules: their names, severities and remedies, and those that look at one record alone.

RULES lists every rule; RECORD_RULES holds the function of each rule that needs only the record. Rules that compare
records are in mmit/data/lint/linter.py, those that open pictures in mmit/data/lint/images.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mmit.data.formats.boxes import NAME, PLACE, spelt_box
from mmit.data.formats.pictures import foreign_marker
from mmit.data.formats.thoughts import COMMON
from mmit.errors import ImageError, RecordError
from mmit.records import Image, Record, Text, Turn, short

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule finds, how bad that is, and what to do about it."""

    severity: Severity
    about: str
    remedy: str


RULES: dict[str, Rule] = {
    # What training refuses.
    "bad-row": Rule("error", "a row that is no record", "Fix or remove the row."),
    "alternation": Rule("error", "speakers that do not alternate", "Merge neighbouring turns, or add the missing one."),
    "empty-turn": Rule("error", "an empty question or answer", "Fill it in, or leave the record out."),
    "no-answer": Rule("error", "no answer to learn", "Add the assistant's turn, or leave the record out."),
    "image-slots": Rule("error", "image markers and images that differ in number", "Write one marker per image."),
    "foreign-marker": Rule(
        "error",
        "another model family's mark for a picture, as text",
        "Give the row its pictures in images; rows with <img>path</img> are of the format qwen_vl.",
    ),
    "box-marker": Rule(
        "error", "a place for a box, and no box beside the text", "Give the row its boxes in objects, or cut the mark."
    ),
    "too-long": Rule("error", "longer than the context", "Raise data.max_length, or shorten the record."),
    "not-encodable": Rule("error", "cannot be written by the chat format and tokenizer", "See the reason of each."),
    "not-the-template": Rule(
        "error", "not written as the chat template writes it", "Report it with the template: mmit is at fault."
    ),
    "missing-image": Rule("error", "an image file that is not there", "Fetch it, or correct image_root."),
    "unreadable-image": Rule("error", "an image that cannot be decoded", "Fetch it again, or leave the record out."),
    # What spoils an evaluation.
    "test-record": Rule("error", "a record of the test data", "Take it out of the training data."),
    "test-image": Rule("error", "an image of the test data", "Take it out, or split the data by image."),
    "test-record-near": Rule("warning", "nearly a record of the test data", "Look at both, and take one out."),
    "test-image-near": Rule("warning", "looks like an image of the test data", "Look at both, and take one out."),
    # What is seldom meant.
    "box-text": Rule(
        "warning",
        "a box as text, in another model family's marks",
        "Name how boxes are written with the option boxes (norm1000, qwen2_vl, ...), which then reads them as well.",
    ),
    "control-text": Rule(
        "warning", "a model's control string as text", "mmit reads it as text; remove it if it was meant to control."
    ),
    "image-marker": Rule(
        "warning", "a literal <image>, <video> or <audio> in the text", "Make it an image part if a picture was meant."
    ),
    "repeats-prompt": Rule("warning", "an answer that repeats its prompt", "Cut the prompt off the answer."),
    "repeated-pair": Rule("warning", "a question asked and answered twice in a record", "Remove one of them."),
    "duplicate-record": Rule("warning", "the same record again", "Remove the copies."),
    "near-duplicate-record": Rule("warning", "nearly the same record again", "Look at some; remove what adds nothing."),
    "image-mismatch": Rule("warning", "an image that is not what its name or row says", "Correct name, size or file."),
    "licence-mix": Rule("warning", "records under different licences", "Check that they may be used together."),
    # What is worth a look.
    "duplicate-answer": Rule("info", "a long answer given to another prompt", "Look for refusals and boilerplate."),
    "thought-mark": Rule(
        "warning",
        "an answer that opens with another model's mark of a thought, as text",
        "Import it with --option thoughts='OPENING...CLOSING', if it is a thought.",
    ),
    "role-marker": Rule("info", "a speaker's name as in a chat log", "Check that turns were cut apart."),
    "duplicate-image": Rule("info", "the same image under another name", "Use one file, so that it is read once."),
    "near-duplicate-image": Rule("info", "looks like another image", "Look at some; remove what adds nothing."),
    "script-outlier": Rule("info", "a script that few records are written in", "Check that it belongs here."),
    "length-outlier": Rule("info", "far shorter or longer than the others", "Look at it."),
}

# How the reasons of RecordErrors are worded -> the rule they belong to; anything else is a bad row.
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^turn \d+ \(\w+\) is empty$"), "empty-turn"),
    (re.compile(r"where the \w+'s belongs$|is a system turn$|^turn \d+ has role '"), "alternation"),
    (re.compile(r"no answer to learn$|has no user turn$"), "no-answer"),
    (re.compile(r"has (?:\d+ )?<image>|\(\w+\) has an image$"), "image-slots"),
    (re.compile(r"image files? (?:is|are) missing"), "missing-image"),
)


def rule_of(error: RecordError) -> str:
    """Return the rule that a row which is no record falls under."""
    # Known limit: by the words of the error, since a RecordError has no code; the tests of the linter meet each of
    # them.
    for pattern, rule in _REASONS:
        if pattern.search(error.problem):
            return rule
    return "unreadable-image" if isinstance(error, ImageError) else "bad-row"


# --- one record ---------------------------------------------------------------------------------------------------

# Written alike by many tokenizers; those of the tokenizer at hand come on top.
_CONTROL = (
    r"<\|[A-Za-z0-9_ ]{1,32}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|"
    r"<｜[^｜\n]{1,32}｜>|</?tool_response>"
)
_ROLE_MARKER = re.compile(
    r"^(?:### ?(?:Instruction|Response|Input|Human|Assistant)|"
    r"USER|ASSISTANT|Human|Assistant|\[?\|(?:Human|AI)\|\]?) ?:|"
    r"\[(?:USER|ASSISTANT)\]",  # PixMo's, anywhere in a line
    re.MULTILINE,
)
_LEAST_PROMPT = 16  # characters; "Hello." may well be answered with "Hello."

Check = Callable[[Record], str]


def control_check(tokens: Iterable[str] = ()) -> Check:
    """Return the check for literal control strings: the common ones, and the `tokens` of a tokenizer."""
    own = sorted({t for t in tokens if len(t) > 2 and not t.isspace() and t != "<image>"}, key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, own), _CONTROL]))

    def check(record: Record) -> str:
        found = {match for turn in record.turns for match in pattern.findall(_letters(turn))}
        return ", ".join(short(name, 40) for name in sorted(found)[:5])

    return check


def _letters(turn: Turn) -> str:
    """The text of a turn without its control tokens."""
    return "".join(part.text for part in turn.parts if isinstance(part, Text) and not part.token)


def image_marker(record: Record) -> str:
    """A literal <image>, <video> or <audio>, which stays text."""
    for number, turn in enumerate(record.turns, 1):
        for marker in ("<image>", "<video>", "<audio>"):
            if marker in turn.text:
                return f"{'' if marker == '<image>' else marker + ' '}in turn {number} ({turn.role})"
    return ""


def foreign_mark(record: Record) -> str:
    """A picture's mark of another model family, which would be learnt as letters."""
    for number, turn in enumerate(record.turns, 1):
        if "<" in turn.text and (marker := foreign_marker(turn.text)):
            return f"{short(marker, 60)} in turn {number} ({turn.role})"
    return ""


def box_marker(record: Record) -> str:
    """A place for a box or its name, which would be learnt as letters."""
    for number, turn in enumerate(record.turns, 1):
        for marker in (PLACE, NAME):
            if marker in turn.text or marker in (turn.thinking or ""):
                return f"{marker} in turn {number} ({turn.role})"
    return ""


def box_text(record: Record) -> str:
    """A box in a model family's marks that no option asked to be read, so that its marks are letters."""
    return short(spelt_box(record), 60)


def thought_mark(record: Record) -> str:
    """The mark of a thought that no option named, which would be learnt as the beginning of the answer."""
    for number, turn in enumerate(record.turns, 1):
        if turn.role == "assistant" and (match := COMMON.match(turn.text)):
            return f"{match[1]} in turn {number} (assistant)"
    return ""


def role_marker(record: Record) -> str:
    """A line that begins like a turn of a chat log."""
    for number, turn in enumerate(record.turns, 1):
        if (":" in turn.text or "[" in turn.text) and (match := _ROLE_MARKER.search(turn.text)):
            return f"'{match.group()}' in turn {number} ({turn.role})"
    return ""


def repeats_prompt(record: Record) -> str:
    """An answer that is its prompt, or begins with it."""
    for number, (turn, reply) in enumerate(zip(record.turns, record.turns[1:], strict=False), 1):
        if turn.role != "user":
            continue
        prompt, answer = turn.text.strip().lower(), reply.text.strip().lower()
        if len(prompt) >= _LEAST_PROMPT and answer.startswith(prompt):
            return f"turn {number + 1} {'is' if answer == prompt else 'begins with'} turn {number}"
    return ""


def repeated_pair(record: Record) -> str:
    """A question asked twice with the same answer."""
    if len(record.turns) < 4:
        return ""
    seen: dict[tuple[str, str], int] = {}
    for number, (turn, reply) in enumerate(zip(record.turns, record.turns[1:], strict=False), 1):
        if turn.role == "user":
            first = seen.setdefault((turn.text, reply.text), number)
            if first != number and not any(isinstance(part, Image) for part in turn.parts):
                return f"turns {first} and {number}: '{short(turn.text, 60)}'"
    return ""


RECORD_RULES: dict[str, Check] = {
    "image-marker": image_marker,
    "foreign-marker": foreign_mark,
    "box-marker": box_marker,
    "box-text": box_text,
    "thought-mark": thought_mark,
    "role-marker": role_marker,
    "repeats-prompt": repeats_prompt,
    "repeated-pair": repeated_pair,
}
