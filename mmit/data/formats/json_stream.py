"""A JSON list read value by value: of a file of any size, a few megabytes are held.

In: the path of a UTF-8 file that is one JSON list. Out: its values, each with the bytes it lies at, so that it can be
read again by itself. Values are parsed by the json module's own scanner, on a buffer that slides over the file; ijson
is no faster and does not tell where a value lies. Refuses what the json module refuses.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NoReturn

from mmit.errors import RecordError
from mmit.record_rules import JsonReader
from mmit.records import key_twice, short

BLOCK = 4 << 20
_NEAR = 16  # a value that is cut short is refused, or ends, within this of the cut, if not for an open string
_SPACE = " \t\r\n"
_REMEDY = "The file begins like a JSON list: fix this line, or write JSONL."


def list_items(path: str, *, block: int = BLOCK) -> Iterator[tuple[int, int, Any]]:
    """Yield (first byte, one past the last, value) of each value of a JSON list.

    A value in which an object has a key twice is yielded as its RecordError.
    Raises RecordError, naming the line and column, where the file stops being a JSON list; values before that place
    have been yielded by then.
    """
    try:
        with open(path, "rb") as file:
            yield from _items(_Window(path, file, block))
    except OSError as error:
        raise RecordError(f"cannot read: {error.strerror}", where=path, remedy="Check the path.") from error


def list_places(path: str) -> Iterator[tuple[int, int]]:
    """Yield (first byte, one past the last) of each value of a JSON list; raises as `list_items`."""
    try:
        with open(path, "rb") as file:
            for begin, end, _ in _items(_Window(path, file, BLOCK, reader=JsonReader(note=False))):
                yield begin, end
    except OSError as error:
        raise RecordError(f"cannot read: {error.strerror}", where=path, remedy="Check the path.") from error


def _items(window: _Window) -> Iterator[tuple[int, int, Any]]:
    window.skip("[")
    if window.peek() == "]":
        window.skip("]")
    else:
        while True:
            yield window.value()
            if window.peek() == "]":
                window.skip("]")
                break
            window.skip(",")
    if window.peek():
        window.fail("Extra data", window.at)


@dataclass
class _Window:
    """The text of a part of a file; `at` is the next character in it."""

    path: str
    file: BinaryIO
    block: int
    text: str = ""
    at: int = 0
    byte: int = 0  # where text[at] lies in the file
    line: int = 1  # of text[0]
    column: int = 1
    ended: bool = False
    reader: JsonReader = field(default_factory=JsonReader)
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")())

    def __post_init__(self) -> None:
        start = self.file.read(3)
        self.byte = 3 if start == codecs.BOM_UTF8 else 0
        self.file.seek(self.byte)

    def more(self, size: int) -> None:
        """Forget what lies before `at`, and read `size` bytes on."""
        gone = self.text[: self.at]
        lines = gone.count("\n")
        self.column = len(gone) - gone.rfind("\n") if lines else self.column + len(gone)
        self.line += lines
        data = self.file.read(size)
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            problem = f"not JSON: {short(str(error))}"
            raise RecordError(problem, where=self.path, remedy="Save the file as JSON in UTF-8.") from error
        self.text, self.at = self.text[self.at :] + more, 0

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _SPACE:
                    return self.text[self.at]
                self.at += 1
                self.byte += 1
            if self.ended:
                return ""
            self.more(self.block)

    def skip(self, wanted: str) -> None:
        """Step over `wanted`, or refuse what is there."""
        if self.peek() != wanted:
            self.fail("Expecting value" if wanted == "[" else "Expecting ',' delimiter", self.at)
        self.at += 1
        self.byte += 1

    def value(self) -> tuple[int, int, Any]:
        """Parse the next value."""
        self.peek()
        size = self.block
        while True:
            try:
                value, end, twice = self.reader.at(self.text, self.at)
                if end + _NEAR < len(self.text) or self.ended:  # else a number may go on
                    break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _NEAR
                if self.ended or not cut:
                    self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                problem, remedy = f"not JSON: {short(str(error))}", "Save the file as JSON in UTF-8."
                raise RecordError(problem, where=f"{self.path}:{self._line(self.at)}", remedy=remedy) from error
            self.more(size)
            size *= 2  # a value of any size is parsed a few times only
        begin, piece = self.byte, self.text[self.at : end]
        self.byte += len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
        self.at = end
        return begin, self.byte, key_twice(twice, self.path) if twice else value

    def fail(self, message: str, at: int) -> NoReturn:
        """Refuse what stands at a place of the text."""
        before = self.text[:at]
        column = at - before.rfind("\n") if "\n" in before else self.column + at
        problem = f"not JSON: {message} at column {column}"
        raise RecordError(problem, where=f"{self.path}:{self._line(at)}", remedy=_REMEDY)

    def _line(self, at: int) -> int:
        return self.line + self.text.count("\n", 0, at)
