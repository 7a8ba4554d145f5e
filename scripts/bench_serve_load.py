"""What a server of `mmit serve` is asked by people and programs, and what its process holds meanwhile.

Request number k is drawn from the seed k: its kind, its words and pictures, whether it is streamed; its answer is
checked. `soak` lets up to 16 clients ask for so many minutes and tells memory, open files, threads and slots once a
minute. It keeps server and clients to a share of the cores, by pauses.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import statistics
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.serve import malformed

WORDS = (
    "the a small large red green blue round square picture shows left right above below near behind table window tree "
    "river house garden street person child dog cat bird holding standing walking looking bright dark quiet is not"
).split()
ACTIVE = (16, 1, 8, 2, 12, 4)  # clients, a minute each
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
FORMS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
GROWTH = 1.05
LEAVE, MISTAKE, MALFORMED = "left early", "mistake, refused", "malformed"
FILE, LOOK = "picture by file id", "other pages"
LATE = "out of time"  # the server's --timeout was over: of a busy machine, not a failure
KINDS = {
    "picture": 6,
    "conversation": 3,
    "text": 3,
    "text to continue": 3,
    "long prompt": 1,
    "several answers": 1,
    "log-probabilities": 2,
    FILE: 1,
    LEAVE: 2,
    MISTAKE: 2,
    MALFORMED: 4,
    LOOK: 1,
}


class Late(Exception):
    """The server says that its time for an answer was over; of a client's own time that is over, OSError tells."""


class Place(NamedTuple):
    """A server: http://HOST:PORT, and the name of its model."""

    url: str
    model: str

    def ask(self, path: str, body: Any = None, *, method: str | None = None, most: int | None = None) -> bytes:
        """Send a request; returns its answer, or the first bytes of it and leaves. Raises Late."""
        head = {"Content-Type": "application/json"}
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if isinstance(body, bytes):
            head["Content-Type"] = "multipart/form-data; boundary=X"
        request = urllib.request.Request(self.url + path, content, head, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return reply.read(most)
        except urllib.error.HTTPError as error:
            if error.code == 504:
                raise Late(path) from error
            raise


def picture(draw: random.Random) -> bytes:
    """A file of a picture of any size, up to two megapixels."""
    small = PIL.Image.frombytes("RGB", (4, 3), draw.randbytes(36))
    width, height = (round(8 * 200 ** draw.random()) for _ in range(2))
    file = io.BytesIO()
    small.resize((width, height), PIL.Image.Resampling.BILINEAR).save(file, draw.choice(FORMS))
    return file.getvalue()


def words(draw: random.Random, low: int, high: int) -> str:
    """So many words."""
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(low, high)))


def shown(draw: random.Random) -> dict[str, Any]:
    """A picture as a part of a message."""
    data = "data:image/png;base64," + base64.b64encode(picture(draw)).decode()
    return {"type": "image_url", "image_url": {"url": data}}


def turn(draw: random.Random, *parts: dict[str, Any], low: int = 2, high: int = 30) -> dict[str, Any]:
    """A question."""
    return {"role": "user", "content": [*parts, {"type": "text", "text": words(draw, low, high)}]}


class Size(NamedTuple):
    """How large requests become: most tokens of an answer, most words of a long prompt."""

    tokens: int
    words: int


def one_of_many(place: Place, draw: random.Random, size: Size) -> str:
    """Ask a server one of the things that clients ask; returns what it was. Raises where the answer is not as due."""
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == MALFORMED:
        port = urllib.parse.urlsplit(place.url).port
        assert port is not None
        if (status := malformed.send(port, draw.randrange(10**9))) >= 500:
            raise ValueError(f"a malformed request is answered by {status}")
    elif kind == LOOK:
        for path in ("/", "/health", "/metrics", "/v1/models", "/v1/files"):
            place.ask(path)
    elif kind == MISTAKE:
        _err(place, draw)
    elif kind == FILE:
        name = json.loads(place.ask("/v1/files", _form(picture(draw))))["id"]
        body = _body(place, draw, kind, size)
        body["messages"] = [turn(draw, {"type": "file", "file": {"file_id": name}})]
        _check(kind, place.ask(CHAT, body), body)
        if draw.random() < 0.5:
            place.ask(f"/v1/files/{name}", method="DELETE")
    elif kind == LEAVE:
        body = _body(place, draw, kind, size) | {"max_tokens": 200, "stream": True}
        place.ask(CHAT, body, most=draw.randrange(1, 300))
    else:
        body = _body(place, draw, kind, size)
        _check(kind, place.ask(COMPLETION if "prompt" in body else CHAT, body), body)
    return kind


def _body(place: Place, draw: random.Random, kind: str, size: Size) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": place.model,
        "max_tokens": draw.randint(1, size.tokens),
        "stream": draw.random() < 0.6,
    }
    body |= draw.choice([{}, {"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"stop": ["e"]}, {"top_p": 0.5}])
    if kind == "text to continue":
        return body | {"prompt": words(draw, 1, 40)}
    if kind == "long prompt":
        return body | {"messages": [turn(draw, low=size.words * 2 // 7, high=size.words)]}
    parts = [] if kind == "text" else [shown(draw) for _ in range(draw.choice([1, 1, 1, 2]))]
    body["messages"] = [turn(draw, *parts)]
    if kind == "conversation":
        body["messages"] += [{"role": "assistant", "content": words(draw, 1, 9)}, turn(draw)]
    elif kind == "several answers":
        body |= {"n": draw.randint(2, 4), "temperature": 0.7}
    elif kind == "log-probabilities":
        body |= {"logprobs": True, "top_logprobs": draw.randrange(5)}
    return body


def _form(content: bytes) -> bytes:
    """A file as a form of two parts."""
    parts = [(b'"purpose"', b"vision"), (b'"file"; filename="a"', content)]
    head = b"--X\r\nContent-Disposition: form-data; name="
    return b"".join(head + name + b"\r\n\r\n" + value + b"\r\n" for name, value in parts) + b"--X--\r\n"


def _err(place: Place, draw: random.Random) -> None:
    wrong = [{"temperature": "hot"}, {"model": "another"}, {"max_tokens": -1}, {"messages": [{}]}, {"tools": [1]}]
    body = {"model": place.model, "messages": [turn(draw)]} | draw.choice(wrong)
    try:
        told = place.ask(CHAT, body)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (400, 404) and json.loads(error.read())["error"]["message"]:
                return
        raise
    raise ValueError(f"a mistake is answered: {told[:300]!r}")


def _check(kind: str, answer: bytes, body: dict[str, Any]) -> None:
    """Every answer that was asked for is there, with its end. Raises ValueError and Late."""
    if body["stream"]:
        lines = [line[6:] for line in answer.decode().split("\n\n") if line.startswith("data: ")]
        events = [json.loads(line) for line in lines[:-1]] if lines and lines[-1] == "[DONE]" else []
    else:
        events = [json.loads(answer)]
    if any((event.get("error") or {}).get("code") == "timeout" for event in events):
        raise Late(kind)
    choices = [choice for event in events for choice in event.get("choices", ())]
    ends = sorted(choice["index"] for choice in choices if choice.get("finish_reason") in ("stop", "length"))
    said = any((c.get("delta") or c.get("message") or {}).get("content") for c in choices)
    told = any(choice.get("logprobs") is not None for choice in choices)
    if ends != list(range(body.get("n", 1))) or (said and told != ("logprobs" in body)):
        raise ValueError(f"{kind}: {answer[:300]!r}")


class Held(NamedTuple):
    """What a process holds."""

    memory: float  # MB
    files: int
    threads: int


def held(pid: int) -> Held:
    """Memory, open files and threads of a process."""
    told = Path(f"/proc/{pid}/status").read_text()
    memory = next(int(line.split()[1]) / 1024 for line in told.splitlines() if line.startswith("VmRSS"))
    return Held(memory, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))


def used(pid: int) -> float:
    """Seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy(place: Place) -> int:
    """Answers that run or wait."""
    state = json.loads(place.ask("/health"))
    return int(state["running"] + state["waiting"])


def remembered(place: Place) -> float:
    """MB of prompts and pictures that a server remembers, which it bounds itself."""
    lines = place.ask("/metrics").decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("mmit_remembered_bytes ")) / (1 << 20)


class Load:
    """Clients that ask until `over`, each request with a number of its own.

    Args:
        size: how large requests become; clients that leave ask for more. clients: how many ask.
        first: number of the first request. may: whether client number n may ask now; without it, always.
    """

    def __init__(
        self,
        place: Place,
        *,
        size: Size,
        clients: int,
        first: int = 0,
        may: Callable[[int], bool] = lambda client: True,
    ) -> None:
        self.counts, self.problems, self.over = Counter[str](), list[str](), threading.Event()
        self._place, self._size, self._may = place, size, may
        self._next, self._lock = first, threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=[n]) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _client(self, client: int) -> None:
        while not self.over.is_set():
            if not self._may(client):
                self.over.wait(0.2)
                continue
            with self._lock:
                number, self._next = self._next, self._next + 1
            try:
                kind = one_of_many(self._place, random.Random(number), self._size)
            except Late:
                kind = LATE
            except (OSError, ValueError, LookupError) as error:
                kind = "failed"
                self.problems.append(f"request {number}: {type(error).__name__}: {error}")
            with self._lock:
                self.counts[kind] += 1

    def end(self) -> None:
        """Let the last requests be answered, and the server close what clients left."""
        self.over.set()
        for thread in self._threads:
            thread.join()
        until = time.monotonic() + 60
        while busy(self._place) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(8)  # a connection that was used is kept for five seconds, on a busy machine for a moment longer


class Minute(NamedTuple):
    """What was seen once."""

    at: float  # minutes
    held: Held
    remembered: float  # MB
    slots: int
    requests: int
    failed: int
    used: float  # seconds of the server's processor time so far

    def line(self) -> str:
        """As a line of a Markdown table."""
        memory, files, threads = self.held
        return (
            f"| {self.at:.1f} | {memory:,.0f} MB | {self.remembered:,.0f} MB | {files} | {threads} | {self.slots} "
            f"| {self.requests:,} | {self.failed} | {self.used:,.0f} s |"
        )


HEAD = (
    "| minute | memory | remembered | open files | threads | slots | requests | failed | processor time |",
    "|---|---|---|---|---|---|---|---|---|",
)


def soak(args: argparse.Namespace) -> Iterator[str]:
    """Lines that tell what the process held over the time, and what it was asked. Raises SystemExit where it grew."""
    place = Place(args.run.removesuffix("/").removesuffix("/v1"), args.model)
    begin, idle = time.monotonic(), held(args.pid)
    before, own, load = used(args.pid), time.process_time(), None

    def may(client: int) -> bool:
        took = time.monotonic() - begin
        spent = used(args.pid) - before + time.process_time() - own
        return client < min(args.clients, ACTIVE[int(took / 60) % len(ACTIVE)]) and spent <= args.cores * took

    def seen() -> Minute:
        counts = load.counts if load else Counter[str]()
        at, spent = (time.monotonic() - begin) / 60, used(args.pid) - before
        total = counts.total()
        return Minute(at, held(args.pid), remembered(place), busy(place), total, counts["failed"], spent)

    yield from HEAD
    minutes = [seen()]
    yield minutes[0].line()
    load = Load(place, size=Size(args.tokens, args.long), clients=args.clients, may=may)
    while (number := len(minutes)) <= args.soak:
        time.sleep(max(0.0, begin + 60 * number - time.monotonic()))
        minutes.append(seen())
        yield minutes[-1].line()
    load.end()
    last = seen()
    yield last.line()
    yield ", ".join(f"{kind} {count:,}" for kind, count in load.counts.most_common())
    problems = load.problems[:5] + grown(minutes, idle, last)
    yield f"processor time a request: {last.used / max(1, last.requests):.3f} s of the server"
    if problems:
        raise SystemExit("\n".join(problems))


def grown(minutes: list[Minute], idle: Held, last: Minute) -> list[str]:
    """What a server came to hold more of once it was warm: a quarter of the time, and at most twenty minutes.

    Compared are the medians of the first and the last six minutes then, in which each number of clients asks once.

    Args:
        minutes: under load. idle: before it. last: after it.
    """
    warm = minutes[min(20, len(minutes) // 4) :]
    few = max(1, min(len(ACTIVE), len(warm) // 2))
    found = []
    first, end = (statistics.median(one.held.memory for one in part) for part in (warm[:few], warm[-few:]))
    if end > GROWTH * first:
        found.append(f"memory grew from {first:,.0f} to {end:,.0f} MB, more than {GROWTH - 1:.0%}")
    if last.held.files > idle.files:
        found.append(f"{last.held.files} files are open, {idle.files} were before")
    if last.held.threads > max(one.held.threads for one in warm[:few]):
        found.append(f"{last.held.threads} threads, once warm there were {warm[0].held.threads}")
    if last.slots:
        found.append(f"{last.slots} slots are taken, and nobody asks")
    return found
