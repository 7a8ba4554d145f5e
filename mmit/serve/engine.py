"""Many questions to a model at once: a bounded queue, and one thread that answers what is in it.

Owns the order in which requests are answered and how each ends: by itself, at its limit, cancelled, out of time, with
an error. Takes requests that are read and checked already; gives the text of each answer in pieces that never end
inside a character. Knows no HTTP. Refuses a request before anything is computed: an unknown model, a full queue, a
prompt or picture that does not fit.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmit.data.answers import AnswerText
from mmit.data.prompts import Prompt, ask_messages
from mmit.errors import ConfigError, MmitError, nearest
from mmit.models.llm import context_length
from mmit.pictures import Pictures

if TYPE_CHECKING:
    from mmit.generate import Model
    from mmit.models.sampling import Sampling

MAX_TOKENS = 256  # of an answer that names no limit, as `Model.chat`
TICK = 0.02  # seconds between two looks at the queue while nothing runs and no one rings
Reason = Literal["stop", "length", "cancelled", "error", "timeout"]


class QueueFull(MmitError):
    """As many requests wait as may."""


class ModelUnknown(ConfigError):
    """No model of this name is served."""


class Closing(MmitError):
    """The engine takes no more requests."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a conversation, or a text to continue. None stands for the model's own default.

    Attributes:
        model: a name of `Engine.models`.
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
        self.started, self.first_token_s = time.monotonic(), None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._open = set(range(ask.n))  # the answers whose End has not been put; only the engine's thread changes it
        self._unread = ask.n  # Ends that the reader has not taken
        self._cancelled = threading.Event()
        self._listener: Callable[[], None] | None = None

    first_token_s: float | None

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

    def _put(self, event: Event) -> None:
        if isinstance(event, End):
            self._open.discard(event.index)
        self._events.put(event)
        if self._listener is not None:
            self._listener()


@dataclass(slots=True)
class _Sequence:
    """One answer of a request."""

    answering: Answering
    index: int
    prompt: Prompt
    reader: AnswerText
    sampling: Sampling
    limit: int
    ids: list[int] = field(default_factory=list)
    sent: str = ""

    def end(self, reason: Reason, error: str | None = None) -> None:
        """Put what is left of the text and the end."""
        if self.index not in self.answering._open:
            return
        if reason in ("stop", "length") and (rest := self.reader.whole(self.ids)[len(self.sent) :]):
            self.answering._put(Piece(self.index, rest))
        self.answering._put(
            End(
                self.index,
                reason,
                error,
                prompt_tokens=self.answering.prompt_tokens,
                image_tokens=self.answering.image_tokens,
                completion_tokens=len(self.ids),
            )
        )


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine does now, and counts since it was made."""

    running: int  # answers being written
    waiting: int  # requests in the queue
    ended: Mapping[str, int]  # answers by the reason of their end
    refused: int  # requests that found the queue full
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    closing: bool


class Engine:
    """Answers requests to the models it is given, in one thread of its own.

    Args:
        models: served name -> model. Nothing else may use them meanwhile.
        max_running: most answers written at a time, of all models together.
        max_waiting: most requests in the queue.
    """

    def __init__(self, models: Mapping[str, Model], *, max_running: int = 16, max_waiting: int = 64) -> None:
        for name, value in (("max_running", max_running), ("max_waiting", max_waiting)):
            if value < 1:
                raise ConfigError(f"{name} is {value}", remedy="Give 1 or more.")
        self.models = dict(models)
        self.max_running, self.max_waiting = max_running, max_waiting
        self._makers = {name: model.prompt_maker() for name, model in self.models.items()}
        self._tokenising = threading.Lock()  # tokenizers are not safe in two threads at once
        self._waiting: deque[list[_Sequence]] = deque()
        self._running: list[_Sequence] = []
        self._lock = threading.Lock()
        self._bell = threading.Event()
        self._ended: dict[str, int] = {}
        self._refused = self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._closing = False
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._work, name="mmit-engine", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask) -> Answering:
        """Put a request into the queue.

        Raises:
            QueueFull: as many wait as may. ModelUnknown: no such model. Closing: `close` was called.
            MmitError: the request cannot be answered: a bad option, a prompt without room for an answer, a bad picture.
        """
        model = self.models.get(ask.model)
        if model is None:
            raise ModelUnknown(f"no model '{ask.model}' is served", remedy=nearest(ask.model, self.models))
        self._check_room()
        if ask.n < 1:
            raise ConfigError(f"n is {ask.n}", remedy="Give 1 or more.")
        limit = MAX_TOKENS if ask.max_tokens is None else ask.max_tokens
        if limit < 1:
            raise ConfigError(f"max_tokens is {limit}", remedy="Give 1 or more.")
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        ways = {"temperature": ask.temperature, "top_p": ask.top_p, "top_k": ask.top_k, "seed": seed}
        sampling = model.sampling(**ways)
        with self._tokenising:
            prompt = self._prompt(ask)
        reader = model.reader(ask.stop) if ask.prompt is None else AnswerText(model.tokenizer, ask.stop, strip=False)
        context = context_length(model.vlm.llm)
        limit = limit if context is None else min(limit, context - prompt.length)
        image_tokens = sum(prompt.samples[0].widths)
        answering = Answering(ask, prompt_tokens=prompt.length, image_tokens=image_tokens)
        sequences = [_Sequence(answering, n, prompt, reader, sampling, limit) for n in range(ask.n)]
        with self._lock:
            self._check_room()
            self._waiting.append(sequences)
        self._bell.set()
        return answering

    def _check_room(self) -> None:
        if self._closing:
            raise Closing("the server is shutting down", remedy="Ask again when it is back.")
        if len(self._waiting) >= self.max_waiting:
            self._refused += 1
            raise QueueFull(f"{self.max_waiting} requests wait already", remedy="Ask again later.")

    def _prompt(self, ask: Ask) -> Prompt:
        maker = self._makers[ask.model]
        if (ask.messages is None) == (ask.prompt is None):
            raise ConfigError("a request has messages or a prompt, one of them", remedy="Leave the other out.")
        if ask.messages is not None:
            return maker.question(ask_messages(ask.messages), 0)
        ids = maker.tokenizer(ask.prompt).input_ids
        if not ids:
            raise ConfigError("the prompt is empty", remedy="Give a text to continue.")
        return maker.tokens(ids, None)

    def state(self) -> EngineState:
        """Return what it does now, and its counts."""
        with self._lock:
            return EngineState(
                running=len(self._running),
                waiting=len(self._waiting),
                ended=dict(self._ended),
                refused=self._refused,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                new_tokens=self._new_tokens,
                closing=self._closing,
            )

    def close(self, grace_s: float = 30.0) -> None:
        """Take no more requests, let those that run or wait end within the grace, then end them with an error."""
        with self._lock:
            self._closing = True
            self._deadline = time.monotonic() + grace_s
        self._bell.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._running = self._waiting.popleft() if self._waiting else []
                if not self._running and self._closing:
                    return
            if not self._running:
                self._bell.wait()
                self._bell.clear()
            for sequence in self._running:
                try:
                    reason, error = self._answer(sequence), None
                except Exception as problem:  # noqa: BLE001 - whatever a step raises, the engine goes on
                    reason, error = "error", str(problem)
                self._finish(sequence, reason, error)

    def _finish(self, sequence: _Sequence, reason: Reason, error: str | None) -> None:
        if reason == "timeout":
            error = f"the answer took longer than {sequence.answering.ask.timeout_s:g} seconds"
        sequence.end(reason, error)
        self._ended[reason] = self._ended.get(reason, 0) + 1

    def _over(self, answering: Answering) -> tuple[Reason, str | None] | None:
        """Why a request must end now, None where it may go on."""
        if answering.cancelled:
            return "cancelled", None
        now, limit = time.monotonic(), answering.ask.timeout_s
        if limit is not None and now - answering.started > limit:
            return "timeout", None
        if self._deadline is not None and now > self._deadline:
            return "error", "the server is shutting down"
        return None

    @torch.inference_mode()
    def _answer(self, sequence: _Sequence) -> Reason:
        answering = sequence.answering
        model = self.models[answering.ask.model]
        if over := self._over(answering):
            return self._cut(over)
        prompt = replace(sequence.prompt, number=0)
        features = model._see(Pictures(model.vlm, model.preparation, [[prompt]]), [prompt])
        options: dict[str, Any] = {"max_new_tokens": sequence.limit, "sampling": sequence.sampling}
        for new in model._steps([prompt], features, sequence.reader, draws=[sequence.index], **options):
            if over := self._over(answering):
                return self._cut(over)
            sequence.ids += [token for _, token in new]
            self._new_tokens += len(new)
            if answering.first_token_s is None:
                answering.first_token_s = time.monotonic() - answering.started
            text = sequence.reader.settled(sequence.ids)
            if text.startswith(sequence.sent) and text != sequence.sent:
                answering._put(Piece(sequence.index, text[len(sequence.sent) :]))
                sequence.sent = text
        if sequence.reader.stop and sequence.reader.ended(sequence.ids):
            return "stop"
        return "length" if len(sequence.ids) >= sequence.limit else "stop"

    def _cut(self, over: tuple[Reason, str | None]) -> Reason:
        reason, error = over
        if error is not None:
            raise Closing(error, remedy="Ask again when it is back.")
        return reason
