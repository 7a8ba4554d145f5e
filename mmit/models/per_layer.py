"""Embeddings of token ids that every layer gets besides the hidden states (Gemma 3n, Gemma 4).

Such a model wants to know which tokens it is given, and mmit gives embeddings, some of them of pictures. Owns the way
from embeddings back to ids: what is exactly a row of the embedding table is that token, all else is padding, as
transformers has it for positions of pictures. Known by what the model has, never by its name.

Dimensions: B sequences of T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from peft import PeftModel

KEY_BYTES = 8  # of an embedding's first numbers, by which rows of the table are found
CHUNK = 8192
TABLE = "mmit_rows_by_key"


def per_layer_inputs(llm: Any, embeddings: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor | None:
    """The argument `per_layer_inputs` of a model that takes it; None for all others.

    Args:
        llm: a causal LM or its body, with or without PEFT's wrapper.
        embeddings: (B, T, D).
        ids: (B, T), negative where the embedding is no token's; None where they are to be found out.
    """
    inner = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    owner: Any = next((m for m in inner.modules() if hasattr(m, "get_per_layer_inputs")), None)
    if owner is None or not getattr(owner.config, "hidden_size_per_layer_input", None):
        return None
    if ids is None:
        ids = token_ids(inner, embeddings)
    padding = getattr(owner.config, "pad_token_id", None) or 0
    look_up = owner.get_per_layer_inputs
    more = {"inputs_embeds": None} if "inputs_embeds" in signature(look_up).parameters else {}  # no default in 5.17
    return look_up(torch.where(ids < 0, padding, ids), **more)


@torch.no_grad()
def token_ids(llm: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """(B, T) ids of the tokens whose embeddings these are, -1 where there is none."""
    words = llm.get_input_embeddings()
    keys, order = _table(words)
    wanted = _key(embeddings.detach())
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    found = order[place]
    same = (keys[place] == wanted) & (words(found) == embeddings).all(-1)
    return torch.where(same, found, -1)


def _key(embeddings: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (...) int64 made of the first numbers."""
    count = KEY_BYTES // embeddings.element_size()
    return (embeddings[..., :count] + 0.0).contiguous().view(torch.int64)[..., 0]  # + 0.0: one zero, not two


def _table(words: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the whole embedding table in their order, and the ids they belong to; kept until the table changes."""
    version = (words.weight._version, words.weight.device, words.weight.dtype)
    kept = getattr(words, TABLE, None)
    if kept is None or kept[0] != version:
        ids = torch.arange(len(words.weight), device=words.weight.device)
        keys, order = torch.cat([_key(words(part)) for part in ids.split(CHUNK)]).sort(stable=True)
        kept = (version, keys, order)
        setattr(words, TABLE, kept)
    return kept[1], kept[2]
