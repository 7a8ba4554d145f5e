"""What a harness asks, in mmit's terms: contexts and messages become records, generation settings become options.

In: texts, pictures, messages and dicts as lmms-eval and lm-eval hand them over. Out: Records and a `Generation`.
Refuses what mmit does not do (video, sound, beams) instead of leaving it out. Imports no harness, runs no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text, Turn

CHAT = "mmit-chat:"  # begins a context that holds turns as JSON
_KNOWN = ("until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams")


@dataclass(frozen=True, slots=True)
class Generation:
    """How an answer is written; `ignored` are settings that mmit has no use for."""

    stop: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    ignored: tuple[str, ...] = ()


def generation(settings: Mapping[str, Any], *, max_new_tokens: int) -> Generation:
    """Read a task's generation settings; `max_new_tokens` holds where they name none.

    Without `do_sample` a temperature above 0 means sampling. Greedy decoding leaves temperature, top_p and top_k
    alone, whatever they are. Raises ConfigError for beams and for a value that is no number.
    """
    if _number(settings, "num_beams", 1) > 1:
        raise ConfigError("the task asks for beam search", where="num_beams", remedy="Pass --gen_kwargs num_beams=1.")
    until = settings.get("until") or ()
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    tokens = _number(settings, "max_gen_toks", _number(settings, "max_new_tokens", max_new_tokens))
    ignored = tuple(sorted(set(settings) - set(_KNOWN)))
    do_sample = settings.get("do_sample")
    heat = _number(settings, "temperature", 1.0 if do_sample else 0.0)
    if do_sample is False or heat <= 0:
        return Generation(stop, int(tokens), ignored=ignored)
    top_p, top_k = _number(settings, "top_p", 1.0), int(_number(settings, "top_k", 0))
    return Generation(stop, int(tokens), heat, top_p, top_k, ignored)


def _number(settings: Mapping[str, Any], key: str, default: float) -> float:
    value = settings.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{value!r} is no number", where=key, remedy="Check --gen_kwargs.") from error


def question(context: str, visuals: Sequence[Any] | None, *, name: str) -> Record:
    """Build the record of a context and its pictures, which come first. Raises RecordError for other media."""
    pictures = [_picture(visual, name=name) for visual in visuals or ()]
    return _record([Turn("user", (*pictures, Text(context)))], name)


def conversation(messages: Sequence[Mapping[str, Any]], *, name: str) -> Record:
    """Build the record of messages: {"role", "content": text, or parts {"type": "text" | "image", ...}}.

    Raises RecordError for video and sound, and for turns that make no question.
    """
    turns = []
    for message in messages:
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise RecordError(f"a message by '{role}'", where=name, remedy="Roles are system, user, assistant.")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append(Turn(role, tuple(_part(part, name=name) for part in parts)))
    return _record(turns, name)


def _record(turns: list[Turn], name: str) -> Record:
    record = Record(tuple(turns), name)
    record.validate(for_training=False)
    return record


def _part(part: Mapping[str, Any], *, name: str) -> Text | Image:
    kind = part.get("type")
    if kind == "text":
        return Text(part["text"])
    if kind != "image":
        raise _not_a_picture(f"a part of type '{kind}'", name)
    source = part.get("url", part.get("image"))
    return Image(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else _picture(source, name=name)


def _picture(visual: Any, *, name: str) -> Image:
    """Take a PIL picture. In a list of visuals a path is a video and a dict is sound, so both are refused."""
    if not isinstance(visual, PIL.Image.Image):
        raise _not_a_picture(f"a {type(visual).__name__} where a picture is expected", name)
    return Image(visual)


def _not_a_picture(what: str, name: str) -> RecordError:
    return RecordError(what, where=name, remedy="mmit sees pictures: choose tasks without video and sound.")


def pack_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Write messages as a context for a harness whose contexts are texts; `unpack_chat` reads it."""
    return CHAT + json.dumps(list(messages), ensure_ascii=False)


def unpack_chat(context: str, *, name: str) -> Record | None:
    """Return the record of a context that `pack_chat` wrote, None for a plain text."""
    if not context.startswith(CHAT):
        return None
    return conversation(json.loads(context.removeprefix(CHAT)), name=name)
