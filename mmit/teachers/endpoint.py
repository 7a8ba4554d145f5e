"""A teacher behind an OpenAI-compatible URL: vLLM, llama.cpp, a hosted model.

In: a base URL, a model's name, the name of the environment variable that holds the key. Out: replies with the server's
own token counts. Keeps to limits of requests and tokens a minute, honours Retry-After, retries busy servers and broken
connections within one total deadline per request, and stops at once at an error that a retry cannot cure. The key is
never written anywhere.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from mmit.data.images import load_rgb
from mmit.errors import ConfigError, MmitError
from mmit.records import Image, Turn
from mmit.teachers.request import Reply, Request

BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
# Codes of a 400 that concern the one request, not the set-up: the request is answered by a drop.
_REFUSED = ("content_filter", "content_policy_violation")
_TOO_LONG = ("context_length_exceeded",)


@dataclass
class Endpoint:
    """An endpoint as a Teacher.

    Attributes:
        url: base URL, such as http://127.0.0.1:8000/v1. model: what the server should use.
        key_env: environment variable of the key; where it is unset, none is sent.
        in_flight: requests at a time. per_minute: most requests a minute; tokens_per_minute: most tokens; 0: no limit.
        tries: attempts per request. deadline: seconds a request may take with all its attempts and pauses.
    """

    url: str
    model: str
    name: str = ""
    terms: str | None = None
    price: Mapping[str, float] = field(default_factory=dict)
    key_env: str = "OPENAI_API_KEY"
    in_flight: int = 8
    per_minute: float = 0
    tokens_per_minute: float = 0
    tries: int = 6
    pause: float = 1.0
    deadline: float = 300.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            remedy = "Give the base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1#model"
            raise ConfigError(f"'{self.url}' is no address of a server", where="teacher.open", remedy=remedy)
        if not self.model:
            remedy = "Name it after a #: http://127.0.0.1:8000/v1#model"
            raise ConfigError("no model named", where="teacher.open", remedy=remedy)
        if self.in_flight < 1 or self.tries < 1 or self.deadline <= 0:
            raise ConfigError("in_flight, tries and deadline must be above 0", where="teacher", remedy="Raise them.")
        self.name = self.name or self.model
        self.identity = f"{self.url.rstrip('/')}#{self.model}"
        self._pace = _Pace(self.per_minute, self.tokens_per_minute)

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Yield replies as they finish. Raises MmitError after those in flight have been yielded."""
        todo: queue.Queue[Request | None] = queue.Queue()
        done: queue.Queue[tuple[Request, Reply | BaseException]] = queue.Queue()

        def work() -> None:
            while (request := todo.get()) is not None:
                try:
                    done.put((request, self._reply(request)))
                except BaseException as error:  # noqa: BLE001 - raised again by the thread that asked
                    done.put((request, error))

        left, running, threads = iter(requests), 0, 0
        failed: BaseException | None = None
        try:
            # Requests are taken from the caller one by one, as places get free: the desk's budget can stop them at any.
            while True:
                while failed is None and running < self.in_flight and (request := next(left, None)) is not None:
                    if threads <= running:
                        # Daemons: Ctrl-C must not wait for a slow server.
                        threading.Thread(target=work, daemon=True).start()
                        threads += 1
                    todo.put(request)
                    running += 1
                if not running:
                    break
                request, found = done.get()
                running -= 1
                if isinstance(found, BaseException):
                    failed = failed or found
                else:
                    yield request, found
        finally:
            for _ in range(threads):
                todo.put(None)
        if failed is not None:
            raise failed

    def _reply(self, request: Request) -> Reply:
        draw = request.draw
        if not draw.max_tokens:
            remedy = "Ask a local model: open: local:FOLDER."
            raise ConfigError("an endpoint does not tell the likelihood of an answer", where=self.url, remedy=remedy)
        body: dict[str, Any] = {"model": self.model, "messages": openai_messages(request.messages)}
        body |= {"temperature": draw.temperature, "max_tokens": draw.max_tokens, "seed": draw.seed}
        if draw.top_p != 1.0:
            body["top_p"] = draw.top_p
        if draw.presence_penalty:
            body["presence_penalty"] = draw.presence_penalty
        if draw.stop:
            body["stop"] = list(draw.stop)
        began = time.monotonic()
        status, answer, attempts = self._post(json.dumps(body).encode(), began + self.deadline)
        seconds = round(time.monotonic() - began, 3)
        # The server will not answer this request, and asking again changes nothing: a reply that says so, no error of
        # the whole build.
        if status != 200:
            return Reply("", self.name, "", "refused" if status == 403 else "length", 0, 0, seconds, attempts)
        usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
        used = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
        counts = [value if isinstance(value, int) else None for value in used]
        self._pace.used(sum(count or 0 for count in counts))
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
            refusal = choice["message"].get("refusal")
            # vLLM and DeepSeek send a thought in a field of its own, under either name.
            thought = choice["message"].get("reasoning_content") or choice["message"].get("reasoning")
        except (KeyError, IndexError, TypeError, AttributeError):
            problem = f"the reply holds no answer: {json.dumps(answer)[:200]}"
            raise MmitError(
                problem, where=self.url, remedy="The server must speak OpenAI's chat completions."
            ) from None
        finish: Any = {"length": "length", "content_filter": "refused"}.get(str(reason), "stop")
        if refusal:
            finish = "refused"
        if isinstance(text, list):  # servers of reasoning models send parts
            kinds = [part for part in text if isinstance(part, dict) and part.get("type") == "text"]
            text = "".join(str(part.get("text", "")) for part in kinds)
        text, thought = _storable(text), _storable(thought)
        read, written = counts
        return Reply("", self.name, text, finish, read, written, seconds, attempts, thought=thought)

    def _post(self, body: bytes, end: float) -> tuple[int, Any, int]:
        """Return (200, the reply, attempts), or 403 or 413 where the server will not answer this one request."""
        address = self.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": "mmit"}
        key = os.environ.get(self.key_env) if self.key_env else None
        if key:
            headers["Authorization"] = f"Bearer {key}"
        problem = ""
        for attempt in range(1, self.tries + 1):
            self._pace.wait(end)
            # Doubled each time, with some chance in it: threads that failed together must not come back together.
            wait = self.pause * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
            request = urllib.request.Request(address, data=body, headers=headers, method="POST")
            try:
                return 200, _read(request, end), attempt
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(2000).decode("utf-8", "replace")
                if error.code in (400, 413, 422) and (kind := _of_request(said)):
                    return kind, None, attempt
                problem = f"HTTP {error.code}: {said[:300]}"
                if error.code not in BUSY:
                    remedy = f"Check the URL, the model's name and the key in {self.key_env or 'no variable'}."
                    raise MmitError(problem, where=address, remedy=remedy) from None
                if (told := _retry_after(error.headers.get("Retry-After"))) is not None:
                    wait = max(wait, told)
                    self._pace.hold(told)
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = f"no answer: {error or type(error).__name__}"
            # A wait that the deadline would cut is not begun: the user learns it now.
            if time.monotonic() + wait >= end:
                problem += f" (no answer within {self.deadline:g} s)"
                break
            if attempt < self.tries:
                time.sleep(wait)
        remedy = "Is the server running? Run the same command again: it goes on where it stopped."
        raise MmitError(f"{problem}, after {attempt} attempts", where=address, remedy=remedy)


def _storable(text: Any) -> str:
    """Return the stripped text of a reply, "" for anything else."""
    # JSON can spell half of a surrogate pair, which no file can hold: U+FFFD, as for bytes that are no UTF-8.
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").strip() if isinstance(text, str) else ""


def _read(request: urllib.request.Request, end: float) -> dict[str, Any]:
    """Return the JSON of a whole body, read until `end` at the latest. Raises OSError, ValueError."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    # The timeout holds for each read alone: a server that sends a byte a second would keep us for ever.
    with urllib.request.urlopen(request, timeout=left) as reply:
        body = b""
        while chunk := reply.read1(1 << 16):
            body += chunk
            if time.monotonic() > end:
                raise TimeoutError("the body came too slowly")
        told = reply.headers.get("Content-Length")
        if told is not None and len(body) < int(told):
            raise ConnectionError(f"cut off after {len(body)} of {told} bytes")
    # A byte that is no UTF-8 becomes U+FFFD, which a build drops and counts; asking again would cost again.
    found = json.loads(body.decode("utf-8", "replace"))
    if not isinstance(found, dict):
        raise ValueError("the reply is no JSON object")
    # Gateways say so of a server behind them that is busy: it is asked again, as after an HTTP error.
    if found.get("error") and not found.get("choices"):
        raise ValueError(f"the server answered with an error: {json.dumps(found['error'])[:300]}")
    return found


def _of_request(said: str) -> int:
    """Return 403 where the server refuses this request's content, 413 where it is too long, 0 for other errors."""
    try:
        error = json.loads(said).get("error")
        code, message = (error.get("code"), str(error.get("message"))) if isinstance(error, dict) else (None, said)
    except (ValueError, AttributeError):
        code, message = None, said
    if code in _REFUSED:
        return 403
    return 413 if code in _TOO_LONG or "maximum context length" in message else 0


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


class _Pace:
    """Shared by all threads: when the next request may go out."""

    def __init__(self, per_minute: float, tokens: float) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._tokens = tokens
        self._next = 0.0
        self._used: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def hold(self, seconds: float) -> None:
        """Let nobody send for some seconds: the server said so to one of us."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def used(self, tokens: int) -> None:
        """Count the tokens of a reply."""
        with self._lock:
            self._used.append((time.monotonic(), tokens))

    def wait(self, end: float) -> None:
        """Sleep until a request may go out, at the latest until `end`."""
        while True:
            with self._lock:
                now = time.monotonic()
                while self._used and self._used[0][0] < now - 60:
                    self._used.popleft()
                free = self._next
                if self._tokens and sum(count for _, count in self._used) >= self._tokens:
                    free = max(free, self._used[0][0] + 60)
                if free <= now or now >= end:
                    self._next = max(self._next, now) + self._gap
                    return
            time.sleep(min(free, end) - now + 0.001)


def openai_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return turns as OpenAI messages. Raises ImageError."""
    result: list[dict[str, Any]] = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, Image):
                parts.append({"type": "image_url", "image_url": {"url": _data_url(part)}})
            else:
                parts.append({"type": "text", "text": part.text})
        plain = all(part["type"] == "text" for part in parts)
        result.append({"role": turn.role, "content": turn.text if plain else parts})
    return result


def _data_url(image: Image) -> str:
    out = BytesIO()
    load_rgb(image).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
