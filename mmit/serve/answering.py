"""One request to an engine and what comes back: the question, the pieces of its answers, how each ended.

Owns the way from a sequence of new token ids to events: text in pieces that add up to the answer and never end inside a
character or a stop text, log-probabilities beside it. Knows no model's weights and no queue of requests.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mmit.data.prompts import ask_messages
from mmit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from mmit.data.answers import AnswerText
    from mmit.data.preparation import ImagePreparation
    from mmit.data.prompts import Prompt, PromptMaker
    from mmit.models.sampling import Sampling

Reason = Literal["stop", "length", "cancelled", "error", "timeout"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a conversation, or a text to continue. None stands for the model's own default.

    Attributes:
        model: a name that the engine serves.
        messages: as `Model.chat` takes them, pictures as PIL pictures or bytes; None where `prompt` is given.
        prompt: a text as it is, without a chat template; its control tokens are read as such.
        max_tokens: most tokens of an answer; the end of the model's context ends it sooner.
        temperature, top_p, top_k: see `mmit.models.sampling.Sampling`.
        stop: texts that end an answer and are left out of it.
        seed: equal seeds draw equal answers, whatever else runs; None draws anew each time.
        n: answers to the same prompt.
        logprobs: likeliest tokens to give beside each chosen one (0: only the chosen one's), None for none.
        timeout_s: seconds from `submit` after which what is not finished ends.
    """

    model: str
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log-probability under the model's own distribution, and the likeliest at its place.

    `text` may hold replacement characters where a token is a part of a character; `data` are its bytes.
    """

    text: str
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the answer `index`; pieces add up to it. `tokens` only where log-probabilities were asked for."""

    index: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The last event of the answer `index`.

    Attributes:
        reason: "stop" (by itself or at a stop text), "length", "cancelled", "timeout", "error".
        error: what went wrong, with the remedy; None but for "error" and "timeout".
        prompt_tokens: tokens of the prompt. image_tokens: of them, those of pictures.
        cached_tokens: of them, those that were not computed for this request.
        completion_tokens: tokens of the answer.
    """

    index: int
    reason: Reason
    error: str | None = None
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


Event = Piece | End


class Answering:
    """The answers to one request while they are written. Every method may be called from any thread.

    Attributes:
        ask: the request. prompt_tokens, image_tokens: known from the start.
        started: `time.monotonic()` of `submit`. first_token_s: seconds until the first token, None before.
    """

    def __init__(self, ask: Ask, *, prompt_tokens: int, image_tokens: int) -> None:
        self.ask, self.prompt_tokens, self.image_tokens = ask, prompt_tokens, image_tokens
        self.started = time.monotonic()
        self.first_token_s: float | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._open = set(range(ask.n))  # the answers whose End has not been put; only the engine's thread changes it
        self._unread = ask.n  # Ends that the reader has not taken
        self._cancelled = threading.Event()
        self._listener: Callable[[], None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return not self._open

    def cancel(self) -> None:
        """End every answer that still runs or waits, with the reason "cancelled"."""
        self._cancelled.set()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` from the engine's thread whenever there may be events to `get`; at once the first time."""
        self._listener = listener
        listener()

    def get(self, timeout: float | None = 0.0) -> Event | None:
        """Return the next event; None where there is none within `timeout` seconds (None: wait for one)."""
        try:
            event = self._events.get(block=timeout != 0, timeout=timeout)
        except queue.Empty:
            return None
        self._unread -= isinstance(event, End)
        return event

    def events(self) -> Iterator[Event]:
        """Every event until all answers have ended."""
        while self._unread:
            event = self.get(None)
            if event is not None:
                yield event

    def put(self, event: Event) -> None:
        """Add an event; for the engine alone. Nothing follows an answer's End."""
        if event.index not in self._open:
            return
        if isinstance(event, End):
            self._open.discard(event.index)
        self._events.put(event)
        if self._listener is not None:
            try:
                self._listener()
            except Exception:  # noqa: BLE001 - one that fails must not end the engine's thread
                self._listener = None


@dataclass(slots=True, eq=False)
class Answer:
    """One of the answers to a request, while it is written.

    Attributes:
        prompt: what it continues. pixels: of its pictures, by the key in `prompt`.
        draw: its own source of randomness. limit: most tokens. ids: those written so far.
    """

    answering: Answering
    index: int
    prompt: Prompt
    pixels: Mapping[Hashable, torch.Tensor]
    reader: AnswerText
    sampling: Sampling
    draw: torch.Generator
    limit: int
    ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    _sent: str = ""
    _tokens: list[tuple[TokenLogprob, int]] = field(default_factory=list)  # not put yet, and where its text ends

    def add(self, token: int, logprob: TokenLogprob | None = None) -> Reason | None:
        """Take a new token and put what text is settled by it; returns why the answer ends here, if it does."""
        self.ids.append(token)
        if self.answering.first_token_s is None:
            self.answering.first_token_s = time.monotonic() - self.answering.started
        if self.reader.stop and self.reader.ended(self.ids):
            return "stop"  # the token's text is in the stop text, wholly or in part
        if logprob is not None:
            self._tokens.append((logprob, len(self.reader.whole(self.ids))))
        if len(self.ids) >= self.limit:
            return "length"
        text = self.reader.settled(self.ids)
        if text.startswith(self._sent):
            self._put(text)
        return None

    def end(self, reason: Reason, error: str | None = None) -> None:
        """Put what is left of the text, and the end."""
        if reason in ("stop", "length"):
            self._put(self.reader.whole(self.ids), last=True)
        told = self.answering
        counts = {"prompt_tokens": told.prompt_tokens, "image_tokens": told.image_tokens}
        counts |= {"cached_tokens": self.cached_tokens, "completion_tokens": len(self.ids)}
        told.put(End(self.index, reason, error, **counts))

    def _put(self, text: str, *, last: bool = False) -> None:
        """Put what `text` has beyond what was sent, with the tokens whose text it holds."""
        new = text[len(self._sent) :]
        count = sum(end <= len(text) for _, end in self._tokens)
        tokens = tuple(token for token, _ in self._tokens[:count])
        if new or (last and tokens):
            del self._tokens[:count]
            self._sent = text
            self.answering.put(Piece(self.index, new, tokens))


def prompt_of(ask: Ask, maker: PromptMaker) -> Prompt:
    """Make the prompt of a request. Raises ConfigError and RecordError."""
    if (ask.messages is None) == (ask.prompt is None):
        raise ConfigError("a request has messages or a prompt, one of them", remedy="Leave the other out.")
    if ask.messages is not None:
        return maker.question(ask_messages(ask.messages), 0)
    ids = maker.tokenizer(ask.prompt).input_ids
    if not ids:
        raise ConfigError("the prompt is empty", remedy="Give a text to continue.")
    return maker.tokens(ids, None)


def with_pixels(prompt: Prompt, preparation: ImagePreparation | None) -> tuple[Prompt, dict[Hashable, torch.Tensor]]:
    """Name the pictures of a prompt by their pixels, so that equal ones are equal; and these pixels.

    Raises:
        ImageError: a picture cannot be read.
    """
    names: dict[Hashable, Hashable] = {}
    pixels: dict[Hashable, torch.Tensor] = {}
    for key, shown in prompt.pictures.items():
        assert preparation is not None
        made = preparation.pixels(shown.image, where=shown.where)
        digest = hashlib.blake2b(made.numpy().tobytes(), digest_size=16)
        digest.update(repr((tuple(made.shape), shown.spread.grid)).encode())
        names[key] = digest.hexdigest()
        pixels[names[key]] = made
    samples = tuple(replace(s, images=tuple(names[key] for key in s.images)) for s in prompt.samples)
    pictures = {names[key]: shown for key, shown in prompt.pictures.items()}
    return replace(prompt, samples=samples, pictures=pictures), pixels
