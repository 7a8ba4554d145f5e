"""Memory and processor time of an engine over one sequence of requests, as glibc's allocator is set. See --help.

Set it in the environment: MALLOC_ARENA_MAX, MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_. Eight clients ask request
after request, number k drawn from the seed k: short and long questions, three in five about a picture, in bf16 on one
thread. The first quarter warms up. --every SECONDS gives the heap's holes back so often meanwhile.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

from mmit.cores import few_kernels, spin_briefly

os.environ.setdefault("HF_HUB_OFFLINE", "1")
spin_briefly()
few_kernels()

import PIL.Image  # noqa: E402
import torch  # noqa: E402
from bench_serve_load import held  # noqa: E402

from mmit.generate import load  # noqa: E402
from mmit.serve import heap  # noqa: E402
from mmit.serve.engine import Ask, End, Engine  # noqa: E402

WORDS = (
    "the a small large red green blue round square picture shows left right above below near behind table window tree "
    "river"
)
LENGTHS = (3, 5, 9, 15, 30, 60, 120, 250)
CLIENTS = 8


def ask(number: int) -> Ask:
    """Request number `number`."""
    draw = random.Random(number)
    length = draw.choice(LENGTHS)
    parts: list[dict[str, Any]] = []
    text = " ".join(draw.choice(WORDS.split()) for _ in range(draw.randrange(length, 2 * length)))
    if draw.random() < 0.6:
        size = draw.randrange(20, 900), draw.randrange(20, 900)
        image = PIL.Image.new("RGB", size, (draw.randrange(256), draw.randrange(256), draw.randrange(256)))
        image.paste((number % 256, number // 256, 0), (0, 0, 8, 8))
        parts.append({"type": "image", "image": image})
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    many = draw.choice([1, 4, 8, 16, 24]), draw.choice([1, 1, 1, 3])
    return Ask("model", messages, max_tokens=many[0], n=many[1], temperature=0.7, seed=number)


def answer(engine: Engine, numbers: Iterator[int], every: float) -> int:
    """Let all clients ask; returns how often the holes were given back."""
    lock, times, last = threading.Lock(), 0, time.monotonic()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            ends = [event for event in engine.submit(ask(number)).events() if isinstance(event, End)]
            if any(end.reason not in ("stop", "length") for end in ends):
                raise SystemExit(f"a request failed: {ends}")

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        if time.monotonic() - last >= every:
            heap.give_back()
            times, last = times + 1, time.monotonic()
    return times


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run, a checkpoint or an exported folder")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--every", type=float, default=float("inf"), metavar="SECONDS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Neither by itself: what is measured is the allocator, and --every.
    heap.REST_S = heap.WORK_S = threading.TIMEOUT_MAX
    engine = Engine({"model": load(args.run, dtype="bf16", device="cpu")})
    answer(engine, iter(range(args.requests // 4)), args.every)
    before = resource.getrusage(resource.RUSAGE_SELF)
    times = answer(engine, iter(range(args.requests // 4, args.requests)), args.every)
    after = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.5)
    memory, begin = held(os.getpid()).memory, time.perf_counter()
    heap.give_back()
    took, left = time.perf_counter() - begin, held(os.getpid()).memory
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print(f"{memory:,.0f} MB, without holes {left:,.0f}; given back in {1000 * took:.0f} ms, before that {times} times")
    faults = after.ru_minflt - before.ru_minflt
    print(f"processor time {user + system:.1f} s, the system's {system:.1f} s; {faults:,} page faults")
    engine.close(0)


if __name__ == "__main__":
    main()
