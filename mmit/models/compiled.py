"""torch.compile for the parts of a decoder layer that work token by token: norms and feed-forward.

Attention stays as it is: its shapes change with every packed row. What is compiled takes any number of tokens, so rows
need no padding and a handful of graphs serves every layer and row. Refuses a machine that lacks the compiler's tools.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

from mmit.errors import ConfigError
from mmit.models.tuning.structure import attentions, decoder_layers


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
