"""One process on one device, with plain torch: float32 masters, accumulation, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmit.errors import ConfigError
from mmit.train.engines.base import Engine, Reduce, Update, poisoned, weighted
from mmit.train.engines.state import placed

if TYPE_CHECKING:
    from mmit.models.tuning import Group


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
        update: Update = Update(),  # noqa: B008 - frozen
    ) -> None:
        if precision == "fp16":
            problem = "fp16 needs loss scaling, which the torch engine does not do"
            remedy = "set train.precision=bf16, or engine.kind=deepspeed"
            raise ConfigError(problem, where="train.precision", remedy=remedy)
        self.device, self.clip = device, update.clip
        self.model = model.to(device)
        self.parameters = [p for g in groups for _, p in g.parameters]
        self.names = [f"{g.name}.{n}" for g in groups for n, _ in g.parameters]
        # A master for each parameter that is not float32: updates are often smaller than what bf16 can add to a weight.
        self.split = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        masters = iter(self.masters)
        param_groups = [{"params": [next(masters) for _ in g.parameters], "lr": g.lr, "peak": g.lr} for g in groups]
        # torch refuses `fused` where a device has no such kernel, as "meta" has none.
        self.optimizer = update.adamw(param_groups, fused=device.type in ("cpu", "cuda"))

    def forward_backward(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        scale: float,
        last: bool,
        weights: torch.Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> torch.Tensor:
        """Run one micro-batch and add its gradient. Gradients add up in float32.

        Args:
            tensors, scale, last, weights, reduce: as in `Engine.forward_backward`.

        Returns:
            (S,) losses, detached and not weighted; (B,) with `reduce`.
        """
        losses = self.model(**tensors)
        losses = losses if reduce is None else reduce(losses)
        loss = poisoned(weighted(losses, weights), scale)
        if not loss.requires_grad:  # a text-only row of a text model that is frozen: nothing depends on it
            return losses.detach()
        loss.backward()
        if self.split:
            # After every micro-batch, not once a step: autograd would add them up in bf16.
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
        total = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        norm = float(total)  # the one wait for the device in a step
        if math.isfinite(norm):
            if self.clip is not None and grads:
                torch.nn.utils.clip_grads_with_norm_(self.masters, self.clip, total)
            for g in self.optimizer.param_groups:
                g["lr"] = g["peak"] * factor
            self.optimizer.step()
            if self.split:
                with torch.no_grad():
                    for p, m in zip(self.parameters, self.masters, strict=True):
                        if p is not m:
                            p.copy_(m)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Moments, and the float32 master where there is one."""
        for name, p, m in zip(self.names, self.parameters, self.masters, strict=True):
            state = dict(self.optimizer.state.get(m, {}))
            if state and p is not m:
                # Kept beside the moments: the checkpoint's weights are rounded, and a run that went on from those would
                # not be the one that was stopped.
                state["master"] = m
            yield name, state

    def take_states(self, states: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> None:
        """Restore moments and masters."""
        number = {n: i for i, n in enumerate(self.names)}
        for name, state in states:
            p, m = self.parameters[number[name]], self.masters[number[name]]
            # DeepSpeed keeps masters of float32 parameters too, which here are their own.
            master = state.pop("master", None)
            if master is not None and p is not m:
                m.data.copy_(master)
                p.data.copy_(m)
            self.optimizer.state[m] = placed(state, m, self.optimizer)
