"""Rules for the values inside a record: text, image sources, weights, tools, the order of turns.

Each function returns ("", "") for a sound value, else (problem, remedy). Knows no Record, opens no file.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# Which roles may follow; None is the start of the record, "system" only stands there.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: ("user",),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# Control tokens around a box, a point, or the name of what is there.
BOX_TOKENS = (
    *("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<box>", "</box>", "<ref>", "</ref>"),
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
SOUND = ("", "")


def short(value: object, limit: int = 80) -> str:
    """Return `value` as one printable line of at most `limit` characters, for messages about foreign data.

    The end of a long value is kept, since the end of a path is what tells two files apart.
    """
    text = value if isinstance(value, str) else repr(value)
    line = repr(text[-limit:])[1:-1]
    return line if max(len(text), len(line)) <= limit else f"...{line[3 - limit :]}"


class JsonReader:
    """Reads JSON text and notes keys that an object has twice, of which Python keeps the last without a word.

    Without `note` it does not, and takes half the time.
    """

    def __init__(self, *, note: bool = True) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object if note else None)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._twice += [key for key in found if keys.count(key) > 1]
        return found

    def at(self, text: str, start: int) -> tuple[Any, int, str]:
        """Read the value at text[start]; return it, where it ends, and a key that comes twice, "" if none does."""
        self._twice.clear()
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._twice[0] if self._twice else ""

    def whole(self, text: str) -> tuple[Any, str]:
        """Read a text that is one value; return it and a key that comes twice. Raises ValueError, RecursionError."""
        self._twice.clear()
        return self._decoder.decode(text), self._twice[0] if self._twice else ""


def order_problem(number: int, role: str, previous: str | None) -> tuple[str, str]:
    """Check that a turn may follow `previous` (None for the first turn)."""
    if role == "system":
        if number == 1:
            return SOUND
        return f"turn {number} is a system turn", "Only the first turn may be the system's: move it."
    expected = _NEXT[previous]
    if role in expected:
        return SOUND
    said = "a tool's" if role == "tool" else f"the {role}'s"
    problem = f"turn {number} is {said} where {' or '.join(f'the {name}' + chr(39) + 's' for name in expected)} belongs"
    if role == "tool":
        return problem, "A tool turn follows the assistant turn that called the tool, or another tool turn."
    return problem, (
        "After an optional system turn, user and assistant alternate, the user first: "
        "merge neighbouring turns of one speaker, or add the missing one."
    )


def text_problem(text: Any) -> tuple[str, str]:
    """Check that a text is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        return f"a text part that is a {type(text).__name__}", "Make the text a string."
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"half of a surrogate pair at character {error.start}, which is not valid text"
        return problem, "Export the text again as UTF-8."
    return SOUND


def token_problem(text: str, token: Any) -> tuple[str, str]:
    """Check that a text that stands for a control token marks a box: by one of these no turn begins or ends."""
    if not isinstance(token, bool):
        return f"a text whose token is '{short(token)}'", "Write true or false, or leave it out."
    if text in BOX_TOKENS:
        return SOUND
    return f"a token that marks no box: '{short(text)}'", f"Take token off the text; valid: {', '.join(BOX_TOKENS)}."


def source_problem(source: Any) -> tuple[str, str]:
    """Check that an image source is a path, bytes or a PIL picture."""
    # A PIL picture can exist only where PIL has been imported, so this need not import it.
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(source, pil.Image):
        return SOUND
    if not isinstance(source, (str, bytes)) or not source:
        problem = f"an image without a file: its source is '{short(source)}'"
        return problem, "Give the path of a file, the bytes of an encoded picture, or a PIL picture."
    if isinstance(source, str) and _URL.match(source):
        return f"an image that is a URL: '{short(source)}'", "Download the picture and give the file's path."
    if isinstance(source, str) and ("\0" in source or text_problem(source)[0]):
        return f"an image path that is not valid text: '{short(source)}'", "Rename the file."
    return SOUND


def weight_problem(weight: Any) -> tuple[str, str]:
    """Check that a loss weight is a finite number of 0 or more."""
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
    if not number:
        return f"a weight of '{short(weight)}'", "A weight is a finite number, 0 or more."
    if weight < 0:
        return f"a negative weight: {weight}", "Supervised training cannot unlearn an answer: use 0, or leave it out."
    return SOUND


def json_problem(value: Any, name: str) -> tuple[str, str]:
    """Check that JSON keeps a value as it is."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
        if json.loads(text) == value:
            return SOUND
    except (TypeError, ValueError, RecursionError):
        pass
    problem = f"{name} what JSON cannot keep: a tuple, NaN, an object, a numeric key"
    return problem, "Use only strings, numbers, booleans, null, lists and string-keyed mappings."


def tool_calls_problem(calls: Any) -> tuple[str, str]:
    """Check calls of the form {"type": "function", "function": {"name", "arguments"}}, with an optional id."""
    if not calls:
        return SOUND
    for number, call in enumerate(calls, 1):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            remedy = 'Write {"type": "function", "function": {"name": "...", "arguments": {...}}}.'
            return f"tool call {number} without a function name: '{short(call)}'", remedy
        if not isinstance(function.get("arguments", {}), (Mapping, str)):
            problem = f"tool call {number} whose arguments are '{short(function['arguments'])}'"
            return problem, "Write the arguments as an object, or as the JSON text of one."
    return json_problem(list(calls), "tool calls with")
