"""What a teacher is asked and what it replies.

Owns Request, Draw, Reply and the Teacher protocol. A request is identified by its content (messages with the digests of
their images, and how tokens are drawn), never by its place in a list, so a journal can be its cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from mmit.data.image_identity import image_digest
from mmit.records import Image, Text, Turn

Finish = Literal["stop", "length", "refused", "unrecorded"]


@dataclass(frozen=True)
class Draw:
    """How the tokens of an answer are drawn; `seed` makes two draws of one prompt differ.

    `max_tokens` 0 draws nothing: the request's last turn is an answer, and what is asked is its likelihood. The reply's
    text is then {"loss": mean over the tokens, in nats, "tokens": number} as JSON.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One question to a teacher. `purpose` (write, classify, judge, ...) is for the ledger, not part of the digest."""

    messages: tuple[Turn, ...]
    draw: Draw = Draw()
    purpose: str = "write"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Messages and draw as JSON values, images as their SHA-256. Raises ImageError."""
        turns = [{"role": turn.role, "parts": [_part(part) for part in turn.parts]} for turn in self.messages]
        return {"messages": turns, "draw": asdict(self.draw) | {"stop": list(self.draw.stop)}}

    @cached_property
    def digest(self) -> str:
        """32 hex digits that stand for the content."""
        text = json.dumps(self.facts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def text(self) -> str:
        """The text of the last turn."""
        return self.messages[-1].text


@dataclass(frozen=True)
class Reply:
    """A teacher's answer. Token counts are the server's own; None where it does not state them.

    `thought` is the reasoning before the answer, "" where there is none or where it stands in `text` still.
    """

    id: str
    teacher: str
    text: str
    finish: Finish = "stop"
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    seconds: float = 0.0
    attempts: int = 1
    cost: float | None = None
    thought: str = ""

    @property
    def tokens(self) -> int:
        """Tokens read and written, as far as stated."""
        return (self.prompt_tokens or 0) + (self.new_tokens or 0)


class Teacher(Protocol):
    """A model that answers requests.

    Attributes:
        name: what rows and the ledger call it.
        identity: what tells its replies from another model's: part of a reply's id.
        terms: SPDX expression of the terms of its outputs; None if nobody stated them.
        price: {"input", "output"} per million tokens, or {}.
    """

    name: str
    identity: str
    terms: str | None
    price: Mapping[str, float]

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Yield replies as they finish. Requests are taken from the iterable only when they can be sent."""
        ...


def user(*parts: Image | str) -> tuple[Turn, ...]:
    """Return the messages of one user turn."""
    return (Turn("user", tuple(Text(part) if isinstance(part, str) else part for part in parts)),)


def _part(part: Image | Text) -> dict[str, str]:
    if isinstance(part, Text):
        return {"text": part.text}
    return {"image": image_digest(part)}
