"""Importers: the rows of the field's data files become Records.

One small function per format, in the dict FORMATS, each (row, image_root) -> Record; `import_file` runs one
over a JSON or JSONL file. "<image>" is a marker here and only here: afterwards images are parts. Never opens
a picture, never mends a broken row, never loses a key: what a Record has no place for goes into its meta.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from mmit.data.easy_vqa import easy_vqa, easy_vqa_captions
from mmit.errors import ConfigError, ImageError, RecordError, nearest
from mmit.records import Image, OnBad, Part, Record, Text, Turn, image_at, json_lines, short

__all__ = ["FORMATS", "detect_format", "easy_vqa", "easy_vqa_captions", "import_file"]

MARKER = "<image>"
_LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_SHAREGPT_ROLES = _LLAVA_ROLES | {
    "user": "user",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
_MESSAGE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Dialogue = list[tuple[str, str]]


def llava(row: dict[str, Any], *, image_root: str = "") -> Record:
    """LLaVA: {"id", "image": path or list, "conversations": [{"from": "human"|"gpt", "value"}]}.

    Without `image` the row is text-only. As in LLaVA, a single image moves to the front of its turn, whose
    text is stripped (a newline between them is the chat format's affair), and a leading gpt turn is dropped;
    its text stays in meta["dropped_leading_turn"], so that drops can be counted. Several images stay where
    their markers are, the text between them unchanged. One image without a marker opens the first human turn.
    Raises RecordError if markers and images differ in number, or if a marker is not in a human turn.
    """
    images = _image_list(row, image_root)
    dialogue, meta = _from_value(row, _LLAVA_ROLES)
    if images is None and any(MARKER in text for _, text in dialogue):
        raise RecordError(
            f"the text has {MARKER} but the row has no 'image'",
            remedy=f'Add "image": "path", or "image": [] if {MARKER} is meant as ordinary text.',
        )
    return Record(_place_images(dialogue, images), id=_id(row), meta=meta)


def sharegpt(row: dict[str, Any], *, image_root: str = "") -> Record:
    """ShareGPT: like LLaVA with more speaker names, and an optional `system` text beside `conversations`.

    "<image>" is a marker only in rows with `image` or `images`; elsewhere it is text.
    """
    dialogue, meta = _from_value(row, _SHAREGPT_ROLES)
    system = meta.pop("system", None)
    if system:
        dialogue.insert(0, ("system", _string(system, "system")))
    return Record(_place_images(dialogue, _image_list(row, image_root)), id=_id(row), meta=meta)


def alpaca(row: dict[str, Any], *, image_root: str = "") -> Record:
    """Alpaca: {"instruction", "input", "output"}, optionally `system`, `history` ([[q, a], ...]) and `image`.

    The user says the instruction and, if there is an input, a blank line and the input.
    """
    dialogue: Dialogue = []
    if row.get("system"):
        dialogue.append(("system", _string(row["system"], "system")))
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError("'history' is not a list of pairs", remedy="Write [[question, answer], ...].")
        dialogue += [("user", _string(pair[0], "history")), ("assistant", _string(pair[1], "history"))]
    text = _string(row.get("instruction"), "instruction")
    if row.get("input"):
        text += "\n\n" + _string(row["input"], "input")
    dialogue += [("user", text), ("assistant", _string(row.get("output"), "output"))]
    meta = _rest(row, "system", "history", "instruction", "input", "output")
    return Record(_place_images(dialogue, _image_list(row, image_root)), id=_id(row), meta=meta)


def messages(row: dict[str, Any], *, image_root: str = "") -> Record:
    """OpenAI messages: {"messages": [{"role", "content": text or a list of text and image_url parts}]}.

    An image's URL is a path, file:// or a base64 data: URL; its `detail` is not kept. Raises RecordError for
    http(s) URLs, tools and messages of weight 0, none of which a Record can express.
    """
    key = "messages" if "messages" in row else "conversations"
    turns, meta = [], _rest(row, key)
    for number, message in enumerate(_dicts(row, key), 1):
        role = _role(message.get("role"), _MESSAGE_ROLES, number)
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                remedy = "Records know no tools: leave the record out."
                raise RecordError(f"message {number} has {name}", remedy=remedy)
        content = message.get("content")
        if isinstance(content, list):
            parts = tuple(_content_part(part, image_root, number) for part in content)
        else:
            parts = (Text(_string(content, f"content of message {number}")),)
        turns.append(Turn(cast(Any, role), parts))
    _keep_turn_keys(meta, row[key], ("role", "content"))
    return Record(tuple(turns), id=_id(row), meta=meta)


def mmit_row(row: dict[str, Any], *, image_root: str = "") -> Record:
    """mmit's own rows, as `mmit.records.write_jsonl` writes them."""
    return Record.from_json(row, root=image_root)


FORMATS: dict[str, Callable[..., Record]] = {
    "llava": llava,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "messages": messages,
    "mmit": mmit_row,
}


def import_file(
    path: str | os.PathLike[str],
    format: str,
    *,
    image_root: str | os.PathLike[str] | None = None,
    source: str | None = None,
    licence: str | None = None,
    check_images: bool = False,
    on_bad: OnBad | None = None,
) -> Iterator[Record]:
    """Yield the records of a JSON or JSONL file in one of FORMATS.

    JSONL is streamed; a JSON list has to be loaded whole. Relative image paths start at `image_root`, by
    default the file's folder. `source` (by default the path), `licence` and the row's line, or position in a
    list, are noted where a row does not state its own. `check_images` asks for every image file to exist.
    A bad row raises RecordError naming file and row or, with `on_bad`, is handed to it and left out, for the
    caller to count; a list that is not JSON always raises. Unknown format: ConfigError.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown data format '{format}'", remedy=nearest(format, FORMATS))
    name = os.fspath(path)
    root = os.path.dirname(name) if image_root is None else os.fspath(image_root)

    def build(row: Any, number: int) -> Record:
        if not isinstance(row, dict):
            raise RecordError(f"found a {type(row).__name__}, not an object", remedy=_EXPECTED)
        record = FORMATS[format](row, image_root=root)
        if not record.source and record.row is None:
            record = replace(record, source=source or name, row=number)
        record = record if record.licence else replace(record, licence=licence)
        record.validate(for_training=None)
        if check_images:
            _check_images(record)
        return record

    return _import(name, build, on_bad)


def _import(path: str, build: Callable[[Any, int], Record], on_bad: OnBad | None) -> Iterator[Record]:
    for number, row in _rows(path):
        try:
            if isinstance(row, RecordError):
                raise row
            record = build(row, number)
        except RecordError as error:
            bad = _at(error, f"{path}:{number}", row)
            if on_bad is None:
                raise bad from error
            on_bad(bad)
        else:
            yield record


def _at(error: RecordError, place: str, row: Any) -> RecordError:
    """Say in which file and row `error` arose; the place inside the row, ": turn 2", is kept."""
    name = short(row["id"]) if isinstance(row, dict) and row.get("id") else ""
    inside = error.where.removeprefix("record") if error.where.startswith("record:") else ""
    where = f"{place} ({name}){inside}" if name else place + inside
    return type(error)(error.problem, where=where, remedy=error.remedy)


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """Yield (line or position from 1, value), the value being a RecordError for a line that is not JSON."""
    try:
        with open(path, "rb") as file:
            is_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        is_list = False  # json_lines words the error
    if not is_list:
        yield from json_lines(path)
        return
    try:
        rows = json.loads(Path(path).read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        where, problem = f"{path}:{error.lineno}", f"not JSON: {error.msg} at column {error.colno}"
        remedy = "The file begins like a JSON list: mend this line, or write one object per line."
        raise RecordError(problem, where=where, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {short(str(error))}"
        raise RecordError(problem, where=path, remedy="Save the list as JSON in UTF-8.") from error
    yield from enumerate(rows, 1)


_EXPECTED = (
    "Each row must be an object with 'conversations' (llava, sharegpt), 'messages' (messages), "
    "'instruction' and 'output' (alpaca) or 'turns' (mmit)."
)


def detect_format(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return (name in FORMATS, the reason) from the keys of the first row; RecordError if they fit none.

    LLaVA and ShareGPT rows look alike, so the first 1000 rows are searched for images and for speaker names.
    """
    name = os.fspath(path)
    rows = [row for _, row in islice(_rows(name), 1000)]
    first = rows[0] if rows else {}
    if isinstance(first, RecordError):
        raise first
    keys = first.keys() if isinstance(first, dict) else ()
    if "turns" in keys:
        return "mmit", "the first row has 'turns'"
    if "messages" in keys:
        return "messages", "the first row has 'messages'"
    if "conversations" in keys:
        dicts = [row for row in rows if isinstance(row, dict)]
        turns = [t for row in dicts for t in row.get("conversations") or () if isinstance(t, dict)]
        if turns and "role" in turns[0]:
            return "messages", "the first row has 'conversations' whose turns have 'role'"
        if not {str(turn.get("from")) for turn in turns} <= _LLAVA_ROLES.keys():
            return "sharegpt", "'conversations' has speakers other than human, gpt and system"
        if any(key in row for row in dicts for key in ("image", "images")):
            return "llava", "rows have 'conversations' and 'image'"
        return "sharegpt", f"rows have 'conversations', and none of the first {len(rows)} an 'image'"
    if "instruction" in keys and "output" in keys:
        return "alpaca", "the first row has 'instruction' and 'output'"
    problem = f"cannot tell the format: the first row has the keys {short(list(keys))}" if rows else "no rows"
    raise RecordError(problem, where=name, remedy=_EXPECTED)


def _from_value(row: dict[str, Any], roles: dict[str, str]) -> tuple[Dialogue, dict[str, Any]]:
    """Read `conversations`; return the dialogue, and the meta with a dropped leading assistant turn."""
    turns = _dicts(row, "conversations")
    dialogue = []
    for number, turn in enumerate(turns, 1):
        role = _role(turn.get("from"), roles, number)
        dialogue.append((role, _string(turn.get("value"), f"value of turn {number}")))
    meta = _rest(row, "conversations")
    _keep_turn_keys(meta, turns, ("from", "value"))
    start = 1 if dialogue[0][0] == "system" else 0
    if len(dialogue) > start and dialogue[start][0] == "assistant":
        meta["dropped_leading_turn"] = dialogue.pop(start)[1]
    return dialogue, meta


def _place_images(dialogue: Dialogue, images: list[Image] | None) -> tuple[Turn, ...]:
    """Turn "<image>" markers into the images; without images they are text."""
    if not images:
        return tuple(Turn(cast(Any, role), (Text(text),)) for role, text in dialogue)
    for number, (role, text) in enumerate(dialogue, 1):
        if MARKER in text and role != "user":
            remedy = "Only a human turn shows images: move or remove the marker."
            raise RecordError(f"turn {number} ({role}) has {MARKER}", remedy=remedy)
    count = sum(text.count(MARKER) for _, text in dialogue)
    if count == 0 and len(images) == 1:
        first = next((n for n, (role, _) in enumerate(dialogue) if role == "user"), 0)
        dialogue = [(role, MARKER + text if n == first else text) for n, (role, text) in enumerate(dialogue)]
    elif count != len(images):
        remedy = f"Write one {MARKER} per image where it belongs, or correct the list of images."
        raise RecordError(f"the text has {count} {MARKER} but the row {len(images)} images", remedy=remedy)
    left, turns = iter(images), []
    for role, text in dialogue:
        if MARKER not in text:
            parts: list[Part] = [Text(text)]
        elif len(images) == 1:
            parts = [next(left), Text(text.replace(MARKER, "").strip())]
        else:
            pieces = text.split(MARKER)
            parts = [Text(pieces[0])]
            for piece in pieces[1:]:
                parts += [next(left), Text(piece)]
        kept = tuple(part for part in parts if part != Text("") or len(parts) == 1)
        turns.append(Turn(cast(Any, role), kept))
    return tuple(turns)


def _image_list(row: dict[str, Any], root: str) -> list[Image] | None:
    """Return the images of `image` or `images`; None if the row has neither key."""
    keys = [key for key in ("image", "images") if key in row]
    if len(keys) == 2:
        raise RecordError("the row has both 'image' and 'images'", remedy="Keep one of them.")
    if not keys:
        return None
    value = row[keys[0]]
    paths = [] if value is None else value if isinstance(value, list) else [value]
    return [image_at(path, root) for path in paths]


def _content_part(part: Any, root: str, number: int) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return Text(_string(part.get("text"), f"text of message {number}"))
    if kind != "image_url":
        remedy = 'Parts are {"type": "text", "text"} and {"type": "image_url", "image_url": {"url"}}.'
        raise RecordError(f"message {number} has a part of type '{short(kind)}'", remedy=remedy)
    value = part.get("image_url")
    url = _string(value.get("url") if isinstance(value, dict) else value, f"image_url of message {number}")
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not marked as base64")
            return Image(base64.b64decode(data, validate=True))
        except ValueError as error:
            remedy = "Write data:image/png;base64, and the picture's bytes in base64."
            raise RecordError(f"message {number} has a broken data: URL: {error}", remedy=remedy) from error
    if url.startswith("file://"):
        split = urlsplit(url)
        if split.netloc not in ("", "localhost"):
            problem = f"message {number} has a file:// URL of the host '{short(split.netloc)}'"
            raise RecordError(problem, remedy="Write file:/// and the absolute path.")
        url = unquote(split.path)
    return image_at(url, root)


def _check_images(record: Record) -> None:
    paths = [image.source for image in record.images if isinstance(image.source, str)]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        names = ", ".join(short(path, 60) for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        remedy = "Fetch the files, or set image_root to the folder that the paths start at."
        raise ImageError(f"{len(missing)} image files are missing: {names}", remedy=remedy)


def _dicts(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise RecordError(f"'{key}' is not a list of objects, or is empty", remedy=_EXPECTED)
    return value


def _role(name: Any, roles: dict[str, str], number: int) -> str:
    if not isinstance(name, str) or name not in roles:
        raise RecordError(f"turn {number} is said by '{short(name)}'", remedy=nearest(str(name), roles))
    return roles[name]


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{what} is '{short(value)}', not text", remedy="Write it as a JSON string.")
    return value


def _id(row: dict[str, Any]) -> str:
    return "" if row.get("id") is None else str(row["id"])


def _rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in (*used, "id", "image", "images")}


def _keep_turn_keys(meta: dict[str, Any], turns: Sequence[dict[str, Any]], used: Sequence[str]) -> None:
    """Keep further keys of turns in meta["turn_keys"]; refuse those that would change what is learnt."""
    extra = [{key: value for key, value in turn.items() if key not in used} for turn in turns]
    for number, keys in enumerate(extra, 1):
        for key in ("weight", "train", "loss"):
            if keys.get(key) not in (None, 1):
                remedy = "mmit learns every answer: remove the key, or end the record before this turn."
                raise RecordError(f"turn {number} has {key} {short(keys[key])}", remedy=remedy)
    if any(extra):
        meta["turn_keys"] = extra
