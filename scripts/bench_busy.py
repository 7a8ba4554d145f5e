"""What one busy process beside it costs: a chain of products and a training step, by how OpenMP's threads wait.

    python scripts/bench_busy.py [--threads 2] [--repeats 5]

Each arm is a process of its own, since OpenMP reads the environment when it is loaded. Arms take turns, quiet and with
one competitor (a Python process that counts); the table has the median of the repeats, in milliseconds. Needs a machine
with nothing else on it; the state of the cores before the first arm is printed. "mmit" is what `mmit train` sets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from mmit.cores import WAITING, Watch, spin_briefly

ARMS: dict[str, dict[str, str]] = {
    "OpenMP's default": {},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TOKENS = 512


def measure(what: str) -> float:
    """Milliseconds of a chain of 60 products, or of a training step; the best of three after one to warm up."""
    import torch

    from mmit.precision import choose

    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[choose(torch.device("cpu")).name]
    if what == "chain":
        x, up, down = torch.randn(TOKENS, 576), torch.randn(576, 1536) / 24, torch.randn(1536, 576) / 39
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)

        def work() -> None:
            out = x
            with torch.inference_mode():
                for _ in range(30):
                    out = (out @ up) @ down
    else:
        from mmit.models.llm import load_llm

        llm = load_llm("random", random_init=LLAMA, dtype=dtype).train()
        optimizer = torch.optim.AdamW(llm.parameters(), lr=1e-4)
        ids = torch.randint(0, LLAMA["vocab_size"], (1, TOKENS))

        def work() -> None:
            llm(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    times = []
    for _ in range(4):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times[1:])


def run(arm: dict[str, str], threads: int, what: str, *, busy: bool) -> float:
    """One measurement in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in (*WAITING, "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**clean, "OMP_NUM_THREADS": str(threads), **arm}
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--measure", what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        if beside is not None:
            beside.kill()
            beside.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every arm and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=("chain", "step"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    watch = Watch()
    time.sleep(1)
    print(f"before: {watch.others()}; load {os.getloadavg()[0]:.2f}; {given.threads} threads")
    ours: dict[str, str] = {}
    spin_briefly(ours)
    arms = {**ARMS, f"mmit ({', '.join(f'{k}={v}' for k, v in ours.items())})": ours}
    cases = [(what, busy) for what in ("chain", "step") for busy in (False, True)]
    found: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(given.repeats):
        for name, arm in arms.items():
            for what, busy in cases:
                found.setdefault((name, what, busy), []).append(run(arm, given.threads, what, busy=busy))
    print("| arm | products, quiet | products, one competitor | step, quiet | step, one competitor |")
    print("|---|---|---|---|---|")
    for name in arms:
        row = [f"{statistics.median(found[name, what, busy]):.0f} ms" for what, busy in cases]
        print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
