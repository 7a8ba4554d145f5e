"""Reading and checking of requests: JSON that a client wrote in, an `Ask` for the engine out.

Every parameter is read, known to be harmless, or refused by its name. What costs little is checked first: images are
read last. Knows no HTTP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mmit.data.formats.chat import MESSAGE_ROLES
from mmit.errors import nearest
from mmit.record_rules import JsonReader
from mmit.records import short
from mmit.serve.engine import Ask
from mmit.serve.refused import Refused

Read = Callable[[str, str], bytes]  # what a client names as an image and its place in the request -> its bytes

# Parameters that change nothing of an answer.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
# Parameters that mmit cannot honour -> the values by which they ask for nothing, besides null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
_COMMON = ("model", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "n", "logprobs", "stream")
CHAT = {*_COMMON, "messages", "max_completion_tokens", "top_logprobs", "stream_options"}
COMPLETION = {*_COMMON, "prompt", "stream_options"}
TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body: bytes of its JSON. values: of it, lists, objects and members. depth: of lists in lists.
        images: of one request. pixels: of one image. messages: of a conversation. text: characters of all texts.
        answers: n. tokens: of one answer. default_tokens: where it names none. stops: texts in stop.
    """

    body: int = 20 << 20
    values: int = 200_000
    depth: int = 24
    images: int = 8
    pixels: int = 40_000_000
    messages: int = 1000
    text: int = 1_000_000
    answers: int = 8
    tokens: int = 4096
    default_tokens: int = 512
    stops: int = 16


@dataclass(frozen=True)
class Wanted:
    """A request that was read: what the engine is asked, and how the client wants it told."""

    ask: Ask
    chat: bool
    stream: bool
    usage: bool  # at the end of a stream


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Read a body as a JSON object. Raises Refused."""
    remedy = "Send one JSON object in UTF-8"
    # A list of empty lists takes twenty times its bytes once it is read.
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > limits.values:
        raise Refused(400, f"the JSON has more than {limits.values:,} values", "Send less at once", code="too_large")
    try:
        value, twice = JsonReader().whole(body.decode())
    except RecursionError:
        value, twice = [[]], ""
        _fail("the JSON has lists in lists without end", "Send a flat one")
    except ValueError as error:
        raise Refused(400, f"not JSON: {short(str(error))}", remedy, code="invalid_json") from error
    if twice:
        _fail(f"the JSON has the key '{short(twice)}' twice", "Keep one of them", param=short(twice))
    if not isinstance(value, dict):
        raise Refused(400, f"the body is a JSON {_kind(value)}, not an object", remedy, code="invalid_json")
    level: list[Any] = [value]
    for _ in range(limits.depth):
        level = [
            below
            for one in level
            for below in (one.values() if isinstance(one, dict) else one)
            if isinstance(below, (dict, list))
        ]
        if not level:
            return value
    _fail(f"the JSON is more than {limits.depth} levels deep", "Send a flat one")


def read_chat(body: Mapping[str, Any], *, limits: Limits, read: Read, timeout_s: float) -> Wanted:
    """Read a request to /v1/chat/completions.

    Args:
        body: of the request, plain JSON. limits: of this server. read: opens a picture that a message names.
        timeout_s: seconds that the answer may take.

    Raises:
        Refused: with the status and the field that is wrong.
    """
    _known(body, CHAT)
    given = _Given(body)
    logprobs = given.flag("logprobs")
    top = given.whole("top_logprobs", 0, TOP_LOGPROBS)
    if top and not logprobs:
        _fail("top_logprobs is given without logprobs", "Set logprobs to true", param="top_logprobs")
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    options = _options(given, limits, name)
    stream, usage = _stream(given)
    messages = _messages(body, limits, read)
    ask = Ask(messages=messages, logprobs=(top or 0) if logprobs else None, timeout_s=timeout_s, **options)
    return Wanted(ask, chat=True, stream=stream, usage=usage)


def read_completion(body: Mapping[str, Any], *, limits: Limits, timeout_s: float) -> Wanted:
    """Read a request to /v1/completions: one text to continue. Raises Refused."""
    _known(body, COMPLETION)
    given = _Given(body)
    logprobs = given.whole("logprobs", 0, TOP_LOGPROBS)
    options = _options(given, limits, "max_tokens")
    stream, usage = _stream(given)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        remedy = "Give one text; send a request for each of several"
        _fail(f"prompt is {_named(prompt)}, not a text", remedy, param="prompt")
    _text(prompt, "prompt", _Room(limits))
    ask = Ask(prompt=prompt, logprobs=logprobs, timeout_s=timeout_s, **options)
    return Wanted(ask, chat=False, stream=stream, usage=usage)


def _known(body: Mapping[str, Any], own: set[str]) -> None:
    for name, value in body.items():
        if name in own or name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            raise Refused(
                400,
                f"unknown parameter '{short(name)}'",
                nearest(name[:80], own),
                param=short(name),
                code="unknown_parameter",
            )
        if value not in NEUTRAL[name]:
            problem = f"{name} is not supported"
            neutral = " or ".join(json.dumps(value) for value in NEUTRAL[name])
            remedy = f"Leave it out{f', or send {neutral}' if neutral else ''}"
            remedy += f"; whoever runs the server may have it passed over with --ignore {name}"
            raise Refused(400, problem, remedy, param=name, code="unsupported_parameter")


def _options(given: _Given, limits: Limits, tokens: str) -> dict[str, Any]:
    """What both kinds of request say about their answers."""
    model = given.body.get("model")
    if not isinstance(model, str) or len(model) > 300:
        _fail(f"model is {_named(model)}, not a name", "GET /v1/models lists the names", param="model")
    most = given.whole(tokens, 1, limits.tokens)
    return {
        "model": model,
        "max_tokens": min(limits.default_tokens, limits.tokens) if most is None else most,
        "temperature": given.number("temperature", 0, 100),
        "top_p": given.number("top_p", 0, 1, above=True),
        "top_k": given.whole("top_k", 0, 1 << 31),
        "stop": _stop(given.body.get("stop"), limits),
        "seed": given.whole("seed", -(1 << 63), (1 << 63) - 1),
        "n": given.whole("n", 1, limits.answers) or 1,
    }


def _stop(stop: Any, limits: Limits) -> tuple[str, ...]:
    texts = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in texts):
        _fail(
            "stop is no text of 1 to 1000 characters, nor a list of them", "Give texts, or leave it out", param="stop"
        )
    if len(texts) > limits.stops:
        _fail(f"stop has {len(texts)} texts, more than {limits.stops}", "Give fewer", param="stop")
    return tuple(texts)


def _stream(given: _Given) -> tuple[bool, bool]:
    stream, options = given.flag("stream"), given.body.get("stream_options")
    if options is None:
        return stream, False
    if not stream or not isinstance(options, dict):
        problem = "stream_options is no object" if stream else "stream_options is given without stream"
        _fail(problem, "Set stream to true, or leave it out", param="stream_options")
    for name, value in options.items():
        # Padding against eavesdroppers on lengths, which mmit does not send.
        if name != "include_obfuscation" and not (name == "include_usage" and isinstance(value, bool)):
            remedy = 'Write {"include_usage": true}'
            _fail(f"stream_options has {short(name)}: {short(value)}", remedy, param=f"stream_options.{short(name)}")
    return stream, options.get("include_usage", False)


@dataclass(frozen=True)
class _Given:
    """The parameters of a request by the kind of value they must have; null stands for none."""

    body: Mapping[str, Any]

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            _fail(f"{name} is {_named(value)}", "Give true or false", param=name)
        return bool(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.body.get(name)
        if value is None:
            return None
        # Some clients write 64.0.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            _fail(f"{name} is {_named(value)}", f"Give a whole number from {low} to {high}", param=name)
        return value

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        value = self.body.get(name)
        if value is None:
            return None
        sound = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not sound or not low <= value <= high or (above and value == low):
            told = f"above {low} and up to {high}" if above else f"from {low} to {high}"
            _fail(f"{name} is {_named(value)}", f"Give a number {told}", param=name)
        return float(value)


class _Room:
    """How many characters and images a request may still have."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.text, self.images = limits, limits.text, limits.images


def _messages(body: Mapping[str, Any], limits: Limits, read: Read) -> list[dict[str, Any]]:
    """Read a conversation; every image is read once all else is known to be right."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        remedy = 'Write "messages": [{"role": "user", "content": "..."}]'
        _fail(f"messages is {_named(messages)}, not a list of messages", remedy, param="messages")
    if len(messages) > limits.messages:
        _fail(f"{len(messages)} messages, more than {limits.messages}", "Leave early ones out", param="messages")
    room = _Room(limits)
    found = [_message(message, f"messages[{number}]", room) for number, message in enumerate(messages)]
    for message in found:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = read(*part["image"])
    return found


def _message(message: Any, place: str, room: _Room) -> dict[str, Any]:
    if not isinstance(message, dict):
        _fail(f"a message is {_named(message)}, not an object", 'Write {"role", "content"}', param=place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in MESSAGE_ROLES:
        tools = "Tools are not supported: leave the message out"
        remedy = tools if role in ("tool", "function") else nearest(str(role)[:40], MESSAGE_ROLES)
        _fail(f"the role is {_named(role)}", remedy, param=f"{place}.role")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in (None, [], {}, ""):
            _fail(f"a message has {short(name)}", "Leave it out", param=f"{place}.{short(name)}")
    if isinstance(content, str):
        _text(content, f"{place}.content", room)
        return {"role": role, "content": [{"type": "text", "text": content}]}
    if not isinstance(content, list):
        remedy = "Make it a text or a list of parts"
        _fail(f"the content is {_named(content)}", remedy, param=f"{place}.content")
    parts = [_part(part, f"{place}.content[{number}]", room) for number, part in enumerate(content)]
    if role != "user" and any(part["type"] == "image" for part in parts):
        _fail(f"an image in a message of the {role}", "Move it to the user's", param=f"{place}.content")
    return {"role": role, "content": parts}


def _part(part: Any, place: str, room: _Room) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        _text(part.get("text"), f"{place}.text", room)
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        held = part.get("image_url")
        if isinstance(held, dict):
            if held.get("detail") not in (None, "auto", "low", "high"):  # a wish: the model's own size is used
                _fail(f"detail is {_named(held['detail'])}", "Leave it out", param=f"{place}.image_url.detail")
            held = held.get("url")
        place = f"{place}.image_url.url"
    elif kind == "file":
        held = part.get("file")
        held = held.get("file_id") if isinstance(held, dict) else None
        place = f"{place}.file.file_id"
    else:
        remedy = (
            'A part is {"type": "text", "text"}, {"type": "image_url", "image_url": {"url"}} or '
            '{"type": "file", "file": {"file_id"}}'
        )
        _fail(f"a part of the type {_named(kind)}", remedy, param=place)
    if not isinstance(held, str) or not held:
        _fail(f"an image is {_named(held)}, not a text", "Give a data: URL or the id of a file", param=place)
    room.images -= 1
    if room.images < 0:
        _fail(f"more than {room.limits.images} images", "Send fewer", param=place)
    return {"type": "image", "image": (held, place)}


def _text(text: Any, place: str, room: _Room) -> None:
    if not isinstance(text, str):
        _fail(f"a text is {_named(text)}", "Make it a string", param=place)
    room.text -= len(text)
    if room.text < 0:
        problem = f"more than {room.limits.text:,} characters"
        raise Refused(400, problem, "Shorten the text", param=place, code="context_length_exceeded")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        _fail("half of a surrogate pair, which is no text", "Write it as UTF-8", param=place)


def _kind(value: Any) -> str:
    kinds: Sequence[tuple[type, str]] = ((str, "string"), (bool, "boolean"), (list, "list"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null" if value is None else "number")


def _named(value: Any) -> str:
    if value is None:
        return "missing"
    if value in ("", [], {}):
        return "empty"
    return f"'{short(value)}'" if isinstance(value, (str, int, float)) else f"a {_kind(value)}"


def _fail(problem: str, remedy: str, *, param: str | None = None) -> NoReturn:
    raise Refused(400, problem, remedy, param=param, code="invalid_value")
