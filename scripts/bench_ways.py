"""What each shorter way through a step brings: mmit's step with one of them switched off, against the whole.

    python scripts/bench_ways.py --rounds 8 --threads 1

The case is that of `bench_train.py`: SmolLM2-135M, a small CLIP tower, LoRA r16 and the projector trained, batches of
eight short records. All ways run in one process, in turns, every other round backwards, on the same batches; each must
give the loss of the whole within rounding. Prints processor time of a step and the peak of live bytes over those of the
whole, with the lines of code that a way costs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_meters import LiveBytes, ratio_interval, tensors_of
from bench_train_arms import BATCH, Arm, make_case, mmit_arm
from peft.tuners.lora import Linear

from mmit.models import attention
from mmit.models.tuning.fused_lora import FusedLinear
from mmit.models.tuning.fused_norm import FusedNorm

SAME = {"fp32": 1e-4, "bf16": 0.01}  # relative difference of losses that is rounding
ROOT = Path(__file__).resolve().parents[1] / "mmit" / "models"


@contextlib.contextmanager
def _classes(model: torch.nn.Module, given: Callable[[torch.nn.Module], type | None]) -> Iterator[None]:
    """Modules have the class that `given` names, where it names one."""
    changed = [(m, type(m), kind) for m in model.modules() if (kind := given(m)) is not None]
    assert changed, "nothing to switch off"
    for module, _, kind in changed:
        module.__class__ = kind
    try:
        yield
    finally:
        for module, kind, _ in changed:
            module.__class__ = kind


def peft_lora(arm: Arm) -> Any:
    """PEFT's own LoRA layers."""
    return _classes(arm.model, lambda m: Linear if type(m) is FusedLinear else None)


def own_norms(arm: Arm) -> Any:
    """The model's own RMSNorm."""
    return _classes(arm.model, lambda m: type(m).__mro__[2] if isinstance(m, FusedNorm) else None)


@contextlib.contextmanager
def _patched(name: str, value: Any) -> Iterator[None]:
    kept = getattr(attention, name)
    setattr(attention, name, value)
    try:
        yield
    finally:
        setattr(attention, name, kept)


def kernel_only(arm: Arm) -> Any:
    """torch's fused kernel for buckets of few keys too."""
    return _patched("SMALL", -1)


def dense(arm: Arm) -> Any:
    """One mask over the whole row, as transformers would be given one, in place of buckets."""
    masks: dict[int, torch.Tensor] = {}

    def whole_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, scale: float, **_: Any) -> torch.Tensor:
        if id(plan) not in masks:  # layers of one row share their plan
            masks.clear()
            seen = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
            for start, length, parent in plan.row.nodes:
                own = slice(start, start + length)
                if parent >= 0:
                    above = plan.row.nodes[parent]
                    seen[own] = seen[above[0] + above[1] - 1]  # what the parent's last token sees
                seen[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
            masks[id(plan)] = seen
        out = F.scaled_dot_product_attention(q, k, v, masks[id(plan)], scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return _patched("forest_attention", whole_row)


@contextlib.contextmanager
def side_by_side(arm: Arm) -> Iterator[None]:
    """A padded batch in the model's own attention, nothing shared: what models get whose records cannot be packed."""
    model: Any = arm.model
    model.padded = True
    try:
        yield
    finally:
        model.padded = False


WAYS: dict[str, tuple[Callable[[Arm], Any], tuple[str, ...]]] = {
    "PEFT's LoRA": (peft_lora, ("tuning/fused_lora.py",)),
    "the model's RMSNorm": (own_norms, ("tuning/fused_norm.py",)),
    "SDPA for few keys": (kernel_only, ()),
    "one mask in place of buckets": (dense, ("buckets.py", "attention_plan.py")),
    "nothing shared": (contextlib.nullcontext, ()),
    "padded, nothing shared": (side_by_side, ("padded.py",)),
}
APART = {"nothing shared", "padded, nothing shared"}  # run on batches that hold common beginnings in each record


def measure(case: Any, *, rounds: int, precision: str) -> dict[str, dict[str, list[float]]]:
    """Way -> its losses, processor seconds and peaks of live bytes; "whole" is mmit as it ships."""
    arms = {share: mmit_arm(case, bf16=precision == "bf16", share=share) for share in (True, False)}
    ways = {"whole": contextlib.nullcontext} | {name: off for name, (off, _) in WAYS.items()}
    table: dict[str, dict[str, list[float]]] = {}
    for name, off in ways.items():  # before any step, on the same weights
        with off(arms[name not in APART]):
            table[name] = {"loss": [arms[name not in APART].loss(0)[0]], "bytes": [], "seconds": []}
    expected = table["whole"]["loss"][0]
    for name, row in table.items():
        if abs(row["loss"][0] - expected) > SAME[precision] * expected:
            sys.exit(f"{name}: loss {row['loss'][0]}, mmit as it ships {expected}: not the same step")
    for name, off in ways.items():
        arm = arms[name not in APART]
        with off(arm), LiveBytes(tensors_of(arm.model, arm.optimizer())) as live:
            arm.step(0)
        table[name]["bytes"].append(float(live.peak))
    for number in range(-1, rounds):  # the first round warms up
        for name in list(table) if number % 2 == 0 else reversed(list(table)):
            arm = arms[name not in APART]
            with ways[name](arm):
                start = time.process_time()
                arm.step(number + 2)
            if number >= 0:
                table[name]["seconds"].append(time.process_time() - start)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=list(SAME))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(Path(folder) / "case", batches=args.rounds + 2, seed=0)
        table = measure(case, rounds=args.rounds, precision=args.precision)
    whole = table["whole"]
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    print(f"torch {torch.__version__}, {args.precision}, {threads}, batches of {BATCH}, {args.rounds} rounds\n")
    print("| without it | processor time of a step | live bytes | lines |\n|---|---|---|---|")
    for name, row in table.items():
        if name != "whole":
            ratio, low, high = ratio_interval(row["seconds"], whole["seconds"])
            lines = sum(len((ROOT / path).read_text().splitlines()) for path in WAYS[name][1])
            live = row["bytes"][0] / whole["bytes"][0]
            print(f"| {name} | {ratio:.2f} x ({low:.2f} to {high:.2f}) | {live:.2f} x | {lines or ''} |")


if __name__ == "__main__":
    main()
