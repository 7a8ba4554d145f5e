"""What carries out a step: plain torch on one device, or DeepSpeed over ranks. One small interface.

Owns number formats, gradient accumulation, clipping, the optimizer and its state. The loop above hands over
micro-batches and a scale; the gradient that is applied is that of `sum(losses * weights) * scale` over all ranks and
micro-batches, whatever the split. Refuses a step whose loss or gradient is not finite, on all ranks together: weights
and optimizer stay as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmit.models.partition import shape
from mmit.train.engines.state import read_state, write_state

Reduce = Callable[[torch.Tensor], torch.Tensor]  # losses of targets -> losses of what is compared


@dataclass(frozen=True)
class Update:
    """How AdamW changes the weights, and the norm that gradients are clipped to; None for no clipping."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def adamw(self, groups: Sequence[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups, which hold their learning rates."""
        options: dict[str, Any] = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return torch.optim.AdamW(groups, **options, fused=fused)


class Engine(ABC):
    """The interface of the loop to whatever trains."""

    rank: int = 0
    world: int = 1
    device: torch.device
    numbers: Any = None  # process group of `all_sum`; None for the one that all else uses
    optimizer: Any
    names: list[str]  # of the trained parameters, in the order of
    parameters: list[nn.Parameter]

    @abstractmethod
    def forward_backward(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        scale: float,
        last: bool,
        weights: torch.Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> torch.Tensor:
        """Run one micro-batch and add the gradient of `sum(losses * weights) * scale`.

        Args:
            tensors: keyword arguments of the model, on `device`.
            scale: 1 / sum of the weights of the whole step; 0 for an idle batch.
            last: this is the step's last micro-batch on this rank.
            weights: (S,) of the losses, None where all are 1.
            reduce: makes other losses (B,) of the model's, which `weights` and the gradient are then about.

        Returns:
            (S,) losses, detached and not weighted; (B,) with `reduce`.
        """

    @abstractmethod
    def losses(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(S,) losses of one micro-batch without gradients; under ZeRO-3 all ranks must call it together."""

    @abstractmethod
    def step(self, factor: float) -> float:
        """Apply the collected gradient with learning rates times `factor`; return its norm before clipping.

        A norm that is not finite means that nothing was applied.
        """

    @abstractmethod
    def states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Whole optimizer state by parameter name: keys of `optimizer_state.KEYS`; ranks must iterate together."""

    @abstractmethod
    def take_states(self, states: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> None:
        """Put back what `states` of an engine of any kind gave."""

    def save_state(self, folder: Path) -> None:
        """Write the optimizer state under `folder`."""
        write_state(folder, self.states(), shapes=self.shapes(), write=self.rank == 0)

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` of any engine wrote. Raises CheckpointError."""
        self.take_states(read_state(folder, shapes=self.shapes()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained parameters, partitioned or not."""
        # ZeRO-3 leaves an empty tensor and keeps the shape beside it.
        return {n: tuple(shape(p)) for n, p in zip(self.names, self.parameters, strict=True)}

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over ranks, in float64."""
        if self.world == 1:
            return list(values)
        # Why on the host: a sum by NCCL would queue behind all the device has to do, and the host would wait for that.
        # float64 holds counts of tokens exactly up to 2^53, and sums of losses to more digits than float32 has.
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.numbers)
        return total.tolist()

    def all_true(self, mine: bool) -> bool:
        """Whether `mine` is true on every rank; waits for all of them."""
        # Counting those that are not: a sum of trues would have to be compared with the number of ranks.
        return self.all_sum([float(not mine)])[0] == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Make partitioned parameters whole inside the block (ZeRO-3); nothing to do elsewhere."""
        yield


def weighted(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Losses (S,) times their weights, on the losses' device; None stands for weights of 1."""
    return losses if weights is None else losses * weights.to(losses.device, non_blocking=True)


def poisoned(losses: torch.Tensor, scale: float) -> torch.Tensor:
    """`sum(losses) * scale`; where that is not finite the factor is NaN, so that no gradient comes out finite.

    An infinite loss can have a finite gradient (a target of probability 0). With NaN, the one check of the gradient
    norm catches every case on all ranks, without a collective of its own.
    """
    total = losses.sum()
    return total * torch.where(total.detach().isfinite(), scale, math.nan)
