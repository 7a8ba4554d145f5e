"""Word embeddings as a body takes them.

mmit gives a model embeddings, not ids. Some bodies (Falcon-H1) multiply the rows that they look up themselves and take
given embeddings as they are; then the table must do it, as it does in Gemma. Only the table's class changes: weights,
names and configuration stay.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import nn

OWN_LOOKUP = re.compile(r"\(input_ids\)\s*\*\s*self\.(\w+)")


class ScaledWords(nn.Embedding):
    """An embedding table whose rows come out multiplied by `embed_scale`."""

    embed_scale: float

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...,) -> (..., D)"""
        return super().forward(ids) * self.embed_scale


def scale_words(model: Any) -> None:
    """Move the factor of a body that scales only what it looks up into its table, in place."""
    body: Any = model.base_model
    words: Any = model.get_input_embeddings()
    kind: Any = type(body)
    key = lookup_factor(kind)
    if key is None or type(words) is not nn.Embedding:
        return
    table: Any = words
    table.__class__ = ScaledWords
    table.embed_scale = float(getattr(body, key))
    setattr(body, key, 1.0)


@functools.cache
def lookup_factor(kind: type[nn.Module]) -> str | None:
    """Attribute by which bodies of this class multiply the rows that they look up, and no others."""
    found = OWN_LOOKUP.search(inspect.getsource(kind.forward))
    return None if found is None else found[1]
