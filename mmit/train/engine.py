"""What carries out a step: plain torch on one device, or DeepSpeed over ranks. One small interface.

Owns number formats, gradient accumulation, clipping, the optimizer and its state. The loop above hands over
micro-batches and a scale; the gradient that is applied is that of `sum(losses * weights) * scale` over all ranks and
micro-batches, whatever the split. Refuses a step whose loss or gradient is not finite, on all ranks together: weights
and optimizer stay as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from mmit.errors import ConfigError
from mmit.train.optimizer_state import placed, placed_step, read_state, write_state
from mmit.train.zero import complete, zero_stage

if TYPE_CHECKING:
    from mmit.models.tuning import Group


def join_deepspeed(*, cuda: bool) -> tuple[int, int]:
    """Join the ranks that the launcher started: (rank, number of ranks). Raises ConfigError without DeepSpeed."""
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
    ) -> torch.Tensor:
        """Run one micro-batch and add the gradient of `sum(losses * weights) * scale`.

        Args:
            tensors: keyword arguments of the model, on `device`.
            scale: 1 / sum of the weights of the whole step; 0 for an idle batch.
            last: this is the step's last micro-batch on this rank.
            weights: (S,) of the losses, None where all are 1.

        Returns:
            (S,) losses, detached and not weighted.
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
        return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in zip(self.names, self.parameters, strict=True)}

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
            problem = "fp16 needs loss scaling, which the torch engine does not do"
            remedy = "set train.precision=bf16, or engine.kind=deepspeed"
            raise ConfigError(problem, where="train.precision", remedy=remedy)
        self.device, self.clip = device, clip
        self.model = model.to(device)
        self.parameters = [p for g in groups for _, p in g.parameters]
        self.names = [f"{g.name}.{n}" for g in groups for n, _ in g.parameters]
        self.split = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        masters = iter(self.masters)
        param_groups = [{"params": [next(masters) for _ in g.parameters], "lr": g.lr, "peak": g.lr} for g in groups]
        self.optimizer = torch.optim.AdamW(
            param_groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda")
        )

    def forward_backward(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        scale: float,
        last: bool,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Accumulate in float32."""
        losses = self.model(**tensors)
        loss = poisoned(weighted(losses, weights), scale)
        if not loss.requires_grad:  # a text-only row of a text model that is frozen: nothing depends on it
            return losses.detach()
        loss.backward()
        if self.split:
            for p, m in zip(self.parameters, self.masters, strict=True):
                if p is not m and p.grad is not None:
                    m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
                    p.grad = None
        return losses.detach()

    @torch.no_grad()
    def losses(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One forward pass."""
        return self.model(**tensors)

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

    def states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Moments, and the float32 master where there is one."""
        for name, p, m in zip(self.names, self.parameters, self.masters, strict=True):
            state = dict(self.optimizer.state.get(m, {}))
            if state and p is not m:
                state["master"] = m
            yield name, state

    def take_states(self, states: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> None:
        """Restore moments and masters."""
        number = {n: i for i, n in enumerate(self.names)}
        for name, state in states:
            p, m = self.parameters[number[name]], self.masters[number[name]]
            master = state.pop("master", None)
            if master is not None and p is not m:
                m.data.copy_(master)
                p.data.copy_(m)
            self.optimizer.state[m] = placed(state, m, self.optimizer)


class DeepSpeedEngine(Engine):
    """Ranks under DeepSpeed ZeRO, on CPU (gloo) or CUDA (nccl).

    mmit drives accumulation itself and hands DeepSpeed one packed micro-batch after the other.

    Args:
        config: a DeepSpeed config; `zero.complete` fills in what must agree with mmit's own and refuses the rest.
        replicated: children of `model` that DeepSpeed must not see: every rank keeps them whole. A frozen vision
            tower belongs there, since under ZeRO-3 a rank without pictures would not join in gathering it.
    """

    def __init__(  # noqa: PLR0913
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
        self.parameters = [p for g in groups for _, p in g.parameters]
        self.names = [f"{g.name}.{n}" for g in groups for n, _ in g.parameters]
        trained = sum(math.prod(shape) for shape in self.shapes().values())
        whole = complete(config, precision=precision, clip=clip, trained=trained)
        self.stage = zero_stage(whole)
        optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in g.parameters], "lr": g.lr, "peak": g.lr} for g in groups],
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )
        self._peaks = [g.lr for g in groups]
        with self._out_of_sight():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=whole)
        # Stage 0 in fp32: DeepSpeed steps our AdamW itself, without flat masters and without a look at the gradient.
        self._plain = self.stage == 0 and precision == "fp32"

    @contextmanager
    def _out_of_sight(self) -> Iterator[None]:
        hidden = {name: self._model._modules[name] for name in self._replicated}
        try:
            for name in hidden:
                self._model._modules[name] = None
            yield
        finally:
            self._model._modules.update(hidden)

    def forward_backward(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        scale: float,
        last: bool,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """DeepSpeed averages gradients over ranks, and the loop wants their sum: hence `world`."""
        self.engine.set_gradient_accumulation_boundary(last)
        losses = self.engine(**tensors)
        self.engine.backward(poisoned(weighted(losses, weights), scale * self.world), scale_wrt_gas=False)
        return losses.detach()

    @torch.no_grad()
    def losses(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One forward pass; the model is in evaluation mode."""
        return self.engine(**tensors)

    def step(self, factor: float) -> float:
        """DeepSpeed's optimizer step; on a gradient that is not finite all ranks skip it."""
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        norm: Any = None
        if self._plain:  # the gradients are summed already, so every rank finds the same norm
            grads = [p.grad for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
            if not torch.isfinite(norm):
                self.engine.zero_grad()
                return float(norm)
        with self._out_of_sight():
            self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        norm = float("nan") if norm is None else float(norm)
        return norm if self.engine.was_step_applied() else float("inf")

    def states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Whole tensors, gathered from all ranks one parameter at a time."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        inner = self._inner
        steps = [float(s["step"]) for s in inner.state.values() if "step" in s]
        self._link_states()
        for name, p in zip(self.names, self.parameters, strict=True):
            if not steps:
                yield name, {}
            elif self._plain:
                yield name, dict(inner.state.get(p, {}))
            else:
                state = {k: safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")}
                shape = getattr(p, "ds_shape", p.shape)
                state["master"] = safe_get_full_fp32_param(p)
                yield name, {"step": torch.tensor(max(steps)), **{k: v.reshape(shape) for k, v in state.items()}}

    def take_states(self, states: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> None:
        """Each rank keeps its part of every tensor."""
        number = {n: p for n, p in zip(self.names, self.parameters, strict=True)}
        if self._plain:
            for name, state in states:
                state.pop("master", None)
                p = number[name]
                self._inner.state[p] = placed(state, p, self._inner)
            return
        flats = self._flat_masters()
        for place, flat in enumerate(flats):
            with self._from_disk(place):
                zeros = {k: torch.zeros_like(flat.data) for k in ("exp_avg", "exp_avg_sq")}
                self._inner.state[flat] = {"step": placed_step(torch.tensor(0.0), flat, self._inner), **zeros}
        self._link_states()
        step = torch.tensor(0.0)
        for name, state in states:
            step = torch.maximum(step, state["step"])
            for key in ("exp_avg", "exp_avg_sq", "master"):
                if key in state:
                    self._set_part(number[name], state[key], key)
        for flat in flats:
            self._inner.state[flat]["step"] = placed_step(step, flat, self._inner)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """Our AdamW inside DeepSpeed's optimizer."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _flat_masters(self) -> list[torch.Tensor]:
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner.param_groups for p in group["params"]]

    @contextmanager
    def _from_disk(self, number: int) -> Iterator[None]:
        """Bring flat masters that are offloaded to NVMe into memory; afterwards they and new moments are written."""
        away = self.stage == 3 and self.optimizer._swappable_optimizer_subgroup(number)
        if away:
            self.optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if away:
            self.optimizer._optimizer_states_and_gradient_swap_out(number)

    def _link_states(self) -> None:
        """Tell DeepSpeed where the moments of each parameter are; it does so itself after the first group's first step,
        when later groups have none yet."""
        if self.stage < 3 and not self._plain:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_part(self, p: nn.Parameter, value: torch.Tensor, key: str) -> None:
        from deepspeed import utils

        value = value.to(self.device)
        if self.stage < 3:
            if key == "master":
                utils.safe_set_full_fp32_param(p, value)
            else:
                utils.safe_set_full_optimizer_state(p, value, key)
            return
        # DeepSpeed's setter of whole tensors fails where ranks do not divide them: cut our padded part ourselves.
        size = utils.safe_get_local_fp32_param(p).numel()
        padded = torch.zeros(size * self.world, device=self.device)
        padded[: value.numel()] = value.flatten()
        part = padded[self.rank * size : (self.rank + 1) * size]
        if key == "master":
            utils.safe_set_local_fp32_param(p, part)
        else:
            utils.safe_set_local_optimizer_state(p, part, key)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather ZeRO-3 partitions."""
        if self.stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield
