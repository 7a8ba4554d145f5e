"""Devices a run may be planned for: their memory and their speed on paper.

In: a name, a size such as 80GB, or nothing for this machine. Out: memory in bytes and, of a known GPU, its peak in
bf16. Peaks are dense bf16 matrix products with float32 sums, from the makers' data sheets.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from mmit.errors import ConfigError, nearest

# GB (10^9 bytes), TFLOP/s
GPUS: dict[str, tuple[float, float]] = {
    "b200": (180, 2250),
    "h200": (141, 989),
    "h100": (80, 989),
    "a100-80gb": (80, 312),
    "a100-40gb": (40, 312),
    "l40s": (48, 362),
    "l4": (24, 121),
    "a10": (24, 125),
    "rtx4090": (24, 165),
    "rtx3090": (24, 71),
}
# What CUDA's context and its libraries (the buffers of NCCL's channels among them) take besides tensors, and the
# allocator's gaps, with segments that grow as `engines.world.grow_segments` asks for. An assumption, not measured.
CUDA_CONTEXT = 1 << 30
CUDA_GAPS = 0.05


@dataclass(frozen=True)
class Device:
    """Memory in bytes, and peak FLOP/s where it is known."""

    name: str
    memory: int
    peak: float | None
    cuda: bool

    def need(self, live: int) -> int:
        """Bytes that `live` bytes of tensors take on it."""
        return round(live * (1 + CUDA_GAPS)) + CUDA_CONTEXT if self.cuda else live


def find_device(name: str | None, *, kind: str) -> Device:
    """The device of a forecast.

    Args:
        name: of `GPUS`, or memory such as 80GB; None for the machine this runs on.
        kind: auto, cpu or cuda, which decides without a name.

    Raises:
        ConfigError: it is neither.
    """
    if name is None:
        if kind != "cpu" and torch.cuda.is_available():
            facts = torch.cuda.get_device_properties(0)
            return Device(facts.name, facts.total_memory, None, cuda=True)
        # All of it, also what is in use now: the forecast is about the machine, not about this minute.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("this machine's memory", memory, None, cuda=False)
    if name.lower() in GPUS:
        memory_gb, peak = GPUS[name.lower()]
        return Device(name.lower(), round(memory_gb * 1e9), peak * 1e12, cuda=True)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib)?", name.lower()):
        unit = 2**30 if size[2] == "gib" else 10**9
        return Device(f"a GPU of {name}", round(float(size[1]) * unit), None, cuda=True)
    raise ConfigError(
        "is no GPU that mmit knows", where=f"--gpu {name}", remedy=f"give its memory, e.g. 80GB; {nearest(name, GPUS)}"
    )
