"""Ranks under DeepSpeed ZeRO; the only place that imports DeepSpeed.

Before the model is loaded, `check_deepspeed` lets DeepSpeed read its config: what it would refuse later becomes one
clear error.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from mmit.errors import ConfigError, nearest
from mmit.models.partition import shape
from mmit.train.engines.base import Engine, Reduce, Update, poisoned, weighted
from mmit.train.engines.state import placed, placed_step
from mmit.train.engines.zero import WHERE, complete, zero_stage

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
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 deprecates, at every step of ZeRO.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size()


def check_deepspeed(options: Mapping[str, Any]) -> None:
    """Let DeepSpeed read a complete config before anything is loaded.

    Raises:
        ConfigError: it does not take a key or value, or this machine cannot compute in fp16 or offload to NVMe.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = options.get("zero_optimization") or {}
    known = DeepSpeedZeroConfig.model_fields  # some are written otherwise in the JSON: stage3_max_live_parameters
    fields = {*known, *(f.alias for f in known.values() if f.alias)}
    for key in zero:  # DeepSpeed refuses them too, but does not name the key that was meant
        if key not in fields:
            where = f"{WHERE}.zero_optimization.{key}"
            raise ConfigError("ZeRO has no such key", where=where, remedy=nearest(key, fields))
    try:
        DeepSpeedConfig(copy.deepcopy(dict(options)))  # a copy: it fills in and deletes keys while it reads
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([WHERE, *map(str, first["loc"])])
        raise ConfigError(first["msg"], where=where, remedy="fix it in the DeepSpeed JSON") from error
    except (ValueError, TypeError, AssertionError) as error:
        problem = str(error).split("\n")[0] or "DeepSpeed refuses it"
        raise ConfigError(problem, where=WHERE, remedy="fix the DeepSpeed JSON") from error
    if options["fp16"]["enabled"] and not get_accelerator().is_fp16_supported():
        problem = f"DeepSpeed does not train in fp16 on this {get_accelerator().device_name()}"
        raise ConfigError(problem, where="train.precision", remedy="set train.precision=bf16 or fp32")
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) or {}
        if section.get("device") != "nvme":
            continue
        where, path = f"{WHERE}.zero_optimization.{key}", section.get("nvme_path")
        if not path or not Path(path).is_dir():
            raise ConfigError(f"nvme_path {path}: no such folder", where=where, remedy="name one on the local NVMe")
        # DeepSpeed itself would find out when it makes the optimizer, with everything loaded already.
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible(verbose=False):
            raise ConfigError(
                "offload to NVMe needs libaio, which DeepSpeed does not find here",
                where=where,
                remedy="install libaio (apt install libaio-dev), or use device: cpu",
            )


class DeepSpeedEngine(Engine):
    """Ranks under DeepSpeed ZeRO, on CPU (gloo) or CUDA (nccl, and gloo for the numbers that `all_sum` adds).

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
        update: Update = Update(),  # noqa: B008 - frozen
    ) -> None:
        import deepspeed

        self._deepspeed = deepspeed
        self._model, self._replicated = model, replicated
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.numbers = dist.new_group(backend="gloo") if self.world > 1 else None
        self.device = device
        self.parameters = [p for g in groups for _, p in g.parameters]
        self.names = [f"{g.name}.{n}" for g in groups for n, _ in g.parameters]
        # By the shapes as they are whole: under ZeRO-3 a parameter holds its rank's part alone.
        trained = sum(math.prod(shape) for shape in self.shapes().values())
        whole = complete(config, precision=precision, clip=update.clip, trained=trained)
        self.stage = zero_stage(whole)
        by_group = [{"params": [p for _, p in g.parameters], "lr": g.lr, "peak": g.lr} for g in groups]
        optimizer = update.adamw(by_group, fused=True)
        self._peaks = [g.lr for g in groups]
        with self._out_of_sight():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=whole)
        # Stage 0 in fp32: DeepSpeed steps our AdamW itself, without flat masters and without a look at the gradient.
        self._plain = self.stage == 0 and precision == "fp32"

    @contextmanager
    def _out_of_sight(self) -> Iterator[None]:
        # `initialize` and `step` walk over the model's children: the first divides and broadcasts what it finds, the
        # second frees what was gathered. A child that is None for that moment is neither divided nor touched.
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
        reduce: Reduce | None = None,
    ) -> torch.Tensor:
        """Run one micro-batch and add its gradient.

        DeepSpeed averages gradients over ranks, and the loop wants their sum: hence `world`.

        Args:
            tensors, scale, last, weights, reduce: as in `Engine.forward_backward`.

        Returns:
            (S,) losses, detached and not weighted; (B,) with `reduce`.
        """
        # Told, not counted: micro-batches of a step differ in number from step to step, DeepSpeed counts a fixed one.
        self.engine.set_gradient_accumulation_boundary(last)
        losses = self.engine(**tensors)
        losses = losses if reduce is None else reduce(losses)
        self.engine.backward(poisoned(weighted(losses, weights), scale * self.world), scale_wrt_gas=False)
        return losses.detach()

    @torch.no_grad()
    def losses(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One forward pass; the model is in evaluation mode."""
        return self.engine(**tensors)

    def step(self, factor: float) -> float:
        """DeepSpeed's optimizer step; on a gradient that is not finite all ranks skip it."""
        # From the peaks each time: a product of factors would gather rounding, and a resumed run would have another lr.
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
        # None where DeepSpeed found an overflow before it had a norm. Either way the caller gets a number that is not
        # finite, which is how `Engine.step` says that nothing was applied.
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        norm = float("nan") if norm is None else float(norm)
        return norm if self.engine.was_step_applied() else float("inf")

    def states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Whole tensors, gathered from all ranks one parameter at a time."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        # The count of steps is one number per flat group; all groups have taken equally many.
        inner = self._inner
        steps = [float(s["step"]) for s in inner.state.values() if "step" in s]
        self._link_states()
        for name, p in zip(self.names, self.parameters, strict=True):
            if not steps:
                yield name, {}
            elif self._plain:  # moments lie beside whole parameters, as in plain torch
                yield name, dict(inner.state.get(p, {}))
            else:
                state = {k: safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")}
                state["master"] = safe_get_full_fp32_param(p)
                yield name, {"step": torch.tensor(max(steps)), **{k: v.reshape(shape(p)) for k, v in state.items()}}

    def take_states(self, states: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> None:
        """Each rank keeps its part of every tensor."""
        number = {n: p for n, p in zip(self.names, self.parameters, strict=True)}
        if self._plain:
            for name, state in states:
                state.pop("master", None)  # in fp32 without ZeRO the parameters are the masters
                p = number[name]
                self._inner.state[p] = placed(state, p, self._inner)
            return
        # AdamW makes its moments in its first step, which this process has not taken: made here, to be filled below.
        flats = self._flat_masters()
        for place, flat in enumerate(flats):
            with self._from_disk(place):
                zeros = {k: torch.zeros_like(flat.data) for k in ("exp_avg", "exp_avg_sq")}
                self._inner.state[flat] = {"step": placed_step(torch.tensor(0.0), flat, self._inner), **zeros}
        self._link_states()
        # One parameter at a time, since `states` reads them one at a time: no rank holds the whole optimizer.
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
        # modifier_rank=None: they are read only, and nothing is sent back when the block ends.
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield
