"""A language model's own rules: what its layers do beyond plain causal attention, read from its config and modules.

Whatever mmit puts in a model's place (masks, positions, embeddings, adapters) must honour these, or refuse before
anything is measured. In: a loaded or an empty model. Out: plain facts and a line of text. Knows no model by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from mmit.errors import ModelError
from mmit.models.partition import numel, shape
from mmit.models.per_record import mixers, rotary_limit

DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one language model."""

    attention: bool  # queries, keys and values go to a function that mmit can give
    mixers: tuple[str, ...]  # modules with a running state or a convolution, by name
    windows: tuple[int | None, ...]  # per layer, keys that a query sees
    chunk: int | None  # keys of a chunk, in layers with chunked attention
    sinks: bool  # a learned score per head that takes part in every softmax
    softcap: float | None  # of attention scores
    rotary_limit: int | None  # longer records turn their positions by other factors
    per_layer_inputs: bool  # layers get embeddings of the token ids themselves
    router_loss: float | None  # factor of the auxiliary loss that the config names
    experts: float  # share of parameters in weights of three dimensions, which linear adapters do not reach
    dropout: float  # of attention weights in training
    context: int | None  # tokens the model was built for
    rows: int  # of the embedding table

    @property
    def why_not_packed(self) -> str | None:
        """Why records of one row cannot be kept apart, or None."""
        if self.attention or self.mixers:
            return None
        return (
            "its layers compute attention, or carry a state, in code of their own that takes no boundaries between "
            "records"
        )

    def lines(self) -> Iterator[str]:
        """The rules that are not every model's, for people."""
        windows = [w for w in self.windows if w]
        if windows:
            yield f"sliding window of {min(windows)} tokens in {len(windows)} of {len(self.windows)} layers"
        if self.chunk:
            yield f"attention in chunks of {self.chunk} tokens"
        if self.sinks:
            yield "attention sinks"
        if self.softcap:
            yield f"attention scores capped at {self.softcap:g}"
        if self.mixers:
            yield f"{len(self.mixers)} layers with a running state or convolution, run record by record"
        if self.rotary_limit:
            yield f"other rotary factors for records of more than {self.rotary_limit} tokens"
        if self.per_layer_inputs:
            yield "embeddings of the token ids in every layer"
        if self.dropout:
            yield f"attention dropout of {self.dropout:g}, computed by the slow path (model.llm.attention_dropout)"


def read_rules(llm: Any) -> Rules:
    """Read a causal LM's rules, with or without PEFT's wrapper."""
    inner: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    config = inner.config.get_text_config()
    kinds = _per_layer(config)
    return Rules(
        attention=takes_attention(type(inner)),
        mixers=tuple(name for name, _ in mixers(inner)),
        windows=tuple(_window(config, kind) for kind in kinds),
        chunk=getattr(config, "attention_chunk_size", None) if "chunked_attention" in kinds else None,
        sinks=any(isinstance(getattr(m, "sinks", None), nn.Parameter) for m in inner.modules()),
        softcap=getattr(config, "attn_logit_softcapping", None),
        rotary_limit=rotary_limit(inner),
        per_layer_inputs=bool(getattr(config, "hidden_size_per_layer_input", None)),
        router_loss=getattr(config, "router_aux_loss_coef", None),
        experts=_experts(inner),
        dropout=float(next((v for k in DROPOUT_KEYS if (v := getattr(config, k, None))), 0.0)),
        context=getattr(config, "max_position_embeddings", None),
        rows=shape(inner.get_input_embeddings().weight)[0],
    )


def takes_attention(kind: type[nn.Module]) -> bool:
    """Whether models of this class hand their queries, keys and values to transformers' table of functions."""
    return hasattr(sys.modules.get(kind.__module__), "ALL_ATTENTION_FUNCTIONS")


def _per_layer(config: Any) -> list[str]:
    count = getattr(config, "num_hidden_layers", None) or 0
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(getattr(config, "layer_types", None) or [default] * count)


def _window(config: Any, kind: str) -> int | None:
    return getattr(config, "sliding_window", None) if kind == "sliding_attention" else None


def _experts(llm: nn.Module) -> float:
    """Share of the parameters that experts keep as one tensor for all of them."""
    fused = numel(
        p
        for m in llm.modules()
        if not isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for p in m.parameters(recurse=False)
        if len(shape(p)) == 3
    )
    return fused / max(1, numel(llm.parameters()))


def check_vocabulary(rules: Rules, vocabulary: Mapping[str, int]) -> None:
    """Refuse a tokenizer with ids beyond the embedding table.

    Raises:
        ModelError: naming both sizes and the tokens beyond.
    """
    beyond = sorted((n, token) for token, n in vocabulary.items() if n >= rules.rows)
    if not beyond:
        return
    names = ", ".join(repr(token) for _, token in beyond[:5]) + (", ..." if len(beyond) > 5 else "")
    raise ModelError(
        f"the tokenizer has ids up to {beyond[-1][0]}, but the embedding table has {rules.rows} rows; "
        f"{len(beyond)} tokens have none: {names}",
        where="model.llm.name",
        remedy="use the tokenizer that belongs to these weights, or resize the model's embeddings "
        "(transformers: resize_token_embeddings) and save it",
    )
