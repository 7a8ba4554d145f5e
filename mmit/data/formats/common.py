"""What the importers share: the Format entry, files read row by row, pictures, and checks that name what is wrong.

Takes paths and foreign JSON values; gives rows, text and image parts, or a RecordError whose problem names the
key. Never opens a picture, never fixes a value.
"""

from __future__ import annotations

import functools
import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmit.data.formats import boxes, thoughts
from mmit.data.formats.json_stream import list_items
from mmit.data.formats.pictures import image_part
from mmit.data.formats.preferences import read_keys
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Part, Record, Text, Turn, json_lines, short

Row = dict[str, Any]
Rows = Iterator[tuple[int, Any]]
SHARED_OPTIONS = {**boxes.OPTIONS, **thoughts.OPTIONS}  # of all formats but mmit's own


def json_rows(path: str) -> Rows:
    """Yield (line or position from 1, value) of a JSON list or of JSONL, both streamed.

    A line that is not JSON is yielded as its RecordError, so that the caller may go on; a list raises where it stops
    being one.
    """
    if not is_list(path):
        yield from json_lines(path)
        return
    for number, (_, _, value) in enumerate(list_items(path), 1):
        yield number, value


def is_list(path: str) -> bool:
    """Tell whether a JSON file begins as a list, by its first character."""
    return _first_byte(path) == b"["


def json_object(path: str, *needed: str) -> Row:
    """Read a file that is one JSON object with the keys `needed`; RecordError names the file and the keys."""
    value = _json_file(path, "The file must be one JSON object: fix this line.")
    if not isinstance(value, dict):
        problem = f"found a JSON {type(value).__name__}, not an object"
        raise RecordError(problem, where=path, remedy=f"The file needs the keys {', '.join(needed)}.")
    for key in needed:
        if key not in value:
            remedy = f"It has {short(list(value)[:8], 120)}; check that this is the right file of the data set."
            raise RecordError(f"the file has no '{key}'", where=path, remedy=remedy)
    return value


def _first_byte(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    except OSError as e:
        raise RecordError(f"cannot read: {e.strerror}", where=path, remedy="Check the path.") from e


def _json_file(path: str, remedy: str) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except OSError as e:
        raise RecordError(f"cannot read: {e.strerror}", where=path, remedy="Check the path.") from e
    except json.JSONDecodeError as error:
        where, problem = f"{path}:{error.lineno}", f"not JSON: {error.msg} at column {error.colno}"
        raise RecordError(problem, where=where, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {short(str(error))}"
        raise RecordError(problem, where=path, remedy="Save the file as JSON in UTF-8.") from error


@dataclass(frozen=True, slots=True)
class Format:
    """One data format: how its file is cut into rows, and how a row becomes a Record.

    `rows(path, **file_options)` yields (line or position from 1, row); `row(row, image_root=, **options)` makes the
    Record. `options` and `file_options` say what each option does. `detect` names the keys that tell the format
    (of a row, of a CSV header, or, written "data.question", of the first item under a key of a one-object file);
    without any it cannot be told from the file. `licence` is set where the format belongs to one data set whose
    licence is known; a user's own statement goes before it.
    """

    about: str
    row: Callable[..., Record]
    rows: Callable[..., Rows] = json_rows
    options: Mapping[str, str] = field(default_factory=dict)
    file_options: Mapping[str, str] = field(default_factory=dict)
    detect: tuple[str, ...] = ()
    licence: str | None = None
    spells_boxes: bool = False  # <box>(x1,y1),(x2,y2)</box> in a text is a box, not letters
    own: bool = False  # mmit's: its meta is what somebody put there, and has no keys to be read

    def __call__(self, row: Row, *, image_root: str = "", **options: Any) -> Record:
        """Make the Record of one row; keys with a meaning that its layout does not define are read or refused."""
        # What is in the meta of mmit's own rows was put there on purpose; reading it by name a second time could change
        # a record.
        if self.own:
            return self.row(row, image_root=image_root)
        shared = {key: options.pop(key) for key in SHARED_OPTIONS if key in options and key not in self.options}
        # Contract: a row function reads its own layout and puts the rest into the meta; keys with a meaning that all
        # formats share are taken out of there, once, for all of them.
        record = read_keys(self.row(row, image_root=image_root, **options))
        # Formats that define boxes in text: as letters, they would teach the numbers of another coordinate system.
        if self.spells_boxes and "boxes" not in shared:
            boxes.refuse_spelt(record)
        return with_shared(record, shared)


def with_shared(record: Record, options: Mapping[str, Any]) -> Record:
    """Read a record by SHARED_OPTIONS: thoughts that open answers, boxes beside the text. Raises RecordError."""
    given = dict(options)
    return boxes.with_boxes(thoughts.with_thoughts(record, given.pop("thoughts", None)), **given)


def check_shared(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for values that SHARED_OPTIONS cannot have."""
    given = dict(options)
    thoughts.check_option(given.pop("thoughts", None))
    boxes.check_options(**given)


# --- options ------------------------------------------------------------------------------------------------------


def one_of(value: Any, name: str, choices: Sequence[str]) -> str:
    """Return `value` if it is among `choices`; ConfigError with the nearest otherwise."""
    if value not in choices:
        raise ConfigError(f"option {name} is '{short(value)}'", remedy=nearest(str(value), choices))
    return str(value)


def count_of(value: Any, name: str) -> int:
    """Return `value` if it is a whole number of 0 or more; ConfigError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"option {name} is '{short(value)}'", remedy="Give a whole number, 0 or more.")
    return value


def text_option(value: Any, name: str) -> str:
    """Return `value` if it is text; ConfigError otherwise."""
    if not isinstance(value, str):
        raise ConfigError(f"option {name} is '{short(value)}'", remedy="Give text.")
    return value


def pick(instructions: Any, *, seed: int, key: str) -> str:
    """Return the instruction for the row `key`: the same in every run, evenly spread over the choices.

    `instructions` is one text or a sequence of texts; None gives "".
    """
    choices = [instructions] if isinstance(instructions, str) else list(instructions or [""])
    if not all(isinstance(choice, str) for choice in choices):
        raise ConfigError("option instruction holds what is not text", remedy="Give one text or a list of texts.")
    # A hash of the row and no generator: the draw depends on nothing that was read before it.
    digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
    # The remainder favours the first choices by less than one in 10^17, since 64 bits are far more than any list of
    # instructions.
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]


def file_name(pattern: str, names: Mapping[str, Any]) -> str:
    """Fill an image_pattern such as "COCO_{split}_{image_id:012d}.jpg".

    ConfigError for an unknown name and for what is no pattern, RecordError for a row whose values do not fit.
    """
    _check_pattern(text_option(pattern, "image_pattern"))
    try:
        return pattern.format_map(names)
    except (KeyError, IndexError, AttributeError) as error:
        problem = f"option image_pattern '{short(pattern)}' has a name that is not known"
        raise ConfigError(problem, remedy=f"valid: {', '.join(names)}") from error
    except (ValueError, TypeError) as error:
        problem = f"{short(dict(names))} does not fit the image_pattern '{short(pattern)}': {short(str(error))}"
        remedy = "Set the option image_pattern: for example {image_id}.jpg or, for numbers, {image_id:012d}.jpg."
        raise RecordError(problem, remedy=remedy) from error


@functools.lru_cache(maxsize=16)
def _check_pattern(pattern: str) -> None:
    """Raise ConfigError for a pattern that no row could fill: one that cannot be read, or a field without a name."""
    remedy = "Set the option image_pattern: for example {image_id}.jpg or, for numbers, {image_id:012d}.jpg."
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        problem = f"option image_pattern '{short(pattern)}' is no pattern: {error}"
        raise ConfigError(problem, remedy=remedy) from error
    if any(not field or field[0] in string.digits for field in fields):
        raise ConfigError(f"option image_pattern '{short(pattern)}' has a positional field", remedy=remedy)


# --- values -------------------------------------------------------------------------------------------------------


def text_of(value: Any, what: str) -> str:
    """Return `value` if it is text; RecordError says what it should have been."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is '{short(value)}', not text", remedy="Write it as a JSON string.")
    return value


def objects_of(row: Row, key: str) -> list[Row]:
    """Return row[key] if it is a non-empty list of objects."""
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        remedy = f"Write '{key}' as a list of JSON objects, or choose another format."
        raise RecordError(f"'{key}' is not a list of objects, or is empty", remedy=remedy)
    return value


def object_of(value: Any, what: str, *, where: str = "") -> Row:
    """Return `value` if it is a JSON object."""
    if not isinstance(value, dict):
        problem = f"{what} is '{short(value)}', not an object"
        raise RecordError(problem, where=where, remedy="Write it as a JSON object.")
    return value


def keyed(items: Any, key: str, *, where: str) -> dict[str, Row]:
    """Return the objects of a list by the text of their `key`, so that 7 and "7" meet."""
    if not isinstance(items, list):
        problem = f"found a {type(items).__name__} where a list of objects with '{key}' belongs"
        raise RecordError(problem, where=where, remedy="Check that this is the right file of the data set.")
    # Annotation files have ids as numbers where question files have texts, and the other way round.
    return {str(item[key]): item for item in items if isinstance(item, dict) and key in item}


def references(value: Any, what: str) -> list[str]:
    """Return one text or a list of texts as a list of at least one."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise RecordError(f"{what} is an empty list", remedy="Give at least one answer, or leave the row out.")
    return [text_of(text, what) for text in texts]


def most_frequent(answers: Sequence[str]) -> str:
    """Return the commonest answer; among equals the one given first."""
    # Contract: `most_common` keeps the order of the first occurrence among equals, so the draw is the same in every
    # run.
    return Counter(answers).most_common(1)[0][0]


def id_of(row: Row, key: str = "id") -> str:
    """Return the row's id as text, "" if it has none."""
    return "" if row.get(key) is None else str(row[key])


def rest(row: Row, *used: str) -> Row:
    """Return what no part of the Record holds: the row without `used`, id and images."""
    return {key: value for key, value in row.items() if key not in (*used, "id", "image", "images")}


def by_name(name: Any, names: Mapping[str, str], what: str) -> str:
    """Return names[name]; RecordError with the nearest name otherwise."""
    if not isinstance(name, str) or name not in names:
        raise RecordError(f"{what} '{short(name)}'", remedy=nearest(str(name), names))
    return names[name]


# --- pictures -----------------------------------------------------------------------------------------------------


def images_of(row: Row, root: str) -> list[Image] | None:
    """Return the images of `image` or `images`; None if the row has neither key."""
    keys = [key for key in ("image", "images") if key in row]
    if len(keys) == 2:
        raise RecordError("the row has both 'image' and 'images'", remedy="Keep one of them.")
    if not keys:
        return None
    value = row[keys[0]]
    paths = [] if value is None else value if isinstance(value, list) else [value]
    return [image_part(path, root) for path in paths]


# --- records ------------------------------------------------------------------------------------------------------


def ask(text: str, images: Sequence[Image] = ()) -> Turn:
    """Return a user turn: the images, then the text if there is any."""
    parts: tuple[Part, ...] = (*images, Text(text)) if text or not images else tuple(images)
    return Turn("user", parts)


def reply(text: str) -> Turn:
    """Return an assistant turn."""
    return Turn("assistant", (Text(text),))


def with_input(instruction: str, given: str) -> str:
    """Join instruction and input as the instruction-tuning triple does: a blank line between, none if one is empty."""
    return "\n\n".join(text for text in (instruction, given) if text)
