"""DeepStack: features of several encoder layers, the last as image tokens, the others added inside the LLM.

The method of arXiv:2406.04334 as Qwen3-VL has it: what a projector makes of encoder layer i is added to the image
tokens after the LLM's layer i. A projector states its number of such levels as `deep`, and gives tokens of width
(1 + deep) * D. They travel beside the embeddings as further channels, so that rows, batches and caches lay them out as
they do the embeddings themselves; here they are taken apart again, around the one call of the LLM.

Dimensions: T tokens, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from mmit.errors import ModelError
from mmit.models.partition import shape


def as_wide(plain: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(..., D) embeddings with as many channels as `like`: nothing is added inside the LLM for them."""
    missing = like.shape[-1] - plain.shape[-1]
    return F.pad(plain, (0, missing)) if missing > 0 else plain


def deep_layers(llm: Any, levels: int) -> list[nn.Module]:
    """The first decoder layers, after which levels are added.

    Raises:
        ModelError: the LLM has fewer, or they cannot be told.
    """
    inner: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    count = inner.config.get_text_config().num_hidden_layers
    # Found by its length: models call their layers `layers`, `h`, `blocks`, ...
    lists = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1 or levels > count:
        reason = f"has {count} layers" if len(lists) == 1 else "keeps its layers in no single list"
        raise ModelError(
            f"DeepStack adds {levels} levels after the first layers of the LLM, and {type(inner).__name__} {reason}",
            where="model.projector",
            remedy="read fewer layers, or use projector kind mlp, which joins them in front of the LLM",
        )
    return list(lists[0])[:levels]


@contextmanager
def stacked(llm: Any, embeddings: torch.Tensor) -> Iterator[torch.Tensor]:
    """Inside, the LLM adds the further channels of (B, T, (1 + n) * D) to its layers; gives (B, T, D)."""
    words = getattr(llm, "get_input_embeddings", None)
    width = None if words is None else shape(words().weight)[1]
    if width is None or embeddings.shape[-1] == width:
        yield embeddings
        return
    # Only here, around the one call of the LLM, are they apart; everything before lays them out as one tensor.
    plain, *levels = embeddings.split(width, dim=-1)
    # Not needed when activation checkpointing runs a layer again: a sum keeps nothing for its gradient.
    hooks = [
        layer.register_forward_hook(_adding(level))
        for layer, level in zip(deep_layers(llm, len(levels)), levels, strict=True)
    ]
    try:
        yield plain
    finally:
        for hook in hooks:
            hook.remove()


def _adding(level: torch.Tensor) -> Any:
    def add(module: nn.Module, given: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (out[0] + level.to(out[0]), *out[1:])
        return out + level.to(out)

    return add
