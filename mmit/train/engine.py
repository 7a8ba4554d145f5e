"""What carries out a step: plain torch on one device, or DeepSpeed over ranks. One small interface.

Owns number formats, gradient accumulation, clipping, the optimizer and its state. The loop above hands over
micro-batches and a scale; the gradient that is applied is that of `sum(losses) * scale` over all ranks and
micro-batches, whatever the split. Refuses a step whose gradient is not finite: weights and optimizer stay as they are.
"""

from __future__ import annotations

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

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Make partitioned parameters whole inside the block (ZeRO-3); nothing to do elsewhere."""
        yield


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
        loss = losses.sum() * scale
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

    mmit fills in what must agree with its own config (batch sizes, precision, clipping) and drives accumulation
    itself, so a DeepSpeed JSON may not set those.
    """

    OWN = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
        "optimizer",
        "scheduler",
    )

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        *,
        device: torch.device,
        precision: str,
        config: Mapping[str, Any],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
    ) -> None:
        import deepspeed

        if clash := sorted(set(config) & set(self.OWN)):
            raise ConfigError(
                f"sets {', '.join(clash)}, which mmit fills in from its own config",
                where="engine.deepspeed",
                remedy="remove them from the DeepSpeed JSON",
            )
        self._deepspeed = deepspeed
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in g.parameters], "lr": g.lr, "peak": g.lr} for g in groups],
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self._peaks = [g.lr for g in groups]
        whole = {
            **config,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=whole)

    def forward_backward(self, tensors: Mapping[str, torch.Tensor], *, scale: float, last: bool) -> torch.Tensor:
        """DeepSpeed averages gradients over ranks, and the loop wants their sum: hence `world`."""
        self.engine.set_gradient_accumulation_boundary(last)
        losses = self.engine(**tensors)
        self.engine.backward(losses.sum() * (scale * self.world), scale_wrt_gas=False)
        return losses.detach()

    def step(self, factor: float) -> float:
        """DeepSpeed's optimizer step; it skips by itself on overflow."""
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        return norm if self.engine.was_step_applied() else float("inf")

    def save_state(self, folder: Path) -> None:
        """Write DeepSpeed's own shards."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed", exclude_frozen_parameters=True)

    def load_state(self, folder: Path) -> None:
        """Read DeepSpeed's own shards; the caller has verified the folder's manifest."""
        self.engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather ZeRO-3 partitions."""
        if self.stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield
