"""Pairs mmit with TRL's SFTTrainer and a plain transformers Trainer on one case; prints a Markdown table. See --help.

SmolLM2-135M, a small CLIP tower and a two-layer projector in one llava-hf folder; LoRA r16 and the projector are
trained, batch 8, in bf16 or float32. All arms start from the same weights and get the same samples. First their losses
must agree (in float32 without gradient, and over the first steps as timed). Then FLOPs and live bytes of one step are
counted, which repeats exactly, and steps are timed in turns: each round runs every arm on the same batch, every other
one backwards. A round begins with the linear layers' products of mmit's model alone, in the same format and threads:
an arm's share of that rate is the FLOPs it executes a second over it, both by processor time, which other work on the
machine disturbs least.
A peer that is not installed (`pip install trl==1.16.0`) is a line that says so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from bench_meters import LiveBytes, Products, flops_of, ratio_interval, tensors_of  # noqa: E402
from bench_train_arms import BATCH, Arm, Case, make_case, mmit_arm  # noqa: E402
from bench_train_peers import trainer_arm, trl_arm  # noqa: E402

ARMS: dict[str, Callable[..., Arm]] = {
    "mmit": mmit_arm,
    "TRL, checkpointing off": partial(trl_arm, checkpointing=False),
    "TRL, checkpointing on": partial(trl_arm, checkpointing=True),
    "transformers Trainer": trainer_arm,
}
SAME = {"fp32": 1e-4, "bf16": 0.01}  # relative difference of losses that is rounding
WARM = 2  # steps before anything is measured, whose losses are compared


def say(text: str) -> None:
    """Progress on stderr; the table is the only output."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def begin(case: Case, names: list[str], *, bf16: bool) -> tuple[dict[str, Arm], dict[str, str]]:
    """Build the arms; those whose packages are missing come back with the reason."""
    arms, missing = {}, {}
    for name in names:
        try:
            arms[name] = ARMS[name](case, bf16=bf16)
        except ImportError as error:
            missing[name] = str(error)
    return arms, missing


def check_float32(case: Case, names: list[str]) -> dict[str, float]:
    """Losses of batch 0 in float32, one arm in memory at a time; exits where they differ."""
    found: dict[str, tuple[float, int, int]] = {}
    for name in names:
        arms, _ = begin(case, [name], bf16=False)
        if name in arms:
            found[name] = arms[name].loss(0)
        del arms
        gc.collect()
    own = found["mmit"]
    for name, (loss, targets, _) in found.items():
        if abs(loss - own[0]) > SAME["fp32"] * own[0] or targets != own[1]:
            sys.exit(f"{name} has loss {loss} over {targets} tokens, mmit {own[0]} over {own[1]}: not the same task")
    return {name: value[0] for name, value in found.items()}


def measure(arms: dict[str, Arm], *, rounds: int, precision: str) -> dict[str, dict[str, Any]]:
    """Warm up, count and time."""
    table: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        losses = [arm.step(i) for i in range(WARM)]
        _, targets, tokens = arm.loss(WARM)
        head = getattr(arm.model, "llm", arm.model).get_output_embeddings()
        row: dict[str, Any] = {"losses": losses, "targets": targets, "tokens": tokens, "seconds": []}
        row |= {"processor_seconds": [], "product_rates": []}
        if arm.floor is not None:
            row["floor"] = arm.floor(WARM)
        row |= flops_of(lambda arm=arm: arm.step(WARM), head)  # type: ignore[misc]
        with LiveBytes(tensors_of(arm.model, arm.optimizer())) as live:
            arm.step(WARM + 1)
        table[name] = row | {"live_bytes": live.peak, "held_bytes": live.held}
        say(f"{name}: {row['flops'] / 1e9:.1f} GFLOP, {live.peak / 2**20:.0f} MiB")
    for name, row in table.items():
        for ours, theirs in zip(table["mmit"]["losses"], row["losses"], strict=True):
            if abs(ours - theirs) > SAME[precision] * ours:
                sys.exit(f"{name} has losses {row['losses']}, mmit {table['mmit']['losses']}: not the same training")
    own = arms["mmit"].model
    products = Products(getattr(own, "llm", own), tokens=table["mmit"]["tokens"])
    for number in range(rounds):
        rate = products.rate()
        for row in table.values():
            row["product_rates"].append(rate)
        for name in list(arms) if number % 2 == 0 else reversed(list(arms)):
            start, busy = time.perf_counter(), time.process_time()
            arms[name].step(WARM + 2 + number)
            table[name]["seconds"].append(time.perf_counter() - start)
            table[name]["processor_seconds"].append(time.process_time() - busy)
        say(f"round {number + 1} of {rounds}")
    return table


def share_of_products(row: dict[str, Any]) -> float:
    """The rate of FLOPs in steps over that of the products alone, the median of the rounds."""
    pairs = zip(row["processor_seconds"], row["product_rates"], strict=True)
    return statistics.median(row["flops"] / seconds / rate for seconds, rate in pairs)


def markdown(table: dict[str, dict[str, Any]], missing: dict[str, str], *, precision: str) -> str:
    """The figures of all arms, ratios against mmit."""
    own = table["mmit"]
    columns = ["GFLOP a step", "head", "live MiB", "tokens run", "samples/s", "of products"]
    columns += ["mmit is faster by", "by processor time"]
    lines = [
        f"| batch {BATCH}, {precision} | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in table.items():
        rate = faster = busy = share = "not timed"
        if row["seconds"]:
            share = f"{100 * share_of_products(row):.0f} %"
            rate = f"{BATCH * len(row['seconds']) / sum(row['seconds']):.2f}"
            faster, busy = (
                "" if row is own else "{:.2f} x ({:.2f} to {:.2f})".format(*ratio_interval(row[key], own[key]))
                for key in ("seconds", "processor_seconds")
            )
        flops, live = row["flops"] / own["flops"], row["live_bytes"] / own["live_bytes"]
        lines.append(
            f"| {name} | {row['flops'] / 1e9:.1f} ({flops:.2f} x) | {row['head_flops'] / 1e9:.1f} | "
            f"{row['live_bytes'] / 2**20:.0f} ({live:.2f} x) | {row['tokens']} | {rate} | {share} | {faster} | {busy} |"
        )
    lines += [f"| {name} | not installed: {reason} {'| ' * len(columns)}|" for name, reason in missing.items()]
    floor = own["floor"]
    if own["seconds"]:
        rates = [f"{f(own['product_rates']) / 1e9:.0f}" for f in (statistics.median, min, max)]
        lines.append(f"\nproducts alone: {rates[0]} GFLOP for a second of a core ({rates[1]} to {rates[2]})")
    lines.append(f"\nmmit's executed FLOPs / floor: {own['flops']} / {floor} = {own['flops'] / floor:.4f}")
    return "\n".join(lines)


def versions() -> str:
    """What was compared."""
    found = []
    for package in ("torch", "transformers", "peft", "trl"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    # oneDNN chooses by what the processor has, unless it is bounded.
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    bounded = f", ONEDNN_MAX_CPU_ISA={isa}" if isa else ""
    return ", ".join(found) + f", {torch.get_num_threads()} threads{bounded}"


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each arm; 0 counts only")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), help="mmit is always one")
    parser.add_argument("--precision", default="bf16", choices=list(SAME), help="of weights and products, in all arms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ["mmit", *(name for name in args.arms if name != "mmit")]
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(Path(folder) / "case", batches=args.rounds + WARM + 2, seed=args.seed)
        losses = check_float32(case, [name for name in names if name != "TRL, checkpointing on"])
        say(f"losses in float32: {losses}")
        arms, missing = begin(case, names, bf16=args.precision == "bf16")
        table = measure(arms, rounds=args.rounds, precision=args.precision)
    print(versions() + "\n\n" + markdown(table, missing, precision=args.precision))
    print("losses in float32, batch 0: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    print(
        f"losses of the first steps in {args.precision}: " + ", ".join(f"{n} {r['losses']}" for n, r in table.items())
    )
    if args.out:
        facts = {"versions": versions(), "precision": args.precision, "float32": losses, "arms": table}
        args.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
