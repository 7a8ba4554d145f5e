"""LoRA on a plain linear layer as one step of autograd: products that add in place instead of tables to be added.

In: a model with PEFT's LoRA layers (arXiv:2106.09685). Out: the same modules, names and weights, of a class whose
`forward` computes y = x W' + b + scale (x A') B' at once where PEFT would compute just that, and is PEFT's own
everywhere else: variants (DoRA), adapter biases, active dropout, several, disabled or merged adapters, mixed batches,
quantised, partitioned, offloaded or watched (hooked) weights, mixed number formats, autocast.

Dimensions: T tokens, I / O input and output features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

from mmit.models.partition import is_part

# Device types that have autocast. Asked once: the compiler of torch 2.11 breaks a layer's graph at the question.
AUTOCAST = {kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(kind)}


class FusedLinear(Linear):
    """PEFT's LoRA layer with a shorter way through the common case."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., I) -> (..., O)"""
        name = None if args or kwargs else self._alone()
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        # PEFT casts where formats differ, and autocast casts inside products; what this class computes would then not
        # be what PEFT does.
        if not x.dtype == base.weight.dtype == a.dtype == b.dtype or autocast_on(x.device.type):
            return super().forward(x)
        # Views are made outside: models may add to what comes out in place, which a view from inside would refuse.
        rows = _Fused.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, self.scaling[name])
        return rows.view(*x.shape[:-1], rows.shape[-1])

    def _alone(self) -> str | None:
        """The one adapter whose output is x A' B' and nothing else, or None."""
        names = [n for n in self.active_adapters if n in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged:
            return None
        name, dropout = names[0], self.lora_dropout[names[0]]
        if name in self.lora_variant or self.fan_in_fan_out:
            return None
        if not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)):
            return None
        if self.lora_B[name].bias is not None or not all(
            _plain(m) for m in (self.base_layer, self.lora_A[name], self.lora_B[name])
        ):
            return None
        return name


def fuse_lora(model: nn.Module) -> int:
    """Make PEFT's LoRA layers over plain linear layers `FusedLinear`, in place. Returns the number of them."""
    found = [m for m in model.modules() if type(m) is Linear and type(m.base_layer) is nn.Linear]
    for module in found:
        module.__class__ = FusedLinear  # keeps names, weights, hooks and what PEFT knows about the module
    return len(found)


def autocast_on(device: str) -> bool:
    """Whether torch picks number formats by itself on "cpu", "cuda", ...; never on a device that has no autocast."""
    return device in AUTOCAST and torch.is_autocast_enabled(device)


def _plain(module: nn.Module) -> bool:
    """Calling the module is its product alone: nothing listens to the call, brings its weights or replaces it."""
    return (
        type(module) is nn.Linear
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__
        and type(module.weight) is nn.Parameter
        and not is_part(module.weight)
    )


class _Fused(torch.autograd.Function):
    """x (T, I), W (O, I), b (O,), A (R, I), B (O, R), scale -> (T, O).

    Keeps x and x A' (T, R) for the backward pass; no gradient for weights that are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        # PEFT makes three tables of (T, O): the adapter's product, its scaled form and the sum. Here it is added into
        # the base's own output.
        inner = rows @ a.t()  # (T, R)
        out = F.linear(rows, weight, bias)
        if torch.compiler.is_compiling():  # of torch 2.11: wrong gradients for an output that is changed in place
            out = torch.addmm(out, inner, b.t(), alpha=scale)
        else:
            out.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # Scaled here, on R columns, and not in the products below, on I or O of them.
        slope = (grad @ b).mul_(ctx.scale)  # (T, R)
        # The adapter's share is added into the product of the frozen weight: one table of (T, I) less.
        dx = (grad @ weight).addmm_(slope, a) if needs[0] else None
        dweight = grad.t() @ rows if needs[1] else None
        dbias = grad.sum(0) if needs[2] else None
        da = slope.t() @ rows if needs[3] else None
        db = (grad.t() @ inner).mul_(ctx.scale) if needs[4] else None
        return dx, dweight, dbias, da, db, None
