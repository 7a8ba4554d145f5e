"""Activation checkpointing of the language model: which decoder layers run their forward pass again in the backward.

`full` recomputes every layer and keeps only what goes into each; `selective` does so for every second layer, half the
recomputation for about half the saving. In: a composite. The loss and the gradients stay the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.modeling_layers import GradientCheckpointingLayer

from mmit.errors import ModelError, nearest
from mmit.models.llm import recompute_activations

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
