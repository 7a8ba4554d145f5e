"""Ranks: who this process is among those that train together, and where it computes.

Owns the choice between one process and DeepSpeed's ranks, and the device of each rank. Reads the launcher's
environment (RANK, LOCAL_RANK, WORLD_SIZE), which the deepspeed launcher, torchrun and `srun` scripts set.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmit.errors import ConfigError
from mmit.train.engine import join_deepspeed


@dataclass(frozen=True)
class World:
    """Rank, number of ranks, device, and whether DeepSpeed drives them."""

    rank: int
    size: int
    device: torch.device
    deepspeed: bool

    @property
    def main(self) -> bool:
        """This rank speaks and writes."""
        return self.rank == 0

    def most(self, mine: str, order: Sequence[str]) -> str:
        """Of the choices of all ranks, the one that stands last in `order`."""
        place = torch.tensor(order.index(mine), device=self.device)
        if self.size > 1:
            torch.distributed.all_reduce(place, op=torch.distributed.ReduceOp.MAX)
        return order[int(place)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            torch.distributed.barrier()


def join_ranks(*, kind: str, device: str) -> World:
    """Find out what this process is.

    Args:
        kind: "torch", "deepspeed", or "auto": deepspeed when a launcher started us.
        device: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: the choice and the launcher contradict each other, or there is no such device.
    """
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) >= 1
    if kind == "auto":
        kind = "deepspeed" if launched else "torch"
    if kind == "torch" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "the torch engine runs on one device, but several ranks were started",
            where="engine.kind",
            remedy="set engine.kind=deepspeed, or start one process",
        )
    place = _device(device)
    if kind == "torch":
        return World(0, 1, place, deepspeed=False)
    if not launched:
        raise ConfigError(
            "the DeepSpeed engine needs ranks, and no launcher started any",
            where="engine.kind",
            remedy="start it with: deepspeed --num_gpus N scripts/train.py --config FILE; or set engine.kind=auto",
        )
    rank, size = join_deepspeed(cuda=place.type == "cuda")
    return World(rank, size, place, deepspeed=True)


def _device(name: str) -> torch.device:
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device", where="device", remedy="set device=cpu, or check the driver")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def speaker(active: bool) -> Any:
    """A function that prints text or a rich table to stderr, or does nothing."""
    from rich.console import Console

    console = Console(stderr=True)

    def say(text: Any) -> None:
        if active:
            console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    return say
