"""A language model's own rules: what its layers do beyond plain causal attention, read from its config and modules.

Whatever mmit puts in a model's place (masks, positions, embeddings, adapters) must honour these, or refuse before
anything is measured. In: a loaded or an empty model. Out: plain facts and a line of text. Knows no model by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from mmit.errors import ModelError
from mmit.models.calls import reads_ngrams
from mmit.models.generation import generation_facts
from mmit.models.partition import numel, shape
from mmit.models.per_record import mixers, rotary_limit
from mmit.models.routers import has_loss

DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
# Keys by which classes change logits after the head, and the value that changes nothing.
LOGIT_KEYS = {
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
}
# Keys by which layers see, of all keys before a query, only so many (or blocks of them) that score best with it.
CHOICE_KEYS = ("index_topk", "index_topk_blocks", "indexer_budget")
# Keys by which bodies scale the embeddings they are given; a table that scales its own rows has `embed_scale`.
EMBEDDING_KEYS = ("embedding_multiplier",)


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one language model."""

    attention: bool  # queries, keys and values go to a function that mmit can give
    mixers: tuple[str, ...]  # modules with a running state or a convolution, by name
    windows: tuple[int | None, ...]  # per layer, keys that a query sees
    chunk: int | None  # keys of a chunk, in layers with chunked attention
    sinks: bool  # a learned score per head that takes part in every softmax
    softcap: float | None  # of attention scores
    choice: tuple[str, int] | None  # key of the config by which a query sees its best keys alone, and their number
    logits: tuple[str, float] | None  # key of the config that changes logits after the head, and its value
    embeddings: float  # factor between a row of the table and what the first layer gets of it
    end_ids: tuple[int, ...]  # that end an answer, as generation_config.json lists them
    rotary_limit: int | None  # longer records turn their positions by other factors
    per_layer_inputs: bool  # layers get embeddings of the token ids themselves
    ngrams: bool  # layers look up n-grams of the token ids
    router_loss: float | None  # factor of the auxiliary loss of its routers that the config names
    experts: float  # share of parameters in weights of three dimensions, which linear adapters do not reach
    dropout: float  # of attention weights in training
    context: int | None  # tokens the model was built for
    rows: int  # of the embedding table

    @property
    def why_not_packed(self) -> str | None:
        """Why records of one row cannot be kept apart, or None."""
        if self.choice:
            return (
                f"its layers choose the keys that a query sees among all of a sequence ({self.choice[0]} "
                f"{self.choice[1]}), which knows no boundaries between records"
            )
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
        if self.choice:
            yield f"attention to the {self.choice[1]} best keys or blocks ({self.choice[0]})"
        if self.logits:
            yield f"logits changed after the head ({self.logits[0]} {self.logits[1]:g})"
        if self.embeddings != 1:
            yield f"embeddings times {self.embeddings:g}"
        if len(self.end_ids) > 1:
            yield f"{len(self.end_ids)} ids that end an answer"
        if self.mixers:
            yield f"{len(self.mixers)} layers with a running state or convolution, run record by record"
        if self.rotary_limit:
            yield f"other rotary factors for records of more than {self.rotary_limit} tokens"
        if self.per_layer_inputs:
            yield "embeddings of the token ids in every layer"
        if self.ngrams:
            yield "embeddings of n-grams of the token ids, for which a picture is the end of a text"
        if self.router_loss:
            yield f"a router loss (factor {self.router_loss:g} in its config), left out unless train.router_loss is set"
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
        choice=chosen_keys(config),
        logits=changed_logits(config),
        embeddings=_embedding_scale(inner, config),
        end_ids=generation_facts(inner).end_ids,
        rotary_limit=rotary_limit(inner),
        per_layer_inputs=bool(getattr(config, "hidden_size_per_layer_input", None)),
        ngrams=reads_ngrams(inner),
        router_loss=getattr(config, "router_aux_loss_coef", None) if has_loss(inner) else None,
        experts=_experts(inner),
        dropout=float(next((v for k in DROPOUT_KEYS if (v := getattr(config, k, None))), 0.0)),
        context=getattr(config, "max_position_embeddings", None),
        rows=shape(inner.get_input_embeddings().weight)[0],
    )


def takes_attention(kind: type[nn.Module]) -> bool:
    """Whether models of this class hand their queries, keys and values to transformers' table of functions."""
    # The table's name in the class's own module: whoever imports it uses it, and a class without it computes attention
    # itself. (`run_row` sees to it once more that layers did ask.)
    return hasattr(sys.modules.get(kind.__module__), "ALL_ATTENTION_FUNCTIONS")


def chosen_keys(config: Any) -> tuple[str, int] | None:
    """Key and value of a config by which a query sees only the keys that score best with it, None where it sees all."""
    stated = ((key, getattr(config, key, None)) for key in CHOICE_KEYS)
    return next(((key, value) for key, value in stated if value), None)


def changed_logits(config: Any) -> tuple[str, float] | None:
    """Key and value of a config that change logits after the head, None where they stay."""
    stated = ((key, getattr(config, key, off), off) for key, off in LOGIT_KEYS.items())
    return next(((key, value) for key, value, off in stated if value not in (off, None)), None)


def _embedding_scale(llm: Any, config: Any) -> float:
    # A buffer in some classes, a number in others.
    own = getattr(llm.get_input_embeddings(), "embed_scale", None)
    if isinstance(own, torch.Tensor):
        own = None if own.is_meta else float(own)
    stated = (getattr(config, key, None) for key in EMBEDDING_KEYS)
    return float(own if own is not None else next((v for v in stated if v), 1.0))


def _per_layer(config: Any) -> list[str]:
    count = getattr(config, "num_hidden_layers", None) or 0
    # Configs of one kind of layer do not list them.
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
    # An id beyond the table is an index error on a CPU, and on CUDA an assertion that ends the process without naming
    # it.
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
