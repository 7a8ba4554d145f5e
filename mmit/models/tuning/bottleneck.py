"""Houlsby's bottleneck adapters: two per decoder layer, after the attention and after the feed-forward part.

In: a language model. Out: the same with those two children of every layer wrapped. Starts as the identity, for the
upward projection is 0.

Dimensions: T tokens, D width, m bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.partition import shape
from mmit.models.tuning.structure import attention_and_mlp, base_model, decoder_layers

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
INNER = "unadapted"  # attribute that holds the wrapped module


class Bottleneck(nn.Module):
    """x + up(activation(down(x))) (arXiv:1902.00751)."""

    def __init__(self, width: int, size: int, activation: str, *, like: torch.Tensor) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ModelError(
                f"unknown activation '{activation}'",
                where="tune.llm.options.activation",
                remedy=nearest(activation, ACTIVATIONS),
            )
        self.down = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(size, width, device=like.device, dtype=like.dtype)
        # With 0 on one side alone the adapter starts as the identity and still gets a gradient, which two zero matrices
        # would not.
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return x + self.up(self.activation(self.down(x)))


class WithAdapter(nn.Module):
    """A module whose output, or the first of its outputs, passes through a bottleneck."""

    def __init__(self, inner: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        # Under a name of its own: `merge.base_name` takes it out of the names of a checkpoint again.
        self.add_module(INNER, inner)
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapped module: (..., D) -> (..., D), or a tuple whose first is that and whose rest is passed on."""
        out = self.get_submodule(INNER)(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.adapter(out[0]), *out[1:])
        return self.adapter(out)


def insert_adapters(llm: Any, *, size: int, activation: str, after: list[str] | None) -> list[str]:
    """Wrap two children of every decoder layer.

    Args:
        llm: the language model, changed in place.
        size: m. activation: one of ACTIVATIONS.
        after: names of the children to wrap instead of the two that are found.

    Returns:
        names of the adapters' parameters.

    Raises:
        ModelError: the layers or the two children cannot be found.
    """
    width = shape(llm.get_input_embeddings().weight)[1]
    for layer in decoder_layers(llm):
        for name in after or attention_and_mlp(layer):
            child = getattr(layer, name, None)
            if not isinstance(child, nn.Module):
                raise ModelError(
                    f"{type(layer).__name__} has no child '{name}'",
                    where="tune.llm.options.after",
                    remedy=nearest(name, [n for n, _ in layer.named_children()]),
                )
            # On the device and in the format of what it follows: a device map may have spread the layers, and quantised
            # weights are integers.
            like = next(p for p in child.parameters() if p.is_floating_point())
            setattr(layer, name, WithAdapter(child, Bottleneck(width, size, activation, like=like)))
    base = base_model(llm)
    adapters = [n for n, m in base.named_modules() if isinstance(m, Bottleneck)]
    return [f"{n}.{p}" for n in adapters for p, _ in base.get_submodule(n).named_parameters()]
