"""RMSNorm (arXiv:1910.07467) as one step of autograd, which keeps its input instead of float32 copies of it.

In: a model. Out: the same modules, names and weights, of a subclass whose `forward` is shorter, for those modules that
turn out to compute weight * (x rsqrt(mean(x^2) + eps)), in float32 inside and rounded to the input's format before the
weight, to the last bit on random input. Every other module stays as it is. Names of models or classes play no part.

Dimensions: T tokens, D channels.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from mmit.models.partition import is_part
from mmit.models.tuning.fused_lora import autocast_on
from mmit.models.tuning.structure import norms

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class _Fused(torch.autograd.Function):
    """x (..., D), weight (D,) -> (..., D). Keeps x, and the factor of each row, (..., 1) in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # Nothing in place: torch.compile of torch 2.11 then gives gradients of zero, without a word.
        wide = x.float()
        factor = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, factor)
        return (wide * factor).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, factor = ctx.saved_tensors
        wide, dx, dweight = x.float(), None, None
        if ctx.needs_input_grad[1]:
            dweight = (grad * (wide * factor).to(x.dtype)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            slope = (grad * weight).float()
            # d/dx of x * r with r = (mean(x^2) + eps)^-1/2: r * slope - x * r^3 * mean(slope * x).
            along = (slope * wide).mean(-1, keepdim=True).mul_(factor.pow(3)).neg_()
            dx = slope.mul_(factor).addcmul_(wide, along).to(x.dtype)
        return dx, dweight, None


class FusedNorm(nn.Module):
    """Mixed into the class of a norm; `epsilon` is what the norm adds to the mean square."""

    epsilon: float
    weight: nn.Parameter

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., D) -> (..., D)"""
        if args or kwargs or x.dtype != self.weight.dtype or x.ndim < 2 or autocast_on(x.device.type):
            return super().forward(x, *args, **kwargs)
        return _Fused.apply(x, self.weight, self.epsilon)


def fuse_norms(model: nn.Module) -> int:
    """Give every RMSNorm of that kind the shorter forward, in place. Returns the number of them."""
    count = 0
    made: dict[tuple[type, float], type] = {}
    tried: dict[Hashable, float | None] = {}
    for name in list(norms(model)):
        module = model.get_submodule(name)
        if isinstance(module, FusedNorm):
            continue
        alike = _alike(module)
        if alike not in tried:
            tried[alike] = _epsilon(module)
        epsilon = tried[alike]
        if epsilon is not None:
            kind = (type(module), epsilon)
            if kind not in made:
                made[kind] = type(type(module).__name__, (FusedNorm, type(module)), {"epsilon": epsilon})
            module.__class__ = made[kind]
            count += 1
    return count


def _alike(module: nn.Module) -> Hashable:
    """Equal for modules that one trial can speak for: of a class, a width and attributes; the layers of an LLM are.

    Weights do not matter: the trial draws its own. A module that holds anything but plain values is like no other.
    """
    own = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    if any(type(value) not in (bool, int, float, str, tuple, type(None)) for value in own.values()):
        return id(module)
    weight: Any = module.weight
    held = (tuple(module._parameters), tuple(module._buffers), type(weight), is_part(weight), tuple(weight.shape))
    return type(module), held, tuple(own.items())


def _epsilon(module: nn.Module) -> float | None:
    """What this RMSNorm adds, found by trying its float attributes; None for anything else."""
    weight = module.weight
    if list(module._parameters) != ["weight"] or module._buffers or "forward" in module.__dict__:
        return None
    if type(weight) is not nn.Parameter or is_part(weight):
        return None
    # Which attribute it is differs from class to class (eps, variance_epsilon, ...), so all that could be it are tried.
    found = [v for k, v in module.__dict__.items() if isinstance(v, float) and 0 <= v < 1]
    draw = torch.Generator().manual_seed(0)
    twin = copy.copy(module)
    for dtype in (torch.float32, torch.bfloat16):
        # Rows of several sizes, small ones among them: there epsilon counts.
        rows = torch.randn(6, len(weight), generator=draw) * torch.logspace(-4, 1, 6)[:, None]
        twin._parameters = {"weight": nn.Parameter(torch.randn(len(weight), generator=draw).to(dtype))}
        x = rows.to(dtype)
        with torch.no_grad():
            try:
                expected = type(module).forward(twin, x)  # without whatever hooks the module has
            except (
                TypeError,
                ValueError,
                RuntimeError,
                AttributeError,
            ):  # it takes more than one tensor, or another shape
                return None
            # To the last bit: norms that add 1 to their weight, or multiply before rounding, differ somewhere and stay
            # as they are.
            found = [v for v in found if _same(expected, _Fused.apply(x, twin.weight, v))]
    return found[0] if found else None


def _same(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
