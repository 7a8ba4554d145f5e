"""The number format of a computation: bf16 where the device multiplies it at least as fast as fp32, else fp32.

Owns the choice behind `train.precision=auto` and behind a model that is loaded for use. Takes a device, gives a name
and the reason in words. A CPU without bf16 units computes bf16 products ten to a hundred times slower than fp32 ones;
oneDNN's own flag is true for AVX-512 without such units too, where a measurement tells.
"""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import torch

SIZE = (64, 512, 256)  # tokens, outputs and inputs of a layer; large enough for every library's fast way
REPEATS = 3
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Choice(NamedTuple):
    """A number format and why it was taken."""

    name: str
    reason: str


def choose(device: torch.device) -> Choice:
    """The format to train in on a device: bf16 or fp32."""
    fast, reason = fast_half(device, "bf16")
    return Choice("bf16" if fast else "fp32", reason)


def fast_half(device: torch.device, name: str) -> tuple[bool, str]:
    """Whether a device multiplies `name`, bf16 or fp16, at least as fast as fp32, and how that is known."""
    if device.type == "cuda":
        gpu, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        has = name == "fp16" or major >= 8
        return has, f"{gpu} has {'' if has else 'no '}{name} units (compute capability {major}.{minor})"
    if device.type == "cpu" and not _flag(name):
        return False, f"this CPU has no {name} units"
    speed = half_speed(device.type, name)
    return speed >= 1, f"{name} products run {times(speed)} fp32 products here (measured)"


def warning(device: torch.device, name: str) -> str | None:
    """What to say where `name` was asked for and fp32 is faster; None where it is not, and for fp32 itself."""
    if name not in HALVES or fast_half(device, name)[0]:
        return None
    return (
        f"{name} was asked for, but {name} products run {times(half_speed(device.type, name))} fp32 products on this "
        "device (measured); fp32 is faster"
    )


def times(speed: float) -> str:
    """A ratio of speeds in words: `2.1 times as fast as`, `13 times slower than`."""
    if speed >= 1:
        return f"{speed:.2g} times as fast as"
    return f"{1 / speed:.2g} times slower than"


@cache
@torch.inference_mode()
def half_speed(kind: str, name: str) -> float:
    """Speed of `name` products over that of fp32 ones, measured once on "cpu", "cuda" or "mps"; tens of ms.

    The three products of a linear layer, forward and backward, since libraries have a fast way for some of them only.
    On one thread of a CPU, and the best of some repeats in turn, so that other processes do not decide.
    """
    tokens, outputs, inputs = SIZE
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layers = []
        for dtype in (torch.float32, HALVES[name]):
            x, w, g = (
                torch.full(shape, 0.5, dtype=dtype, device=kind)
                for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
            )
            layers.append((x, w, g))
        best = [[float("inf")] * 3 for _ in layers]
        for repeat in range(REPEATS + 1):
            for mine, (x, w, g) in zip(best, layers, strict=True):
                for n, product in enumerate(((x, w.t()), (g, w), (g.t(), x))):
                    begin = time.perf_counter()
                    torch.mm(*product)
                    _wait(kind)
                    took = time.perf_counter() - begin
                    if repeat:  # the first makes the kernels
                        mine[n] = min(mine[n], took)
    finally:
        torch.set_num_threads(threads)
    full, half = map(sum, best)
    return full / half


def _flag(name: str) -> bool:
    """What oneDNN says about the CPU, as ONEDNN_MAX_CPU_ISA bounds it; True where it does not know."""
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return True if asked is None else bool(asked())


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()
