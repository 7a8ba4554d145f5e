"""How the decoder layers of a language model run: computed again in the backward pass, or compiled.

Activation checkpointing: `full` recomputes every layer and keeps only what goes into each; `selective` does so for
every second layer, half the recomputation for about half the saving. The loss and the gradients stay the same.
torch.compile: the parts of a layer that work token by token, norms and feed-forward. Attention stays as it is: its
shapes change with every packed row. What is compiled takes any number of tokens, so rows need no padding and a handful
of graphs serves every layer and row.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.modeling_layers import GradientCheckpointingLayer

from mmit.errors import ConfigError, ModelError, nearest
from mmit.models.llm import recompute_activations
from mmit.models.tuning.structure import attentions, decoder_layers

if TYPE_CHECKING:
    from mmit.models.vlm import VLM


MODES = ("none", "selective", "full")


def set_recompute(vlm: VLM, mode: str) -> float:
    """Switch checkpointing of the LLM to none, selective or full. Returns the share of layers that are recomputed.

    Raises ModelError for another mode, or where the architecture has no checkpointing.
    """
    if mode not in MODES:
        raise ModelError(f"unknown mode '{mode}'", where="train.checkpointing", remedy=nearest(mode, MODES))
    if mode == "none":
        return 0.0
    llm: Any = vlm.llm
    recompute_activations(llm)
    if mode == "full":
        return 1.0
    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[1::2]:
        layer.gradient_checkpointing = False
    return (len(layers) + 1) // 2 / max(len(layers), 1)


def why_not_compile(device: str) -> str | None:
    """What keeps torch.compile from working on "cpu" or "cuda" here, or None."""
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        return "torch.compile needs a C++ compiler on a CPU, and none is installed"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on CUDA, and it is not installed"
    return None


def compile_layers(llm: Any, *, device: str, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile in place, at the first call; names and weights stay as they are. Returns the number of modules.

    Args:
        device: "cpu" or "cuda". backend: of torch.compile.

    Raises:
        ConfigError: tools are missing. ModelError: the model has no list of decoder layers.
    """
    if backend == "inductor" and (reason := why_not_compile(device)) is not None:
        raise ConfigError(reason, where="train.compile", remedy="install it, or set train.compile=false")
    count = 0
    for layer in decoder_layers(llm):
        kept = attentions(layer)
        for name, child in layer.named_children():
            if name not in kept:
                child.compile(dynamic=True, backend=backend)
                count += 1
    return count
