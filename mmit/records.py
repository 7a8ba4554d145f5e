"""The one record type: what was asked, with which images, what should be answered, and what carries loss.

Owns Record / Turn / Text / Image, their strict validation, and JSONL in and out, one record per line. Never
opens a picture to look at it, never guesses a missing part, never takes a literal "<image>" in text for a
picture: the importers in mmit/data/formats turn such markers into image parts.

Loss weights: the weight of a token of a turn's text is the `weight` of its text part, else of its turn, else the
default of its role (1 for the assistant, 0 otherwise, unless a run's `data.loss` says otherwise), times the `weight`
of the record.

Preferences: a record with `rejected` has two answers to one prompt, its last turn (chosen) and that one; a record with
a `label` has one answer and a verdict on it. Only the methods of `train.objective` learn from them.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

from mmit.errors import RecordError, nearest
from mmit.io import whole_file
from mmit.record_rules import (
    ROLES,
    JsonReader,
    json_problem,
    order_problem,
    short,
    source_problem,
    text_problem,
    token_problem,
    tool_calls_problem,
    weight_problem,
)

if TYPE_CHECKING:
    import PIL.Image

    Source = str | bytes | PIL.Image.Image

__all__ = ["ROLES", "Image", "OnBad", "Part", "Record", "Text", "Turn", "image_at", "is_plain", "json_lines"]
__all__ += ["key_twice", "read_jsonl", "record_line", "short", "write_jsonl"]

_PROVENANCE: dict[str, tuple[Any, str]] = {
    "id": (str, "a string"),
    "source": (str, "a string"),
    "row": ((int, type(None)), "a whole number"),
    "licence": ((str, type(None)), "a string"),
    "meta": (Mapping, "a mapping"),
}
# What a record holds besides turns and provenance, and what a turn holds besides role and parts; written when set.
_EXTRAS: dict[str, Any] = {"weight": 1.0, "tools": (), "template_args": {}}
_TURN_EXTRAS: dict[str, Any] = {
    "weight": None,
    "thinking": None,
    "tool_calls": (),
    "name": None,
    "tool_call_id": None,
}
_PREFERENCE = ("rejected", "label")
_PART_KEYS = ("image", "image_base64", "text")
_TEXT_EXTRAS: dict[str, Any] = {"weight": None, "token": False}
_EXAMPLE = 'A row reads {"turns": [{"role": "user", "parts": [{"image": "a.png"}, {"text": "..."}]}, ...]}.'


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text, taken literally; `weight` is its loss weight, None for that of its turn.

    With `token` it is one of BOX_TOKENS and stands for that control token, whoever says it.
    """

    text: str
    weight: float | None = None
    token: bool = False


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
    """What one speaker says: text and image parts in reading order.

    Attributes:
        role: who says it; a tool turn holds the result of a call.
        parts: its text and images; images stand in user, assistant and tool turns.
        weight: loss weight of its text, 0 or more; None for the default of its role.
        thinking: an assistant's reasoning before its answer; None if there is none, "" if it is empty.
        tool_calls: an assistant's calls, {"type": "function", "function": {"name", "arguments"}}, as OpenAI's.
        name: the tool whose result a tool turn holds. tool_call_id: the call that it answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...]
    weight: float | None = None
    thinking: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    name: str | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if type(self.parts) is not tuple:  # else, as nearly always, nothing is to be set
            object.__setattr__(self, "parts", _as_tuple(self.parts, "parts", "Turn(role, (Text(...),))"))
        if type(self.tool_calls) is not tuple:
            object.__setattr__(self, "tool_calls", _as_tuple(self.tool_calls, "tool_calls", "tool_calls=[{...}]"))

    @property
    def text(self) -> str:
        """The text parts, joined with nothing between them."""
        if len(self.parts) == 1 and isinstance(self.parts[0], Text):
            return self.parts[0].text
        return "".join(part.text for part in self.parts if isinstance(part, Text))


def weighed(turn: Turn, weight: float) -> Turn:
    """The turn with one loss weight on all of its text, whatever its parts say."""
    parts = tuple(replace(part, weight=None) if isinstance(part, Text) else part for part in turn.parts)
    return replace(turn, parts=parts, weight=weight)


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with its provenance; `row` is its line or position in `source`, counted from 1.

    `weight` multiplies the loss weights of all its turns; `tools` are the JSON schemas of the tools it may call, and
    `template_args` variables for the chat template, such as enable_thinking. `rejected` is an assistant turn that was
    found worse than the last one; `label` says whether the last turn is a good answer (True) or a bad one (False).
    """

    turns: tuple[Turn, ...]
    id: str = ""
    source: str = ""
    row: int | None = None
    licence: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rejected: Turn | None = None
    label: bool | None = None
    # Set once `validate` has found nothing, in a record of nothing but texts and pictures, which cannot change. A
    # record is validated where it is read, where it is tokenised, and where it is laid out.
    _sound: bool = field(default=False, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if type(self.turns) is not tuple:
            object.__setattr__(self, "turns", _as_tuple(self.turns, "turns", "Record((Turn(...), Turn(...)))"))
        if type(self.tools) is not tuple:
            object.__setattr__(self, "tools", _as_tuple(self.tools, "tools", "tools=[{...}]"))

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
        """Build the instruction-tuning triple.

        Args:
            instruction, input: the question, with a blank line between. output: the answer.
            images: stand in front of the question, in order.
            provenance: id, source, row, licence and meta.
        """
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
        user or tool turn; None accepts either ending, which is what a reader that knows no purpose asks for.
        """
        # What cannot change is checked once, though it is asked at every station.
        if not self._sound:
            self._check_all()
        last = self.turns[-1].role if self.turns else "system"
        if last == "system":
            self._fail("the record has no user turn", "Give it at least one user turn.")
        if last != "assistant" and (self.rejected is not None or self.label is not None):
            name = "a rejected answer" if self.rejected is not None else "a label"
            self._fail(f"the record has {name} but no answer beside it", "End its turns with the assistant's.")
        if for_training is True and last != "assistant":
            self._fail(f"the last turn is the {last}'s: there is no answer to learn", "Add the assistant turn.")
        # A prompt that ends with an answer would have the model continue it, and not give its own.
        if for_training is False and last == "assistant":
            self._fail("the last turn is the assistant's", "For generation, end with the user turn.")

    def _check_all(self) -> None:
        self._check_provenance()
        self._check_extras()
        previous: str | None = None
        # Mappings can be changed after a check; texts and pictures of frozen parts cannot.
        plain = not self.tools and not self.template_args
        for number, turn in enumerate(self.turns, 1):
            if not isinstance(turn, Turn):
                self._fail(f"turn {number} is a {type(turn).__name__}", "Build it as mmit.records.Turn.")
            if turn.role not in ROLES:
                self._fail(f"turn {number} has role '{short(turn.role)}'", nearest(str(turn.role), ROLES))
            self._check(*order_problem(number, turn.role, previous))
            self._check_content(number, turn)
            if not is_plain(turn):
                plain = False
                self._check_turn_extras(f"turn {number} ({turn.role})", turn)
            previous = turn.role
        if self.rejected is not None or self.label is not None:
            plain = plain and self._check_preference()
        object.__setattr__(self, "_sound", plain)

    def _check_preference(self) -> bool:
        """Check what a comparison is made of; whether it cannot change any more."""
        if self.label is not None and not isinstance(self.label, bool):
            self._fail(f"'label' is '{short(self.label)}'", "Write true for a good answer, false for a bad one.")
        rejected = self.rejected
        if rejected is None:
            return True
        if self.label is not None:
            self._fail("the record has both a rejected answer and a label", "Keep one of them.")
        if not isinstance(rejected, Turn) or rejected.role != "assistant":
            said = f"the {rejected.role}'s" if isinstance(rejected, Turn) else f"a {type(rejected).__name__}"
            self._fail(f"the rejected answer is {said}, not an assistant turn", "Write it as an assistant turn.")
        if any(isinstance(part, Image) for part in rejected.parts):
            self._fail("the rejected answer has an image", "Answers that are compared are text: remove it.")
        self._check_content(len(self.turns), rejected)
        self._check_turn_extras("the rejected answer", rejected)
        if self.turns and rejected == self.turns[-1]:
            remedy = "Leave the record out: there is nothing to prefer."
            self._fail("the chosen and the rejected answer are equal", remedy)
        return is_plain(rejected)

    def _fail(self, problem: str, remedy: str) -> NoReturn:
        raise RecordError(problem, where=self.where, remedy=remedy)

    def _check(self, problem: str, remedy: str, *, label: str = "") -> None:
        if problem:
            self._fail(f"{label} has {problem}" if label else problem, remedy)

    def _check_provenance(self) -> None:
        for key, (kind, name) in _PROVENANCE.items():
            value = getattr(self, key)
            if not isinstance(value, kind) or isinstance(value, bool):
                self._fail(f"'{key}' is {short(value)}, not {name}", f"Make '{key}' {name}, or leave it out.")

    def _check_extras(self) -> None:
        self._check(*weight_problem(self.weight), label="the record")
        if not self.tools and self.template_args == {}:
            return
        for number, tool in enumerate(self.tools, 1):
            if not isinstance(tool, Mapping):
                remedy = 'Write {"type": "function", "function": {"name", "description", "parameters"}}.'
                self._fail(f"tool {number} is a {type(tool).__name__}, not a JSON schema", remedy)
        if not isinstance(self.template_args, Mapping):
            self._fail("'template_args' is not a mapping", 'Write {"enable_thinking": true}, or leave it out.')
        held = {"tools": list(self.tools), "template_args": dict(self.template_args)}
        self._check(*json_problem(held, "tools or template_args hold"))

    def _check_content(self, number: int, turn: Turn) -> None:
        # Run for every turn of every record, a few times: what is as it should be makes no text.
        shown = said = False
        for part in turn.parts:
            if isinstance(part, Image):
                shown = True
                problem, remedy = source_problem(part.source)
                if turn.role == "system":
                    problem, remedy = "an image", "A system turn shows no image: move it to a user turn."
            elif isinstance(part, Text):
                problem, remedy = text_problem(part.text)
                if not problem and part.weight is not None:
                    problem, remedy = weight_problem(part.weight)
                if not problem and part.token is not False:
                    problem, remedy = token_problem(part.text, part.token)
                said = said or (not problem and not part.text.isspace() and part.text != "")
            else:
                problem, remedy = f"a part that is a {type(part).__name__}", "A part is a Text or an Image."
            if problem:
                self._fail(f"turn {number} ({turn.role}) has {problem}", remedy)
        # An empty system turn suppresses a template's default one; a tool may return nothing.
        if not (said or shown or turn.role in ("system", "tool") or turn.tool_calls):
            remedy = "Fill in its text, or leave the turn or the record out."
            self._fail(f"turn {number} ({turn.role}) is empty", remedy)

    def _check_turn_extras(self, label: str, turn: Turn) -> None:
        if turn.weight is not None:
            self._check(*weight_problem(turn.weight), label=label)
        if turn.thinking is not None:
            self._check(*text_problem(turn.thinking), label=f"{label}: thinking")
        self._check(*tool_calls_problem(turn.tool_calls), label=label)
        for key, owner in (("thinking", "assistant"), ("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(turn, key) not in (None, ()) and turn.role != owner:
                self._fail(f"{label} has {key}", f"Only the {owner}'s turns have {key}: move or remove it.")
        for key in ("name", "tool_call_id"):
            if not isinstance(getattr(turn, key), (str, type(None))):
                self._fail(f"{label}: {key} is '{short(getattr(turn, key))}'", f"Write {key} as a string.")

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON object: paths as given, bytes as base64, PIL pictures as base64 PNG.

        Weights, tools, thinking and the like are written where they are set.
        """
        row = {"source": self.source, "row": self.row, "licence": self.licence, "meta": dict(self.meta)}
        # Before anything is written: a value that JSON cannot hold would end a file of many records in its middle.
        self._check(*json_problem([self.id, row], "id, source or meta holds"))
        told = {"id": self.id, "turns": [self._turn_json(turn) for turn in self.turns]} | row | _set(self, _EXTRAS)
        if self.rejected is not None:
            told["rejected"] = self._turn_json(self.rejected)
        return told if self.label is None else told | {"label": self.label}

    def _turn_json(self, turn: Turn) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, Text):
                more = _set(part, _TEXT_EXTRAS) if part.weight is not None or part.token else {}
                parts.append({"text": part.text} | more)
            elif isinstance(part.source, str):
                parts.append({"image": part.source})
            else:
                data = part.source if isinstance(part.source, bytes) else _png(part.source, self.where)
                parts.append({"image_base64": base64.b64encode(data).decode("ascii")})
        return {"role": turn.role, "parts": parts} | _set(turn, _TURN_EXTRAS)

    @classmethod
    def from_json(cls, obj: Any, *, where: str = "", root: str = "") -> Record:
        """Build a record from its canonical JSON object; relative image paths start at `root`.

        Raises RecordError, placed at `where`, for unknown keys, wrong types and broken rules.
        """
        where = where or "record"
        _check_keys(obj, (*_PROVENANCE, *_EXTRAS, *_PREFERENCE, "turns"), where=where)
        turns = [
            _turn(turn, f"{where}: turn {number}", root) for number, turn in enumerate(_list(obj, "turns", where), 1)
        ]
        told: dict[str, Any] = {"label": obj["label"]} if "label" in obj else {}
        if obj.get("rejected") is not None:
            told["rejected"] = _turn(obj["rejected"], f"{where}: rejected", root)
        record = cls(tuple(turns), **_given(obj, _PROVENANCE, where), **_given(obj, _EXTRAS, where), **told)
        try:
            # Either ending: a reader does not know what the record is for.
            record.validate(for_training=None)
        except RecordError as error:
            raise RecordError(error.problem, where=where, remedy=error.remedy) from error
        return record


def is_plain(turn: Turn) -> bool:
    """Whether a turn is its parts and nothing else."""
    empty = turn.weight is None and turn.thinking is None and turn.tool_calls == ()
    return empty and turn.name is None and turn.tool_call_id is None


def _as_tuple(value: Any, name: str, example: str) -> tuple[Any, ...]:
    if type(value) is tuple:  # as nearly always, and asking an ABC takes longer than all the rest
        return value
    # Text is a sequence too, but its letters are no parts.
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return tuple(value)
    raise RecordError(f"'{name}' is a {type(value).__name__}, not a sequence", remedy=f"Write {example}.")


def _set(held: Record | Turn | Text, extras: Mapping[str, Any]) -> dict[str, Any]:
    """Return the extras that differ from their default, as JSON values."""
    found = {key: getattr(held, key) for key, default in extras.items() if getattr(held, key) != default}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _given(obj: dict[str, Any], keys: Iterable[str], where: str) -> dict[str, Any]:
    """Return the named keys of a JSON object; lists of tools and calls must be lists."""
    for key in ("tools", "tool_calls"):
        if key in keys and key in obj:
            _list(obj, key, where)
    return {key: obj[key] for key in keys if key in obj}


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
    value = obj.get(key)
    if not isinstance(value, list):
        raise RecordError(f"'{key}' is missing or not a list", where=where, remedy=_EXAMPLE)
    return value


def _turn(obj: Any, where: str, root: str) -> Turn:
    _check_keys(obj, ("role", "parts", *_TURN_EXTRAS), where=where)
    parts = [_part(part, where, root) for part in _list(obj, "parts", where)]
    return Turn(cast("Any", obj.get("role")), tuple(parts), **_given(obj, _TURN_EXTRAS, where))


def _part(obj: Any, where: str, root: str) -> Part:
    _check_keys(obj, (*_PART_KEYS, *_TEXT_EXTRAS), where=where)
    kinds = [key for key in _PART_KEYS if key in obj]
    if len(kinds) != 1 or not isinstance(obj[kinds[0]], str):
        remedy = f"Give each part exactly one key of {', '.join(_PART_KEYS)}, its value a string."
        raise RecordError("cannot tell what a part is", where=where, remedy=remedy)
    if "text" in obj:
        return Text(obj["text"], **{key: obj[key] for key in _TEXT_EXTRAS if key in obj})
    if found := [key for key in _TEXT_EXTRAS if key in obj]:
        raise RecordError(f"an image part has a {found[0]}", where=where, remedy="Only text has one: remove it.")
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
    problem, remedy = source_problem(path)
    if problem:
        raise RecordError(f"has {problem}", where=where, remedy=remedy)
    return Image(os.path.join(root, path))


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each non-blank line.

    A line that is not JSON yields its RecordError, not raised so that the caller may go on reading.
    """
    try:
        # Bytes are split at newlines only; text lines would also end at a lone carriage return.
        reader = JsonReader()
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_line(line, f"{os.fspath(path)}:{number}", reader)
    except OSError as e:
        raise RecordError(f"cannot read: {e.strerror}", where=str(path), remedy="Check the path.") from e


def _json_line(line: bytes, where: str, reader: JsonReader) -> Any:
    try:
        value, twice = reader.whole(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        remedy = "Each line must be one whole JSON value in UTF-8: fix or remove this line."
        return RecordError(f"not JSON: {short(str(error))}", where=where, remedy=remedy)
    return key_twice(twice, where) if twice else value


def key_twice(key: str, where: str) -> RecordError:
    """The error of a row in which an object has a key twice."""
    problem = f"an object has the key '{short(key)}' twice"
    return RecordError(problem, where=where, remedy="Keep one of them: which one was meant cannot be told.")


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
    count = 0
    with whole_file(target) as file:
        for record in records:
            file.write(record_line(record, os.path.abspath(target.parent)).encode())
            count += 1
    return count


def record_line(record: Record, folder: str) -> str:
    """Check a record and return its line in a JSONL file of `folder`, an absolute path. Raises RecordError."""
    record.validate(for_training=None)
    return json.dumps(_relocate(record.to_json(), folder), ensure_ascii=False) + "\n"


def _relocate(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """Make the image paths of a JSON row mean the same files when read from `folder`."""
    for part in (part for turn in row["turns"] for part in turn["parts"] if "image" in part):
        full = Path(os.path.abspath(part["image"]))
        part["image"] = full.relative_to(folder).as_posix() if full.is_relative_to(folder) else str(full)
    return row
