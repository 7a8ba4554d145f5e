"""What carries out a step: plain torch on one device, or DeepSpeed over ranks. One small interface.

Owns number formats, gradient accumulation, clipping, the optimizer and its state. The loop above hands over
micro-batches and a scale; the gradient that is applied is that of `sum(losses) * scale` over all ranks and
micro-batches, whatever the split. Refuses a step whose loss or gradient is not finite, on all ranks together: weights
and optimizer stay as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from mmit.errors import CheckpointError, ConfigError
from mmit.models.tuning import Group
from mmit.train.zero import complete


def join_deepspeed(*, cuda: bool) -> tuple[int, int]:
    """Join the ranks that the DeepSpeed launcher started; returns rank and number of ranks.

    Raises ConfigError when DeepSpeed is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "DeepSpeed is not installed", where="engine.kind", remedy="run: pip install 'mmit-tune[deepspeed]'"
        ) from error
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size()


class Engine(ABC):
    """The interface of the loop to whatever trains."""

    rank: int = 0
    world: int = 1
    device: torch.device
    layout: str  # whose optimizer state `save_state` writes, for messages

    @abstractmethod
    def forward_backward(self, tensors: Mapping[str, torch.Tensor], *, scale: float, last: bool) -> torch.Tensor:
        """Run one micro-batch and add the gradient of `sum(losses) * scale`.

        Args:
            tensors: keyword arguments of the model, on `device`.
            scale: 1 / supervised tokens of the whole step; 0 for an idle batch.
            last: this is the step's last micro-batch on this rank.

        Returns:
            (S,) losses, detached.
        """

    @abstractmethod
    def step(self, factor: float) -> float:
        """Apply the collected gradient with learning rates times `factor`; return its norm before clipping.

        A norm that is not finite means that nothing was applied.
        """

    @abstractmethod
    def save_state(self, folder: Path) -> None:
        """Write the optimizer state of this rank under `folder`."""

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote."""

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over ranks, in float64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_true(self, mine: bool) -> bool:
        """Whether `mine` is true on every rank; waits for all of them."""
        return self.all_sum([float(not mine)])[0] == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Make partitioned parameters whole inside the block (ZeRO-3); nothing to do elsewhere."""
        yield


def poisoned(losses: torch.Tensor, scale: float) -> torch.Tensor:
    """`sum(losses) * scale`; where that is not finite the factor is NaN, so that no gradient comes out finite.

    An infinite loss can have a finite gradient (a target of probability 0). With NaN, the one check of the gradient
    norm catches every case on all ranks, without a collective of its own.
    """
    total = losses.sum()
    return total * torch.where(total.detach().isfinite(), scale, math.nan)


class TorchEngine(Engine):
    """One process, one device.

    With `precision="bf16"` the model computes in bf16 while the optimizer keeps float32 masters of the trained
    parameters and sums their gradients in float32 over micro-batches; with "fp32" the parameters are the masters.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        device: torch.device,
        precision: str,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
    ) -> None:
        if precision == "fp16":
            raise ConfigError(
                "fp16 needs loss scaling, which the torch engine does not do",
                where="train.precision",
                remedy="set train.precision=bf16, or engine.kind=deepspeed",
            )
        self.device, self.clip = device, clip
        self.layout = "the torch engine"
        self.model = model.to(device)
        self.parameters = [p for g in groups for _, p in g.parameters]
        self.names = [f"{g.name}.{n}" for g in groups for n, _ in g.parameters]
        self.split = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters
        ]
        count = 0
        param_groups = []
        for g in groups:
            mine = self.masters[count : count + len(g.parameters)]
            param_groups.append({"params": mine, "lr": g.lr, "peak": g.lr})
            count += len(mine)
        self.optimizer = torch.optim.AdamW(
            param_groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda")
        )

    def forward_backward(self, tensors: Mapping[str, torch.Tensor], *, scale: float, last: bool) -> torch.Tensor:
        """Accumulate in float32."""
        losses = self.model(**tensors)
        loss = poisoned(losses, scale)
        if not loss.requires_grad:  # a text-only row of a text model that is frozen: nothing depends on it
            return losses.detach()
        loss.backward()
        if self.split:
            for p, m in zip(self.parameters, self.masters, strict=True):
                if p is not m and p.grad is not None:
                    m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
                    p.grad = None
        return losses.detach()

    def step(self, factor: float) -> float:
        """AdamW on the masters."""
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        if torch.isfinite(norm):
            if self.clip is not None and grads:
                torch.nn.utils.clip_grads_with_norm_(self.masters, self.clip, norm)
            for g in self.optimizer.param_groups:
                g["lr"] = g["peak"] * factor
            self.optimizer.step()
            if self.split:
                with torch.no_grad():
                    for p, m in zip(self.parameters, self.masters, strict=True):
                        if p is not m:
                            p.copy_(m)
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def save_state(self, folder: Path) -> None:
        """`optimizer.safetensors`: per parameter the float32 master and Adam's moments."""
        tensors: dict[str, torch.Tensor] = {}
        for name, p, m in zip(self.names, self.parameters, self.masters, strict=True):
            state = self.optimizer.state.get(m, {})
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if key in state:
                    tensors[f"{name}|{key}"] = state[key].detach().cpu().reshape(state[key].shape).contiguous()
            if p is not m:
                tensors[f"{name}|master"] = m.detach().cpu().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "optimizer.safetensors")

    def load_state(self, folder: Path) -> None:
        """Restore masters and moments; every tensor must be of this model."""
        tensors = load_file(folder / "optimizer.safetensors")
        known = {f"{n}|{k}" for n in self.names for k in ("exp_avg", "exp_avg_sq", "step", "master")}
        if strange := sorted(set(tensors) - known):
            raise CheckpointError(
                f"holds the optimizer state of parameters this run does not train, such as {strange[0]}",
                where=str(folder),
                remedy="resume with the config the checkpoint was made with, or use run.init_from for its weights only",
            )
        for name, p, m in zip(self.names, self.parameters, self.masters, strict=True):
            if (master := tensors.get(f"{name}|master")) is not None and p is not m:
                m.data.copy_(master)
                p.data.copy_(m)
            state = {k: tensors[f"{name}|{k}"] for k in ("exp_avg", "exp_avg_sq", "step") if f"{name}|{k}" in tensors}
            if state:
                self.optimizer.state[m] = {
                    k: v.clone() if k == "step" else v.to(m.device).clone() for k, v in state.items()
                }


class DeepSpeedEngine(Engine):
    """Ranks under DeepSpeed ZeRO, on CPU (gloo) or CUDA (nccl).

    mmit drives accumulation itself and hands DeepSpeed one packed micro-batch after the other.

    Args:
        config: a DeepSpeed config; `zero.complete` fills in what must agree with mmit's own and refuses the rest.
        replicated: children of `model` that DeepSpeed must not see: every rank keeps them whole. A frozen vision
            tower belongs there, since under ZeRO-3 a rank without pictures would not join in gathering it.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        device: torch.device,
        precision: str,
        config: Mapping[str, Any],
        replicated: Sequence[str] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
    ) -> None:
        import deepspeed

        self._deepspeed = deepspeed
        self._model, self._replicated = model, replicated
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device
        whole = complete(config, precision=precision, clip=clip)
        self.stage = int(whole.get("zero_optimization", {}).get("stage", 0))
        self.layout = f"DeepSpeed ZeRO-{self.stage} on {self.world} ranks"
        self.parameters = [p for g in groups for _, p in g.parameters]
        optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in g.parameters], "lr": g.lr, "peak": g.lr} for g in groups],
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self._peaks = [g.lr for g in groups]
        with self._out_of_sight():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=whole)
        # Stage 0 in fp32 has no optimizer of DeepSpeed's around ours that would check the gradient.
        self._unguarded = self.stage == 0 and precision == "fp32"

    @contextmanager
    def _out_of_sight(self) -> Iterator[None]:
        hidden = {name: self._model._modules[name] for name in self._replicated}
        try:
            for name in hidden:
                self._model._modules[name] = None
            yield
        finally:
            self._model._modules.update(hidden)

    def forward_backward(self, tensors: Mapping[str, torch.Tensor], *, scale: float, last: bool) -> torch.Tensor:
        """DeepSpeed averages gradients over ranks, and the loop wants their sum: hence `world`."""
        self.engine.set_gradient_accumulation_boundary(last)
        losses = self.engine(**tensors)
        self.engine.backward(poisoned(losses, scale * self.world), scale_wrt_gas=False)
        return losses.detach()

    def step(self, factor: float) -> float:
        """DeepSpeed's optimizer step; on a gradient that is not finite all ranks skip it."""
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        norm: Any = None
        if self._unguarded:  # the gradients are summed already, so every rank finds the same norm
            grads = [p.grad for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
            if not torch.isfinite(norm):
                self.engine.zero_grad()
                return float(norm)
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        norm = float("nan") if norm is None else float(norm)
        return norm if self.engine.was_step_applied() else float("inf")

    def save_state(self, folder: Path) -> None:
        """Write DeepSpeed's own shards."""
        with self._out_of_sight():
            self.engine.save_checkpoint(str(folder), tag="deepspeed", exclude_frozen_parameters=True)

    def load_state(self, folder: Path) -> None:
        """Read DeepSpeed's own shards; the caller has verified the folder's manifest."""
        with self._out_of_sight():
            self.engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather ZeRO-3 partitions."""
        if self.stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield
