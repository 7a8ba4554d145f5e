"""The one record type: what was asked, with which images, and what should be answered.

Owns Record / Turn / Text / Image, their strict validation, and JSONL in and out, one record per line. Never
opens a picture to look at it, never guesses a missing part, never takes a literal "<image>" in text for a
picture: the importers in mmit/data/formats.py turn such markers into image parts.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from mmit.errors import RecordError, nearest

if TYPE_CHECKING:
    import PIL.Image

    Source = str | bytes | PIL.Image.Image

ROLES = ("system", "user", "assistant")
_PROVENANCE: dict[str, tuple[Any, str]] = {
    "id": (str, "a string"),
    "source": (str, "a string"),
    "row": ((int, type(None)), "a whole number"),
    "licence": ((str, type(None)), "a string"),
    "meta": (Mapping, "a mapping"),
}
_PART_KEYS = ("image", "image_base64", "text")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_EXAMPLE = 'A row reads {"turns": [{"role": "user", "parts": [{"image": "a.png"}, {"text": "..."}]}, ...]}.'


def short(value: object, limit: int = 80) -> str:
    """Return `value` as one printable line of at most `limit` characters, for messages about foreign data.

    The end of a long value is kept, since the end of a path is what tells two files apart.
    """
    text = value if isinstance(value, str) else repr(value)
    line = repr(text[-limit:])[1:-1]
    return line if max(len(text), len(line)) <= limit else f"...{line[3 - limit :]}"


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text, taken literally."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: the path of a file, the bytes of an encoded file, or a decoded PIL picture.

    `size` is its (W, H) where an index knows it.
    """

    source: Source
    size: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, os.PathLike):
            object.__setattr__(self, "source", os.fspath(self.source))


Part = Text | Image
OnBad = Callable[[RecordError], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says: text and image parts in reading order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _as_tuple(self.parts, "parts", "Turn(role, (Text(...),))"))

    @property
    def text(self) -> str:
        """The text parts, joined with nothing between them."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with its provenance; `row` is its line or position in `source`, counted from 1."""

    turns: tuple[Turn, ...]
    id: str = ""
    source: str = ""
    row: int | None = None
    licence: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", _as_tuple(self.turns, "turns", "Record((Turn(...), Turn(...)))"))

    @classmethod
    def triple(
        cls,
        instruction: str,
        output: str,
        *,
        input: str = "",
        images: Sequence[Image | Source] = (),
        **provenance: Any,
    ) -> Record:
        """Build the instruction-tuning triple; `provenance` takes id, source, row, licence and meta."""
        pictures = _as_tuple(images, "images", "images=[path]")
        parts = [p if isinstance(p, Image) else Image(p) for p in pictures]
        text = Text(f"{instruction}\n\n{input}" if input else instruction)
        return cls((Turn("user", (*parts, text)), Turn("assistant", (Text(output),))), **provenance)

    @property
    def images(self) -> tuple[Image, ...]:
        """Every image of the record, in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, Image))

    @property
    def where(self) -> str:
        """The record's place for messages, "source:row (id)", without what is not known."""
        place = (short(self.source, 120) or "record") + ("" if self.row is None else f":{self.row}")
        return f"{place} ({short(self.id)})" if self.id else place

    def validate(self, *, for_training: bool | None = True) -> None:
        """Check the rules of the format; raise RecordError with the place, the cause and the remedy.

        A record for training ends with an assistant turn, one for generation (`for_training=False`) with a
        user turn; None accepts either ending, which is what a reader that knows no purpose asks for.
        """
        self._check_provenance()
        for number, turn in enumerate(self.turns, 1):
            if not isinstance(turn, Turn):
                self._fail(f"turn {number} is a {type(turn).__name__}", "Build it as mmit.records.Turn.")
            self._check_role(number, turn)
            self._check_content(f"turn {number} ({turn.role})", turn)
        last = self.turns[-1].role if self.turns else "system"
        if last == "system":
            self._fail("the record has no user turn", "Give it at least one user turn.")
        if for_training is True and last != "assistant":
            self._fail("the last turn is the user's: there is no answer to learn", "Add the assistant turn.")
        if for_training is False and last != "user":
            self._fail("the last turn is the assistant's", "For generation, end with the user turn.")

    def _fail(self, problem: str, remedy: str) -> NoReturn:
        raise RecordError(problem, where=self.where, remedy=remedy)

    def _check_provenance(self) -> None:
        for key, (kind, name) in _PROVENANCE.items():
            value = getattr(self, key)
            if not isinstance(value, kind) or isinstance(value, bool):
                self._fail(f"'{key}' is {short(value)}, not {name}", f"Make '{key}' {name}, or leave it out.")

    def _check_role(self, number: int, turn: Turn) -> None:
        """System first if at all; then user and assistant in turn."""
        if turn.role not in ROLES:
            self._fail(f"turn {number} has role '{short(turn.role)}'", nearest(str(turn.role), ROLES))
        if turn.role == "system" and number > 1:
            self._fail(f"turn {number} is a system turn", "Only the first turn may be the system's: move it.")
        has_system = self.turns[0].role == "system"
        expected = "user" if (number - has_system) % 2 else "assistant"
        if turn.role not in ("system", expected):
            self._fail(
                f"turn {number} is the {turn.role}'s where the {expected}'s belongs",
                "After an optional system turn, user and assistant alternate, the user first: "
                "merge neighbouring turns of one speaker, or add the missing one.",
            )

    def _check_content(self, label: str, turn: Turn) -> None:
        for part in turn.parts:
            if isinstance(part, Image):
                problem, remedy = _source_problem(part.source)
                if turn.role != "user":
                    problem, remedy = "an image", "Only user turns show images: move it to a user turn."
            elif isinstance(part, Text):
                problem, remedy = _text_problem(part.text)
            else:
                problem, remedy = f"a part that is a {type(part).__name__}", "A part is a Text or an Image."
            if problem:
                self._fail(f"{label} has {problem}", remedy)
        if not turn.text.strip() and not any(isinstance(part, Image) for part in turn.parts):
            self._fail(f"{label} is empty", "Fill in its text, or leave the turn or the record out.")

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON object: paths as given, bytes as base64, PIL pictures as base64 PNG."""
        row = {"source": self.source, "row": self.row, "licence": self.licence, "meta": dict(self.meta)}
        try:
            text = json.dumps([self.id, row], allow_nan=False, ensure_ascii=False).encode("utf-8")
            kept = json.loads(text) == [self.id, row]
        except (TypeError, ValueError, RecursionError):
            kept = False
        if not kept:
            problem = "id, source or meta holds what JSON cannot keep: a tuple, NaN, an object, a numeric key"
            self._fail(problem, "Use only strings, numbers, booleans, null, lists and string-keyed mappings.")
        return {"id": self.id, "turns": [self._turn_json(turn) for turn in self.turns]} | row

    def _turn_json(self, turn: Turn) -> dict[str, Any]:
        parts: list[dict[str, str]] = []
        for part in turn.parts:
            if isinstance(part, Text):
                parts.append({"text": part.text})
            elif isinstance(part.source, str):
                parts.append({"image": part.source})
            else:
                data = part.source if isinstance(part.source, bytes) else _png(part.source, self.where)
                parts.append({"image_base64": base64.b64encode(data).decode("ascii")})
        return {"role": turn.role, "parts": parts}

    @classmethod
    def from_json(cls, obj: Any, *, where: str = "", root: str = "") -> Record:
        """Build a record from its canonical JSON object; relative image paths start at `root`.

        Raises RecordError, placed at `where`, for unknown keys, wrong types and broken rules.
        """
        where = where or "record"
        _check_keys(obj, (*_PROVENANCE, "turns"), where=where)
        turns = []
        for number, turn in enumerate(_list(obj, "turns", where), 1):
            place = f"{where}: turn {number}"
            _check_keys(turn, ("role", "parts"), where=place)
            parts = [_part(part, place, root) for part in _list(turn, "parts", place)]
            turns.append(Turn(turn.get("role"), tuple(parts)))
        record = cls(tuple(turns), **{key: obj[key] for key in _PROVENANCE if key in obj})
        try:
            record.validate(for_training=None)
        except RecordError as error:
            raise RecordError(error.problem, where=where, remedy=error.remedy) from error
        return record


def _as_tuple(value: Any, name: str, example: str) -> tuple[Any, ...]:
    # Text is a sequence too, but its letters are no parts.
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return tuple(value)
    raise RecordError(f"'{name}' is a {type(value).__name__}, not a sequence", remedy=f"Write {example}.")


def _text_problem(text: Any) -> tuple[str, str]:
    """Return ("", "") for sound text, else the problem and its remedy."""
    if not isinstance(text, str):
        return f"a text part that is a {type(text).__name__}", "Make the text a string."
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"half of a surrogate pair at character {error.start}, which is not valid text"
        return problem, "Export the text again as UTF-8."
    return "", ""


def _source_problem(source: Any) -> tuple[str, str]:
    """Return ("", "") for a usable image source, else the problem and its remedy."""
    # A PIL picture can exist only where PIL has been imported, so this need not import it.
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(source, pil.Image):
        return "", ""
    if not isinstance(source, (str, bytes)) or not source:
        problem = f"an image without a file: its source is '{short(source)}'"
        return problem, "Give the path of a file, the bytes of an encoded picture, or a PIL picture."
    if isinstance(source, str) and _URL.match(source):
        return f"an image that is a URL: '{short(source)}'", "Download the picture and give the file's path."
    if isinstance(source, str) and ("\0" in source or _text_problem(source)[0]):
        return f"an image path that is not valid text: '{short(source)}'", "Rename the file."
    return "", ""


def _png(picture: PIL.Image.Image, where: str) -> bytes:
    """Encode losslessly; EXIF goes along, since it may hold the orientation."""
    if picture.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
        remedy = 'Give the bytes of the encoded file, or convert it first: picture.convert("RGB").'
        raise RecordError(f"PNG cannot keep a picture of mode {picture.mode}", where=where, remedy=remedy)
    out = BytesIO()
    picture.save(out, "PNG", exif=picture.getexif().tobytes())
    return out.getvalue()


def _check_keys(obj: Any, keys: Sequence[str], *, where: str) -> None:
    if not isinstance(obj, dict):
        raise RecordError(f"found a {type(obj).__name__}, not an object", where=where, remedy=_EXAMPLE)
    for key in obj:
        if key not in keys:
            raise RecordError(f"unknown key '{short(key)}'", where=where, remedy=nearest(str(key), keys))


def _list(obj: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(obj.get(key), list):
        raise RecordError(f"'{key}' is missing or not a list", where=where, remedy=_EXAMPLE)
    return obj[key]


def _part(obj: Any, where: str, root: str) -> Part:
    _check_keys(obj, _PART_KEYS, where=where)
    if len(obj) != 1 or not isinstance(next(iter(obj.values())), str):
        remedy = f"Give each part exactly one key of {', '.join(_PART_KEYS)}, its value a string."
        raise RecordError("cannot tell what a part is", where=where, remedy=remedy)
    if "text" in obj:
        return Text(obj["text"])
    if "image" in obj:
        return image_at(obj["image"], root, where=where)
    try:
        return Image(base64.b64decode(obj["image_base64"], validate=True))
    except ValueError as error:
        remedy = "Write the encoded picture's bytes with base64.b64encode, without line breaks."
        raise RecordError("'image_base64' is not base64", where=where, remedy=remedy) from error


def image_at(path: Any, root: str, *, where: str = "") -> Image:
    """Return the image part of a file, `path` starting at `root` unless absolute."""
    # Checked before joining, which would hide a URL or an empty path behind the folder's name.
    problem, remedy = _source_problem(path)
    if problem:
        raise RecordError(f"has {problem}", where=where, remedy=remedy)
    return Image(os.path.join(root, path))


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each non-blank line.

    A line that is not JSON yields its RecordError, not raised so that the caller may go on reading.
    """
    try:
        # Bytes are split at newlines only; text lines would also end at a lone carriage return.
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_line(line, f"{os.fspath(path)}:{number}")
    except OSError as e:
        raise RecordError(f"cannot read: {e.strerror}", where=str(path), remedy="Check the path.") from e


def _json_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        remedy = "Each line must be one whole JSON value in UTF-8: mend or remove this line."
        return RecordError(f"not JSON: {short(str(error))}", where=where, remedy=remedy)


def read_jsonl(path: str | os.PathLike[str], *, on_bad: OnBad | None = None) -> Iterator[Record]:
    """Stream the records of a JSONL file; relative image paths start at the file's folder.

    A record that names no source gets this file and line. A bad line raises RecordError naming file:line or,
    with `on_bad`, is handed to it and left out, for the caller to count. Blank lines are ignored.
    """
    name = os.fspath(path)
    for number, obj in json_lines(name):
        try:
            if isinstance(obj, RecordError):
                raise obj
            record = Record.from_json(obj, where=f"{name}:{number}", root=os.path.dirname(name))
        except RecordError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        if not record.source and record.row is None:
            record = replace(record, source=name, row=number)
        yield record


def write_jsonl(records: Iterable[Record], path: str | os.PathLike[str]) -> int:
    """Write records one per line and return their number; the file appears whole or not at all.

    Each record is checked first. Image paths inside the file's folder are written relative to it, so that the
    folder can be moved; others absolute. Raises RecordError, leaving any earlier file of that name untouched.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "w", encoding="utf-8", newline="\n") as file:
            for record in records:
                record.validate(for_training=None)
                row = _relocate(record.to_json(), os.path.abspath(target.parent))
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        remedy = "Check that the folder can be written and the disk is not full."
        raise RecordError(f"cannot write: {error}", where=str(target), remedy=remedy) from error
    finally:
        if draft.exists():
            draft.unlink()
    return count


def _relocate(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """Make the image paths of a JSON row mean the same files when read from `folder`."""
    for part in (part for turn in row["turns"] for part in turn["parts"] if "image" in part):
        full = Path(os.path.abspath(part["image"]))
        part["image"] = full.relative_to(folder).as_posix() if full.is_relative_to(folder) else str(full)
    return row
