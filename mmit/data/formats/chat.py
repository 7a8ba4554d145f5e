"""Conversations: LLaVA and its kin, ShareGPT, OpenAI messages, mmit's own rows.

Each function makes one Record of one row. "<image>" is a marker here and only here: afterwards images are parts.
Refuses what a Record cannot express (tools, messages that are not learnt) instead of leaving it out.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from mmit.data.formats.common import Format, Row, by_name, id_of, image_part, images_of, objects_of, rest, text_of
from mmit.errors import RecordError
from mmit.records import Image, Part, Record, Text, Turn, short

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
MESSAGE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Dialogue = list[tuple[str, str]]


def llava(row: Row, *, image_root: str = "") -> Record:
    """LLaVA: {"id", "image": path or list, "conversations": [{"from": "human"|"gpt", "value"}]}.

    The files: blip_laion_cc_sbu_558k.json, llava_instruct_150k.json, llava_v1_5_mix665k.json, and those of
    ShareGPT4V. Without `image` the row is text-only (40,688 rows of mix665k). As in LLaVA, a single image moves to
    the front of its turn, whose text is stripped (a newline between them is the chat format's affair), and a
    leading gpt turn is dropped; its text stays in meta["dropped_leading_turn"], so that drops can be counted.
    Several images stay where their markers are, the text between them unchanged. One image without a marker opens
    the first human turn. Raises RecordError if markers and images differ in number, or if a marker is not in a
    human turn.
    """
    images = images_of(row, image_root)
    dialogue, meta = read_turns(row, _LLAVA_ROLES)
    if images is None and any(MARKER in text for _, text in dialogue):
        raise RecordError(
            f"the text has {MARKER} but the row has no 'image'",
            remedy=f'Add "image": "path", or "image": [] if {MARKER} is meant as ordinary text.',
        )
    return Record(place_images(dialogue, images), id=id_of(row), meta=meta)


def sharegpt(row: Row, *, image_root: str = "") -> Record:
    """ShareGPT: like LLaVA with more speaker names, and an optional `system` text beside `conversations`.

    "<image>" is a marker only in rows with `image` or `images`; elsewhere it is text, as it must be in the
    text-only part of ALLaVA (Evol-Instruct-GPT4-Turbo-143K.json), which quotes HTML.
    """
    dialogue, meta = read_turns(row, _SHAREGPT_ROLES)
    system = meta.pop("system", None)
    if system:
        dialogue.insert(0, ("system", text_of(system, "system")))
    return Record(place_images(dialogue, images_of(row, image_root)), id=id_of(row), meta=meta)


def messages(row: Row, *, image_root: str = "") -> Record:
    """OpenAI messages: {"messages": [{"role", "content": text or a list of text and image_url parts}]}.

    An image's URL is a path, file:// or a base64 data: URL; its `detail` is not kept. Pictures may also lie beside the
    messages, in `images`: then "<image>" marks their places in content that is text, and {"type": "image"} parts do in
    content that is a list (ms-swift, LLaMA-Factory, TRL). Raises RecordError for http(s) URLs, tools and messages of
    weight 0, none of which a Record can express, and if places and pictures differ in number.
    """
    key = "messages" if "messages" in row else "conversations"
    turns, meta = [], rest(row, key)
    beside = images_of(row, image_root) or []
    in_lists = any(isinstance(message.get("content"), list) for message in objects_of(row, key))
    left = iter(beside)
    for number, message in enumerate(objects_of(row, key), 1):
        role = by_name(message.get("role"), MESSAGE_ROLES, f"turn {number} is said by")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                remedy = "Records know no tools: leave the record out."
                raise RecordError(f"message {number} has {name}", remedy=remedy)
        content = message.get("content")
        if isinstance(content, list):
            parts = tuple(_content_part(part, image_root, number, left) for part in content)
        else:
            parts = (Text(text_of(content, f"content of message {number}")),)
        turns.append(Turn(cast(Any, role), parts))
    _keep_turn_keys(meta, row[key], ("role", "content"))
    if beside and not in_lists:
        turns = list(place_images([(turn.role, turn.text) for turn in turns], beside))
    elif unused := len(list(left)):
        remedy = 'Give each its place in the content: {"type": "image"}.'
        raise RecordError(f"{unused} of {len(beside)} images have no place in the messages", remedy=remedy)
    return Record(tuple(turns), id=id_of(row), meta=meta)


def mmit_row(row: Row, *, image_root: str = "") -> Record:
    """mmit's own rows, as `mmit.records.write_jsonl` writes them."""
    return Record.from_json(row, root=image_root)


def read_turns(row: Row, roles: dict[str, str] | None = None) -> tuple[Dialogue, Row]:
    """Read `conversations`; return the dialogue, and the meta with a dropped leading assistant turn.

    `roles` maps the file's speaker names to ours, by default LLaVA's.
    """
    turns = objects_of(row, "conversations")
    dialogue = []
    for number, turn in enumerate(turns, 1):
        role = by_name(turn.get("from"), roles or _LLAVA_ROLES, f"turn {number} is said by")
        dialogue.append((role, text_of(turn.get("value"), f"value of turn {number}")))
    meta = rest(row, "conversations")
    _keep_turn_keys(meta, turns, ("from", "value"))
    start = 1 if dialogue[0][0] == "system" else 0
    if len(dialogue) > start and dialogue[start][0] == "assistant":
        meta["dropped_leading_turn"] = dialogue.pop(start)[1]
    return dialogue, meta


def place_images(dialogue: Dialogue, images: list[Image] | None) -> tuple[Turn, ...]:
    """Turn "<image>" markers into the images; without images they are text."""
    if not images:
        return tuple(Turn(cast(Any, role), (Text(text),)) for role, text in dialogue)
    for number, (role, text) in enumerate(dialogue, 1):
        if MARKER in text and role != "user":
            remedy = "Only a human turn shows images: move or remove the marker."
            raise RecordError(f"turn {number} ({role}) has {MARKER}", remedy=remedy)
    count = sum(text.count(MARKER) for _, text in dialogue)
    if count == 0 and len(images) == 1:
        return images_first(dialogue, images, strip=True)
    if count != len(images):
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
        turns.append(Turn(cast(Any, role), _without_empty(parts)))
    return tuple(turns)


def images_first(dialogue: Dialogue, images: Sequence[Image], *, strip: bool = False) -> tuple[Turn, ...]:
    """Let the images open the first user turn, whatever the text says; `strip` its text as LLaVA does."""
    turns, left = [], list(images)
    for role, text in dialogue:
        parts: list[Part] = [Text(text)]
        if role == "user" and left:
            parts, left = [*left, Text(text.strip() if strip else text)], []
        turns.append(Turn(cast(Any, role), _without_empty(parts)))
    return tuple(turns)


def _without_empty(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part != Text("") or len(parts) == 1)


def _content_part(part: Any, root: str, number: int, beside: Iterator[Image]) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        if part.get("image") is not None:
            return image_part(part["image"], root)
        found = next(beside, None)
        if found is None:
            remedy = "Put the picture into the part, or one for each part into images."
            raise RecordError(f"message {number} has an image part without a picture", remedy=remedy)
        return found
    if kind == "text":
        return Text(text_of(part.get("text"), f"text of message {number}"))
    if kind != "image_url":
        remedy = 'A part is {"type": "text", "text"}, {"type": "image"} or {"type": "image_url", "image_url": {"url"}}.'
        raise RecordError(f"message {number} has a part of type '{short(kind)}'", remedy=remedy)
    value = part.get("image_url")
    url = text_of(value.get("url") if isinstance(value, dict) else value, f"image_url of message {number}")
    return image_at_url(url, number, root=root)


def image_at_url(url: str, number: int, *, root: str = "") -> Image:
    """The picture of message `number` at a path, a file:// URL or a base64 data: URL. Raises RecordError."""
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
        url = _file_url(url, number)
    return image_part(url, root)


def _file_url(url: str, number: int) -> str:
    try:
        split = urlsplit(url)
    except ValueError as error:
        problem = f"message {number} has a broken file:// URL: {error}"
        raise RecordError(problem, remedy="Write file:/// and the absolute path.") from error
    if split.netloc not in ("", "localhost"):
        problem = f"message {number} has a file:// URL of the host '{short(split.netloc)}'"
        raise RecordError(problem, remedy="Write file:/// and the absolute path.")
    return unquote(split.path)


def _keep_turn_keys(meta: Row, turns: Sequence[Row], used: Sequence[str]) -> None:
    """Keep further keys of turns in meta["turn_keys"]; refuse those that would change what is learnt."""
    extra = [{key: value for key, value in turn.items() if key not in used} for turn in turns]
    for number, keys in enumerate(extra, 1):
        for key in ("weight", "train", "loss"):
            if keys.get(key) not in (None, 1):
                remedy = "mmit learns every answer: remove the key, or end the record before this turn."
                raise RecordError(f"turn {number} has {key} {short(keys[key])}", remedy=remedy)
    if any(extra):
        meta["turn_keys"] = extra


FORMATS = {
    "llava": Format("LLaVA conversations, with or without images", llava),
    "sharegpt4v": Format("ShareGPT4V, rows as LLaVA's", llava, licence="CC-BY-NC-4.0"),
    "allava": Format("ALLaVA, rows as LLaVA's; its text-only part quotes <image>", sharegpt),
    "sharegpt": Format("conversations with more speaker names than LLaVA's", sharegpt),
    "messages": Format("OpenAI messages with image_url parts, or images beside them", messages, detect=("messages",)),
    "mmit": Format("mmit's own records", mmit_row, detect=("turns",)),
}
