"""Ranks: who this process is among those that train together, where it computes, and how work is shared.

Owns the choice between one process and DeepSpeed's ranks, the device of each rank, and what ranks tell each other
before the first step. Reads the launcher's environment (RANK, LOCAL_RANK, WORLD_SIZE), which the deepspeed launcher,
torchrun and `srun` scripts set.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mmit.errors import ConfigError, MmitError, from_facts
from mmit.text import terminal
from mmit.train.engines.deepspeed_engine import join_deepspeed

PIECE = 64 << 20  # bytes that go over the wire at once
# Settings of torch's allocator on CUDA: the name that torch 2.11 documents, and older ones that it still reads.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALIVE = 1.0  # seconds between signs of life of a rank that works while the others wait


@dataclass(frozen=True)
class World:
    """Rank, number of ranks, device, and whether DeepSpeed drives them."""

    rank: int
    size: int
    device: torch.device
    deepspeed: bool
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """This rank speaks and writes."""
        return self.rank == 0

    @property
    def keeper(self) -> bool:
        """This rank writes what every node keeps for itself; nodes may share a disk or not."""
        return self.local_rank == 0

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

    def gather(self, *mine: int) -> list[list[int]]:
        """The numbers of every rank, by rank."""
        if self.size == 1:
            return [list(mine)]
        table = torch.zeros(self.size, len(mine), dtype=torch.int64, device=self.device)
        table[self.rank] = torch.tensor(mine)
        torch.distributed.all_reduce(table)
        return table.tolist()

    def share(self, tensor: torch.Tensor, *, source: int) -> None:
        """Write what the contiguous `tensor` holds on rank `source` into those of all ranks, bit by bit."""
        if self.size == 1 or not tensor.numel():
            return
        # As bytes, which no format of numbers can round and every backend can send; in pieces, since each goes through
        # a buffer on the device of the collectives.
        for piece in tensor.detach().view(-1).view(torch.uint8).split(PIECE):
            there = piece.to(self.device)
            torch.distributed.broadcast(there, src=source)
            if there is not piece and self.rank != source:
                piece.copy_(there)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks run: an MmitError on one of them is raised on every one, at the block's end."""
        mine: MmitError | None = None
        try:
            yield
        except MmitError as error:
            if self.size == 1:
                raise
            mine = error
        # As JSON and not as a pickle: ranks trust each other, but `tests/test_hygiene.py` lets no pickle in at all.
        text = json.dumps(mine.facts).encode() if mine else b""
        lengths = [length for (length,) in self.gather(len(text))]
        if not any(lengths):
            return
        source = next(rank for rank, length in enumerate(lengths) if length)
        sent = torch.zeros(lengths[source], dtype=torch.uint8)
        if self.rank == source:
            sent = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.share(sent, source=source)
        self.barrier()  # none may leave before all have read it
        # A rank that failed itself raises its own error; the others that of the first rank that did.
        raise mine or from_facts(json.loads(bytes(sent.tolist())))

    def first(self, work: Callable[[Callable[[], None]], None], *, also: Callable[[], None] = lambda: None) -> None:
        """Let rank 0 do `work` while the others wait for it, however long; see `turn`."""
        self.turn(work, mine=self.main, also=also)

    def turn(
        self, work: Callable[[Callable[[], None]], None], *, mine: bool, also: Callable[[], None] = lambda: None
    ) -> None:
        """Let the ranks whose turn it is (`mine`) do `work` while the others wait; their MmitError is raised on all.

        Args:
            work: takes a function to call now and then. By it the others learn that these ranks are at work: a
                collective in which nothing happens for 10 (nccl) or 30 (gloo) minutes would end their processes.
            also: called each time that function is, for the heartbeat.
        """
        told = time.monotonic()

        # Contract: each sum has all ranks in it. Those at work send 1 whenever they call `alive`, those that wait or
        # are done send 0 in one sum after another, and the first sum in which all are 0 ends the waiting on every rank.
        def alive() -> None:
            nonlocal told
            also()
            if time.monotonic() - told > ALIVE:
                self.gather(1)
                told = time.monotonic()

        with self.together():
            try:
                if mine:
                    work(alive)
            finally:
                while any(busy for (busy,) in self.gather(0)):
                    pass


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
    if place.type == "cpu" and torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise ConfigError(
            "device is cpu, but DeepSpeed takes the GPUs that it finds here",
            where="device",
            remedy="set DS_ACCELERATOR=cpu in the environment of the launcher, or device=auto",
        )
    rank, size = join_deepspeed(cuda=place.type == "cuda")
    return World(rank, size, place, deepspeed=True, local_rank=int(os.environ["LOCAL_RANK"]))


def _device(name: str) -> torch.device:
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device", where="device", remedy="set device=cpu, or check the driver")
    grow_segments()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def grow_segments() -> None:
    """Let torch's allocator on CUDA grow its segments, unless the environment says how it shall work.

    Rows of changing length leave gaps in segments of fixed size. To be called before the process computes on CUDA: the
    allocator reads its settings once.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def speaker(active: bool) -> Any:
    """A function that prints text or a rich table to stderr, or does nothing."""

    console = terminal(stderr=True)

    def say(text: Any) -> None:
        if active:
            console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    return say
