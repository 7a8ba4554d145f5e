"""The processes that share an evaluation, as the deepspeed launcher or torchrun starts them.

In: RANK and WORLD_SIZE of the environment. Out: which of how many this process is, and a barrier. Answers go through
files, never through the network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Ranks:
    """Process `rank` of `world`; `barrier` returns when all have called it."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


ALONE = Ranks()


def from_environment() -> Ranks:
    """Join the processes of a launcher; without one, this process is alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    import torch.distributed as dist

    # Over gloo, also between GPUs: ranks only wait for each other here.
    if not dist.is_initialized():
        # Ranks wait for the slowest one, and a judge can be slow.
        dist.init_process_group("gloo", timeout=timedelta(days=2))

    def barrier() -> None:
        dist.barrier()

    return Ranks(dist.get_rank(), dist.get_world_size(), barrier)
