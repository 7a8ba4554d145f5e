"""Conversations given from Python: messages as OpenAI's API and transformers' pipelines take them, pairs, bare texts.

In: what a caller hands over. Out: turns of a Record. Every type is looked at before anything is iterated, because a
string and a mapping can be iterated too. Refuses tools, audio, video and pictures that would have to be downloaded.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mmit.data.formats.chat import MESSAGE_ROLES
from mmit.data.formats.pictures import image_at_url
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Part, Record, Text, Turn, short

EXAMPLE = 'Write messages=[{"role": "user", "content": "..."}].'
PARTS = 'A part is {"type": "text", "text"}, {"type": "image", "image"} or {"type": "image_url", "image_url": {"url"}}.'
# Keys under which an image part of transformers may hold its picture.
_HOLDS = ("image", "url", "path", "base64")


def turns_of(messages: Any, *, name: str = "messages") -> tuple[Turn, ...]:
    """Read messages: [{"role", "content"}], whose content is a text or a list of parts.

    A picture is a PIL picture, encoded bytes, a path, a file:// or a base64 data: URL, under "image", "url" or "path"
    of an image part, or under "image_url" as OpenAI writes it.

    Raises:
        ConfigError: not a list of messages. RecordError: a message that cannot be read, by its number.
    """
    # A text is a sequence of texts to Python: without this a question given alone would be read letter by letter.
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ConfigError(f"{name} is a {type(messages).__name__}, not a list of messages", remedy=EXAMPLE)
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            problem = f"message {number} is a {type(message).__name__}, not a mapping with role and content"
            raise ConfigError(problem, where=name, remedy=EXAMPLE)
        turns.append(_turn(message, number))
    return tuple(turns)


def history_turns(history: Any) -> tuple[Turn, ...]:
    """Read earlier turns: messages (see `turns_of`), or (user, assistant) pairs of texts. Raises ConfigError."""
    remedy = 'Give (user, assistant) pairs of texts, or messages [{"role", "content"}, ...].'
    if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Sequence):
        raise ConfigError(f"history is a {type(history).__name__}, not a list", remedy=remedy)
    # One mapping is enough: a list of both kinds is then refused by the message that is none.
    if any(isinstance(entry, Mapping) for entry in history):
        return turns_of(history, name="history")
    turns: list[Turn] = []
    for number, pair in enumerate(history, 1):
        texts = () if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence) else tuple(pair)
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"entry {number} of history is {short(pair)}, not two texts", remedy=remedy)
        turns += [Turn("user", (Text(texts[0]),)), Turn("assistant", (Text(texts[1]),))]
    return tuple(turns)


def is_messages(value: Any) -> bool:
    """Tell whether a value looks like messages: a list that begins with a mapping with a role."""
    # By the first entry alone: this only decides which error is told, and a whole list of pictures need not be looked
    # through.
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and "role" in first


def check_records(records: Any) -> None:
    """Refuse what is not a list of Records, saying what it is and how a question is asked. Raises ConfigError."""
    if isinstance(records, Record):
        raise ConfigError("records is one Record, not a list of them", remedy="Write generate([record]).")
    if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Sequence):
        problem = f"records is a {type(records).__name__}, not a list of Records"
        raise ConfigError(problem, remedy="Write generate([mmit.generate.ask(images, text)]), or chat(images, text).")
    for number, record in enumerate(records, 1):
        if not isinstance(record, Record):
            problem = f"entry {number} of records is a {type(record).__name__}, not a Record"
            remedy = "Build it with mmit.generate.ask(images, text), or ask one question with chat(messages=[...])."
            raise ConfigError(problem, remedy=remedy)


def _turn(message: Mapping[str, Any], number: int) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in MESSAGE_ROLES:
        remedy = "Tools are not supported: leave these messages out." if role == "tool" else ""
        remedy = remedy or nearest(str(role), MESSAGE_ROLES)
        raise RecordError(f"message {number} has the role {short(role)!r}", remedy=remedy)
    # Refused and not left out: the answer that follows would speak of a result that the model was not shown.
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise RecordError(f"message {number} has {name}", remedy="Tools are not supported: leave the message out.")
    content = message.get("content")
    if isinstance(content, str):
        parts: tuple[Part, ...] = (Text(content),)
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = tuple(_part(part, number) for part in content)
    else:
        problem = f"content of message {number} is a {type(content).__name__}"
        raise RecordError(problem, remedy="Make it a text or a list of parts.")
    return Turn(cast("Any", MESSAGE_ROLES[role]), parts)


def _part(part: Any, number: int) -> Part:
    if isinstance(part, str):
        return Text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image_url":
        value = part.get("image_url")
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str):
            raise RecordError(f"image_url of message {number} is {short(url)}, not a text", remedy=PARTS)
        return image_at_url(url, f"message {number}")
    if kind == "image":
        held = [(key, part[key]) for key in _HOLDS if part.get(key) is not None]
        if len(held) != 1:
            problem = f"an image part of message {number} holds {len(held)} pictures"
            raise RecordError(problem, remedy="Put exactly one into it: a PIL picture, bytes, a path or a data: URL.")
        return _image(*held[0], number)
    raise RecordError(f"message {number} has a part {short(part)}", remedy=PARTS)


def _image(key: str, value: Any, number: int) -> Image:
    if key == "base64":
        try:
            return Image(base64.b64decode(value, validate=True))
        except (TypeError, ValueError) as error:
            problem = f"an image part of message {number} is not base64: {error}"
            raise RecordError(problem, remedy="Encode the picture's bytes with base64.b64encode.") from error
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return image_at_url(value, f"message {number}") if isinstance(value, str) else Image(value)
