"""Many questions to a model at once: a bounded queue, and one thread that answers what is in it.

Owns the order in which requests are answered. Prompts join a batch between two steps of decoding and leave it when
their answer ends: by itself, at its limit, cancelled, out of time. Takes requests that are read and checked already.
Knows no HTTP. Refuses a request before anything is computed: an unknown model, a full queue, a prompt that does not
fit, a picture that cannot be read. An error while answering ends the answers it concerns, never the engine.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mmit.data.answers import AnswerText
from mmit.errors import ConfigError, MmitError, nearest
from mmit.models import decoding
from mmit.models.llm import context_length
from mmit.models.prefix_cache import PrefixCache
from mmit.models.sampling import NOT_FINITE
from mmit.pictures import FeatureMemory, Features
from mmit.serve.answering import Answer, Answering, Ask, End, Event, Piece, Reason, TokenLogprob, prompt_of, with_pixels
from mmit.serve.heap import Holes
from mmit.serve.lane import Coming, Lane, chosen_of, joining_of, logprobs_of, part_of

if TYPE_CHECKING:
    from mmit.generate import Model

MAX_TOKENS = 256  # of an answer that names no limit, as `Model.chat`
PREFILL = 2048  # tokens of several prompts that are run at once at most
FEATURE_BYTES = 128 << 20  # features of pictures kept for the next question about them
PREFIX_BYTES = 256 << 20  # keys and values of beginnings of prompts kept for the next that begins so
__all__ = ["Answering", "Ask", "Closing", "End", "Engine", "EngineState", "Event", "ModelUnknown", "Piece"]
__all__ += ["QueueFull", "Reason", "TokenLogprob"]


class QueueFull(MmitError):
    """As many requests wait as may."""


class ModelUnknown(ConfigError):
    """No model of this name is served."""


class Closing(MmitError):
    """The engine takes no more requests."""


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
    remembered: int  # bytes of beginnings of prompts and of features of pictures
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
        share = PREFIX_BYTES // max(1, len(self.models))
        # Models of one tower (adapters of one base) see a picture once.
        seen = {id(model.vlm.vision): FeatureMemory(FEATURE_BYTES) for model in self.models.values()}
        self._seen = list(seen.values())
        self._lanes = {
            name: Lane(model, seen[id(model.vlm.vision)], PrefixCache(share)) for name, model in self.models.items()
        }
        self._reading = threading.Lock()  # tokenizers are not safe in two threads at once
        self._lock = threading.Lock()  # of everything below
        self._waiting: deque[Answer] = deque()
        self._bell, self._holes = threading.Event(), Holes()
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
        with self._lock:
            self._check_room()
        limit = MAX_TOKENS if ask.max_tokens is None else ask.max_tokens
        for name, value in (("n", ask.n), ("max_tokens", limit)):
            if value < 1:
                raise ConfigError(f"{name} is {value}", remedy="Give 1 or more.")
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        sampling = model.sampling(temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k, seed=seed)
        reader = model.reader(ask.stop) if ask.prompt is None else AnswerText(model.tokenizer, ask.stop, strip=False)
        with self._reading:
            prompt = prompt_of(ask, self._makers[ask.model])
        prompt, pixels = with_pixels(prompt, model.preparation)
        context = context_length(model.vlm.llm)
        limit = limit if context is None else min(limit, context - prompt.length)
        answering = Answering(ask, prompt_tokens=prompt.length, image_tokens=sum(prompt.samples[0].widths))
        answers = [
            Answer(answering, n, prompt, pixels, reader.growing(), sampling, sampling.generator(n), limit)
            for n in range(ask.n)
        ]
        with self._lock:
            self._check_room()
            self._waiting.extend(answers)
        self._bell.set()
        return answering

    def _check_room(self) -> None:
        if self._closing:
            raise Closing("the server is shutting down", remedy="Ask again when it is back.")
        if self._requests() >= self.max_waiting:
            self._refused += 1
            raise QueueFull(f"{self.max_waiting} requests wait already", remedy="Ask again later.")

    def _requests(self) -> int:
        return len({id(answer.answering) for answer in self._waiting})

    def state(self) -> EngineState:
        """Return what it does now, and its counts."""
        with self._lock:
            return EngineState(
                running=sum(len(lane.answers) + (lane.coming is not None) for lane in self._lanes.values()),
                waiting=self._requests(),
                ended=dict(self._ended),
                refused=self._refused,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                new_tokens=self._new_tokens,
                remembered=sum(lane.prefixes.nbytes for lane in self._lanes.values())
                + sum(memory.nbytes for memory in self._seen),
                closing=self._closing,
            )

    def close(self, grace_s: float = 30.0) -> None:
        """Take no more requests, let those that run or wait end within the grace, then end them with an error."""
        with self._lock:
            self._closing = True
            self._deadline = time.monotonic() + grace_s
        self._bell.set()
        self._thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            self._sweep()
            for lane, answers in self._admitted():
                if len(answers) == 1 and lane.model.unknown(answers[0].prompt, lane.prefixes) > part_of(lane.model):
                    lane.coming = Coming(answers[0], self._parts(lane, answers[0]))
                else:
                    self._join(lane, answers)
            busy = [lane for lane in self._lanes.values() if lane.answers or lane.coming]
            for lane in busy:
                if lane.coming:
                    self._advance(lane, lane.coming)
                if lane.answers:
                    self._step(lane)
            if busy:
                self._holes.between_steps()
                continue
            with self._lock:
                if self._waiting:
                    continue
                if self._closing:
                    return
            self._holes.wait(self._bell)
            self._bell.clear()

    def _sweep(self) -> None:
        """End what was cancelled or is out of time, whether it runs or waits."""
        with self._lock:
            over = [(answer, why) for answer in self._waiting if (why := self._over(answer))]
            for answer, _ in over:
                self._waiting.remove(answer)
        for answer, why in over:
            self._end(answer, *why)
        for lane in self._lanes.values():
            gone = {place: why for place, answer in enumerate(lane.answers) if (why := self._over(answer))}
            for place, why in gone.items():
                self._end(lane.answers[place], *why)
            self._leave(lane, set(gone))
            if lane.coming and (why := self._over(lane.coming.answer)):
                self._end(lane.coming.answer, *why)
                lane.coming = None

    def _over(self, answer: Answer) -> tuple[Reason, str | None] | None:
        """Why an answer must end now, None where it may go on."""
        if answer.answering.cancelled:
            return "cancelled", None
        now, limit = time.monotonic(), answer.answering.ask.timeout_s
        if limit is not None and now - answer.answering.started > limit:
            return "timeout", f"the answer took longer than {limit:g} seconds"
        if self._deadline is not None and now > self._deadline:
            return "error", "the server is shutting down"
        return None

    def _admitted(self) -> list[tuple[Lane, list[Answer]]]:
        """Take from the queue what may join now, in its order."""
        found: dict[str, list[Answer]] = {}
        lanes = self._lanes.values()
        if any(lane.coming for lane in lanes):
            return []  # what is run between two steps is bounded, and the queue has its order
        room = self.max_running - sum(len(lane.answers) for lane in lanes)
        bound = min((part_of(lane.model) for lane in lanes if lane.answers), default=PREFILL)
        tokens = 0
        with self._lock:
            for answer in list(self._waiting):
                if room < 1:
                    break
                name = answer.answering.ask.model
                lane, mine = self._lanes[name], found.setdefault(name, [])
                more = lane.model.unknown(answer.prompt, lane.prefixes)
                if tokens and tokens + more > bound:
                    break
                if (lane.answers or mine) and not lane.model.support.batched:
                    continue  # such a model answers one at a time
                mine.append(answer)
                self._waiting.remove(answer)
                room -= 1
                tokens += more
        return [(self._lanes[name], answers) for name, answers in found.items() if answers]

    def _join(self, lane: Lane, answers: list[Answer]) -> None:
        """Run prompts, put their first tokens, and let them join the batch of their model."""
        joining = joining_of(lane, answers)
        try:
            state = self._prefill(lane, answers)
        except Exception as error:  # noqa: BLE001 - whatever a prompt raises, the engine goes on
            if len(answers) == 1:
                self._fail(joining, error)
            for answer in answers if len(answers) > 1 else ():
                self._join(lane, [answer])  # one may spoil it for all
            return
        self._enter(lane, joining, state)

    def _advance(self, lane: Lane, coming: Coming) -> None:
        """Run the next part of a prompt; after the last one its answer joins the batch."""
        try:
            done = next(coming.parts)
        except Exception as error:  # noqa: BLE001 - whatever a prompt raises, the engine goes on
            lane.coming = None
            self._fail(joining_of(lane, [coming.answer]), error)
            return
        if done is not None:
            lane.coming = None
            state, known = done
            self._count(coming.answer, known)
            self._enter(lane, joining_of(lane, [coming.answer]), state)

    def _enter(self, lane: Lane, joining: Lane, state: decoding.State) -> None:
        """Put the first tokens of answers whose prompts were run, and let them join the batch of their model."""
        joining.state = state
        self._take(joining, state.logits)
        if not joining.answers:
            return
        try:
            if lane.state is None:
                lane.state = state
            else:
                decoding.join(lane.state, state)
        except Exception as error:  # noqa: BLE001
            self._fail(joining, error)
            self._fail(lane, error)
            return
        lane.answers += joining.answers
        lane.fed += joining.fed

    def _see(self, lane: Lane, answers: list[Answer]) -> Features:
        model, pixels = lane.model, {key: value for answer in answers for key, value in answer.pixels.items()}
        spreads = {key: shown.spread for answer in answers for key, shown in answer.prompt.pictures.items()}
        before = lane.features.seen
        features = lane.features.take(model.vlm, spreads, pixels.__getitem__)
        model.usage.pictures += lane.features.seen - before
        return features

    def _prefill(self, lane: Lane, answers: list[Answer]) -> decoding.State:
        features = self._see(lane, answers)
        prompts = [replace(answer.prompt, number=n) for n, answer in enumerate(answers)]
        state, known = lane.model.prefill(prompts, features, store=lane.prefixes)
        for answer, count in zip(answers, known, strict=True):
            self._count(answer, count)
        return state

    def _parts(self, lane: Lane, answer: Answer) -> Iterator[tuple[decoding.State, int] | None]:
        model, features = lane.model, self._see(lane, [answer])
        yield from model.prefill_in_parts(answer.prompt, features, store=lane.prefixes, most=part_of(model))

    def _count(self, answer: Answer, known: int) -> None:
        answer.cached_tokens = known
        self._prompt_tokens += answer.prompt.length
        self._cached_tokens += known

    def _step(self, lane: Lane) -> None:
        """Write one more token of every answer of a model."""
        assert lane.state is not None
        llm = lane.model.vlm.llm
        try:
            lane.model.activate()
            logits = decoding.step(llm, lane.state, lane.fed)
            decoding.renew(llm, lane.state, logits, [answer.ids for answer in lane.answers])
        except Exception as error:  # noqa: BLE001 - whatever a step raises, the engine goes on
            self._fail(lane, error)
            return
        self._take(lane, logits)

    def _fail(self, lane: Lane, error: Exception) -> None:
        for answer in lane.answers:
            self._end(answer, "error", str(error) or type(error).__name__)
        lane.state, lane.answers, lane.fed = None, [], []

    def _take(self, lane: Lane, logits: torch.Tensor) -> None:
        """Choose every answer's next token from (B, V) logits, put it, and let go of the answers that end with it."""
        try:
            chosen = chosen_of(lane.answers, logits)
            told = logprobs_of(lane, logits, chosen)
            reasons = [self._written(lane, *pair, told) for pair in enumerate(chosen)]
            lane.fed = chosen
            self._leave(lane, {place for place, reason in enumerate(reasons) if reason is not None})
        except Exception as error:  # noqa: BLE001
            self._fail(lane, error)

    def _written(self, lane: Lane, place: int, token: int, told: Mapping[int, TokenLogprob]) -> Reason | None:
        """Add a token to an answer, and end it where it ends; returns why."""
        answer, problem = lane.answers[place], None
        reason: Reason | None
        try:
            if token == NOT_FINITE:
                reason, problem = "error", "the model's logits are not finite: load it with dtype bf16 or fp32"
            elif token in lane.ends:
                reason = "stop"
            else:
                reason = answer.add(token, told.get(place))
                self._new_tokens += 1
                lane.model.usage.new_tokens += 1
            if reason in ("stop", "length") and lane.state is not None:
                lane.model.remember(lane.prefixes, answer.prompt, answer.ids, lane.state, place)
        except Exception as error:  # noqa: BLE001
            reason, problem = "error", str(error) or type(error).__name__
        if reason is not None:
            self._end(answer, reason, problem)
        return reason

    def _leave(self, lane: Lane, gone: set[int]) -> None:
        """Give up places of the batch; the last ones move into them."""
        if not gone:
            return
        count = len(lane.answers) - len(gone)
        movable = [place for place in range(count, len(lane.answers)) if place not in gone]
        kept = [place if place not in gone else movable.pop() for place in range(count)]
        if kept and lane.state is not None:
            decoding.leave(lane.state, kept)
        else:
            lane.state = None
        lane.answers, lane.fed = [lane.answers[k] for k in kept], [lane.fed[k] for k in kept]

    def _end(self, answer: Answer, reason: Reason, error: str | None = None) -> None:
        with self._lock:
            self._ended[reason] = self._ended.get(reason, 0) + 1
        answer.end(reason, error)
