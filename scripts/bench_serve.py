"""Many clients at once against one after another: requests a second, time to the first token. See --help.

Rounds take turns: the same number of requests by one client, then by all at once, each with pictures of its own, so
that nothing one has computed serves the other. Two kinds of requests: questions about pictures, whose answers the
model ends by itself, and texts to continue for a given number of tokens. Of an engine in this process a hundred answers
are first compared with `Model.chat`; of a server only the times are taken.

With --gaps, the time between two tokens of running answers while long prompts join, which are run in parts, or whole as
one: the two take turns, in an engine of this process.

With --soak MINUTES and the --pid of a server it is asked for so long what people and programs ask and do, by 1 to 16
clients: questions about pictures of all sizes, conversations, texts, long prompts, several answers, log-probabilities,
clients that leave, mistakes, malformed requests. Told are memory, open files, threads and slots once a minute; it fails
where they grow once the server is warm. --cores bounds what server and clients use.
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
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mmit.cores import Watch, spin_briefly

os.environ.setdefault("HF_HUB_OFFLINE", "1")
spin_briefly()

import PIL.Image  # noqa: E402
import PIL.ImageDraw  # noqa: E402
import torch  # noqa: E402
from bench_serve_load import soak  # noqa: E402

from mmit.generate import Model, load  # noqa: E402
from mmit.serve import lane  # noqa: E402
from mmit.serve.engine import Ask, End, Engine, Piece  # noqa: E402

COLOURS = ["red", "green", "blue", "yellow", "black", "gray", "teal", "brown"]
QUESTIONS = [
    "what is the color of the {0}?",
    "does the image contain a {0}?",
    "is there not a {1} shape in the image?",
    "what shape is in the image?",
    "which color is the shape in the picture, {1} or another one?",
]
TEXTS = ["The {1} {0} was", "Once upon a time a {0}", "Some {1} things are", "How to draw a {0}: first,"]


def picture(draw: random.Random) -> PIL.Image.Image:
    """A shape of a random colour, size and place."""
    image = PIL.Image.new("RGB", (64, 64), "white")
    left, top, side = draw.randrange(30), draw.randrange(30), draw.randrange(14, 34)
    pen, box = PIL.ImageDraw.Draw(image), (left, top, left + side, top + side)
    getattr(pen, draw.choice(["ellipse", "rectangle"]))(box, fill=draw.choice(COLOURS))
    return image


def asks(kind: str, count: int, tokens: int, seed: int) -> list[Ask]:
    """Requests: "questions" about a picture each, or "texts" to continue."""
    draw = random.Random(seed)
    made = []
    for n in range(count):
        words = draw.choice(["circle", "rectangle", "triangle"]), draw.choice(COLOURS)
        if kind == "texts":
            made.append(Ask("model", prompt=TEXTS[n % len(TEXTS)].format(*words), max_tokens=tokens))
            continue
        parts = [
            {"type": "image", "image": picture(draw)},
            {"type": "text", "text": QUESTIONS[n % len(QUESTIONS)].format(*words)},
        ]
        made.append(Ask("model", [{"role": "user", "content": parts}], max_tokens=tokens, temperature=0))
    return made


class Told(NamedTuple):
    """An answer: its text, seconds until its first token, tokens."""

    text: str
    first_s: float
    tokens: int


Teller = Callable[[Ask], Told]


def by_engine(engine: Engine) -> Teller:
    """Answers in this process."""

    def tell(ask: Ask) -> Told:
        answering = engine.submit(ask)
        *pieces, end = answering.events()
        if not isinstance(end, End) or end.reason not in ("stop", "length"):
            raise SystemExit(f"a request failed: {end}")
        text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
        return Told(text, answering.first_token_s or 0.0, end.completion_tokens)

    return tell


def by_url(url: str, model: str) -> Teller:
    """Answers of a server, streamed; the first token is timed where the client is."""

    def tell(ask: Ask) -> Told:
        body: dict[str, Any] = {"model": model, "max_tokens": ask.max_tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        body |= {"prompt": ask.prompt} if ask.messages is None else {"messages": [_as_json(m) for m in ask.messages]}
        path = "completions" if ask.messages is None else "chat/completions"
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), head)
        begin, first, text, tokens = time.perf_counter(), 0.0, "", 0
        with urllib.request.urlopen(request) as reply:
            for line in reply:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    new = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    first = first or (time.perf_counter() - begin if new else 0.0)
                    text += new
        return Told(text, first, tokens)

    return tell


def _as_json(message: Mapping[str, Any]) -> dict[str, Any]:
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            file = io.BytesIO()
            part["image"].save(file, "PNG")
            data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            part = {"type": "image_url", "image_url": {"url": data}}
        parts.append(part)
    return {"role": message["role"], "content": parts}


def run(tell: Teller, requests: list[Ask], clients: int) -> tuple[float, list[Told]]:
    """Answer all, each client one after another; returns seconds and the answers."""
    todo, lock, found = iter(enumerate(requests)), threading.Lock(), dict[int, Told]()

    def client() -> None:
        while True:
            with lock:
                number, ask = next(todo, (-1, None))
            if ask is None:
                return
            found[number] = tell(ask)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin, [found[n] for n in range(len(requests))]


def p95(values: list[float]) -> float:
    """The value that 95 of 100 do not exceed."""
    return sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]


def table(tell: Teller, args: argparse.Namespace) -> Iterator[str]:
    """Lines of a Markdown table, one for each kind of request."""
    yield "| requests | 1 client, requests/s | first token p95 | all, requests/s | first token p95 | ratio of rounds |"
    yield "|---|---|---|---|---|---|"
    for kind in args.kinds:
        run(tell, asks(kind, 4, args.tokens, 10**6), 2)
        rates: dict[int, list[float]] = {1: [], args.clients: []}
        firsts: dict[int, list[float]] = {1: [], args.clients: []}
        written, seed = 0, 0
        for turn in range(args.rounds):
            for clients in (1, args.clients) if turn % 2 == 0 else (args.clients, 1):
                seed += 1
                seconds, told = run(tell, asks(kind, args.requests, args.tokens, seed), clients)
                rates[clients].append(args.requests / seconds)
                firsts[clients] += [answer.first_s for answer in told]
                written += sum(answer.tokens for answer in told)
        ratios = [many / one for one, many in zip(rates[1], rates[args.clients], strict=True)]
        mean = written / (2 * args.rounds * args.requests)
        yield (
            f"| {kind}, {mean:.1f} tokens each | {statistics.median(rates[1]):.2f} | {p95(firsts[1]):.2f} s "
            f"| {statistics.median(rates[args.clients]):.2f} | {p95(firsts[args.clients]):.2f} s "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) |"
        )


class Waits(NamedTuple):
    """Seconds between two pieces of running answers, and until the first token of each long prompt."""

    between: list[float]
    firsts: list[float]


def waits(engine: Engine, prompts: list[str], args: argparse.Namespace, seed: int) -> Waits:
    """Let clients write answers to texts, one after another, while long prompts join one after another."""
    found, lock, over = Waits([], []), threading.Lock(), threading.Event()

    def write(number: int) -> None:
        for ask in asks("texts", 1000, args.tokens, seed * 100 + number):
            if over.is_set():
                return
            last, mine = 0.0, []
            for event in engine.submit(ask).events():
                now = time.perf_counter()
                if isinstance(event, Piece):
                    mine += [now - last] if last else []
                    last = now
            with lock:
                found.between.extend(mine)

    threads = [threading.Thread(target=write, args=[n]) for n in range(args.clients)]
    for thread in threads:
        thread.start()
    tell = by_engine(engine)
    for prompt in prompts:
        time.sleep(1)
        found.firsts.append(tell(Ask("model", prompt=prompt, max_tokens=1)).first_s)
    over.set()
    for thread in threads:
        thread.join()
    return found


def gaps(model: Model, engine: Engine, args: argparse.Namespace) -> Iterator[str]:
    """Lines of a table: the waits with prompts in parts and whole, and the ratios of the rounds."""
    draw, part = random.Random(0), lane.part_of(model)
    ways = {f"in parts of {part}": part, "whole": 1 << 30}
    rounds: dict[str, list[Waits]] = {way: [] for way in ways}

    def long(tokens: int) -> str:
        text = ""
        while len(model.tokenizer(text)["input_ids"]) < tokens:
            text += "".join(f" {draw.choice(COLOURS)} {draw.randrange(1000)}," for _ in range(8))
        return text

    for turn in range(args.rounds):
        for way in ways if turn % 2 == 0 else reversed(ways):
            lane.PART[model.vlm.device.type] = ways[way]
            rounds[way].append(waits(engine, [long(args.long) for _ in range(3)], args, turn + 1))
    lane.PART[model.vlm.device.type] = part
    yield f"| prompts of {args.long} tokens | between tokens: p50 | p95 | longest | first token of the prompt, p50 |"
    yield "|---|---|---|---|---|"
    for way, told in rounds.items():
        between = [value for one in told for value in one.between]
        middle, first = statistics.median(between), statistics.median(value for one in told for value in one.firsts)
        yield f"| {way} | {middle:.2f} s | {p95(between):.2f} s | {max(between):.2f} s | {first:.2f} s |"
    longest = [max(b.between) / max(a.between) for a, b in zip(*rounds.values(), strict=True)]
    first_s = [statistics.median(a.firsts) / statistics.median(b.firsts) for a, b in zip(*rounds.values(), strict=True)]
    yield f"longest wait, whole over parts, by round: {', '.join(f'{ratio:.1f}' for ratio in longest)}"
    yield f"first token of the prompt, parts over whole, by round: {', '.join(f'{ratio:.2f}' for ratio in first_s)}"


def equal(model: Model, tell: Teller, args: argparse.Namespace) -> str:
    """How many of a hundred answers are those of `Model.chat`, by one client after another and by all at once."""
    requests = asks("questions", 100, args.tokens, 77)
    expected = [model.chat(messages=ask.messages, max_new_tokens=args.tokens, temperature=0) for ask in requests]
    found = []
    for clients in (1, args.clients):
        told = run(tell, requests, clients)[1]
        found.append(sum(answer.text == text for answer, text in zip(told, expected, strict=True)))
    return f"equal to Model.chat: {found[0]} of 100 alone, {found[1]} of 100 among {args.clients} clients"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run or checkpoint, or the address of a server, http://HOST:PORT/v1")
    parser.add_argument("--model", default="", help="its name, of a server")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="of each arm of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--kinds", nargs="+", default=["questions", "texts"], choices=["questions", "texts"])
    parser.add_argument("--gaps", action="store_true", help="waits between two tokens while long prompts join")
    parser.add_argument(
        "--long", type=int, default=1024, help="tokens of those prompts; with --soak, words of the longest"
    )
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="load a server for so long, see above")
    parser.add_argument("--pid", type=int, help="of the server's process, with --soak")
    parser.add_argument("--cores", type=float, default=100.0, help="that server and clients use at most, with --soak")
    args = parser.parse_args()
    watch = Watch()
    if args.soak is not None:
        if args.pid is None or not args.run.startswith("http"):
            parser.error("--soak needs the address of a server, and --pid")
        for line in soak(args):
            print(line, flush=True)
    elif args.run.startswith("http"):
        print(*table(by_url(args.run, args.model), args), sep="\n")
    else:
        torch.set_num_threads(args.threads)
        model = load(args.run, dtype=args.dtype, device="cpu")
        engine = Engine({"model": model}, max_running=args.clients + args.gaps)
        if not args.gaps:
            print(equal(model, by_engine(engine), args), flush=True)
        for line in gaps(model, engine, args) if args.gaps else table(by_engine(engine), args):
            print(line, flush=True)
        engine.close(0)
    if crowd := watch.crowd():
        print(crowd, file=sys.stderr)


if __name__ == "__main__":
    main()
