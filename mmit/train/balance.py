"""What a unit of data costs, in the time of one token: by which rows are dealt to ranks.

Three terms: its tokens through the LLM's weights, the square of its length through attention, its pictures through
the tower. Forward and backward pass of a frozen LLM are 4 FLOPs a weight and token; only the relation matters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from mmit.data.dataset import Scan
    from mmit.models.vlm import VLM


def _weights(module: nn.Module) -> int:
    """Entries of all matrices; ZeRO-3 and 4 bits keep the shape elsewhere, so layers are asked first."""
    sizes = [int(m.in_features) * int(m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(sizes) or sum(p.numel() for p in module.parameters())


def unit_costs(vlm: VLM, scan: Scan, *, cached: bool) -> np.ndarray:
    """(U,) float64, the cost of each unit in tokens.

    Args:
        cached: the tower's features come from a cache.
    """
    config: Any = vlm.llm.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)  # a model without attention has no squares
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    llm = max(_weights(vlm.llm), 1)
    lengths = scan.length.astype(np.float64)
    # 4 * width FLOPs a pair and layer forward, causal pairs are half the square, backward is twice that; over 4 * llm.
    square = 6 * config.num_hidden_layers * width / (4 * llm)
    cost = lengths + square * lengths**2
    if vlm.vision is not None and not cached:
        patches = math.prod(vlm.vision.grid)
        trained = 3 if vlm.vision.trainable else 1
        cost += scan.seen * (2 * trained * _weights(vlm.vision) * patches / (4 * llm))
    return cost
