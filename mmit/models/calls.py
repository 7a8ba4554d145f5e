"""Calls of a language model: every keyword is one that its forward takes.

Owns how mmit's arguments reach the forward of a transformers model. Most forwards end in `**kwargs`, which take any
name and forget it: a renamed argument is then lost without a word. Takes keywords, checks them against the callee's
signature, gives the model's output. Refuses a keyword that nobody reads, unless the caller says what its absence means.

Some models (Gemma 3n, Gemma 4) want in every layer, besides hidden states, embeddings of the token ids, and mmit gives
embeddings, some of them of images, beside the ids where it has them. Without ids, what is exactly a row of the
embedding table is taken for that token, all else for padding, as transformers has it for positions of images. Others
(Qwen4-Exp) look up n-grams of the ids themselves; an image is then the token that ends a text, beyond which no n-gram
reaches. Known by what the model has, not by its name.

Dimensions: B sequences of T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel

from mmit.errors import ModelError
from mmit.models.deepstack import stacked

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


NGRAM_IDS = "ple_input_ids"
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # newest first; before 5.24 one of the other two
ELSEWHERE = "use another architecture, or a version of transformers that `mmit env` lists as tested"


class RowInputs(NamedTuple):
    """A packed row of T tokens as a language model takes it."""

    embeddings: torch.Tensor  # (T, D)
    positions: torch.Tensor  # (T,) of each token on its record's path
    nodes: torch.Tensor  # (K, 3) first token, length and parent, see `attention_plan.make_plan`
    ids: torch.Tensor | None = None  # (T,) of the tokens, negative for none; see `call`


def call(
    llm: torch.nn.Module,
    *,
    cache: Cache | None = None,
    ids: torch.Tensor | None = None,
    optional: Collection[str] = (),
    remedy: str = ELSEWHERE,
    **arguments: Any,
) -> Any:
    """Run a causal LM, or its body.

    Args:
        llm: the model, with or without PEFT's wrapper.
        cache: keys and values or running states to go on from, handed over by the name that the forward has for it.
        ids: (B, T) of the tokens behind `inputs_embeds`, negative where there is none, for a model whose layers ask;
            None where they are to be found out from the embeddings.
        optional: arguments to leave out where the forward does not name them.
        **arguments: of the forward; None stands for "not given". Without `logits_to_keep` in the signature the
            model computes all logits, and those asked for are taken out.

    Returns:
        the model's output.

    Raises:
        ModelError: the forward does not take an argument that it was to be given.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if cache is not None:
        given[cache_name(llm)] = cache
    if "inputs_embeds" in given:
        with stacked(llm, given["inputs_embeds"]) as plain:
            return _call(llm, given | {"inputs_embeds": plain}, ids=ids, optional=optional, remedy=remedy)
    return _call(llm, given, ids=ids, optional=optional, remedy=remedy)


def _call(
    llm: torch.nn.Module,
    given: dict[str, Any],
    *,
    ids: torch.Tensor | None,
    optional: Collection[str],
    remedy: str,
) -> Any:
    inner = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    taken, open_ended = _parameters(inner)
    if "inputs_embeds" in given and takes(llm, "per_layer_inputs"):
        extra = per_layer_inputs(llm, given["inputs_embeds"], ids)
        given |= {} if extra is None else {"per_layer_inputs": extra}
    if "inputs_embeds" in given and reads_ngrams(inner):
        given[NGRAM_IDS] = _ngram_ids(inner, given["inputs_embeds"], ids)
    keep = given.get("logits_to_keep")
    if isinstance(keep, torch.Tensor) and len(set(getattr(inner, "hf_device_map", {}).values())) > 1:
        # The last layer may lie on another device than the inputs, where accelerate sends every tensor; not numbers.
        keep = given["logits_to_keep"] = keep.tolist()
    selects = keep is not None and "logits_to_keep" not in taken
    if selects:
        del given["logits_to_keep"]
    missing = given.keys() - taken
    if missing and open_ended:  # transformers' causal LMs hand the rest of their keywords to their body
        missing -= _parameters(getattr(inner, "base_model", inner))[0]
    if refused := sorted(missing - set(optional)):
        raise ModelError(f"the forward of {type(inner).__name__} does not take {', '.join(refused)}", remedy=remedy)
    # Without PEFT's wrapper, whose forward only hands on, and refuses the embeddings of MPT.
    out = inner(**{name: value for name, value in given.items() if name not in missing})
    if selects:
        out.logits = out.logits[:, -keep:] if isinstance(keep, int) else out.logits[:, keep]
    return out


def asks_for_ids(llm: Any) -> bool:
    """Whether layers of a causal LM or its body are given something of the token ids, besides hidden states."""
    return takes(llm, "per_layer_inputs") or reads_ngrams(llm)


def reads_ngrams(llm: Any) -> bool:
    """Whether layers of a causal LM or its body look up n-grams of the token ids."""
    return takes(llm, NGRAM_IDS) and bool(llm.config.get_text_config().ple_layer_ids)


def _ngram_ids(inner: Any, embeddings: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """(B, T) ids for a model of `reads_ngrams`, from (B, T, D) embeddings and ids that are negative for pictures."""
    ends: int | list[int] = inner.config.get_text_config().eos_token_id  # its config is refused without one
    found = token_ids(inner, embeddings) if ids is None else ids
    return torch.where(found < 0, ends[0] if isinstance(ends, list) else ends, found)


def takes(llm: torch.nn.Module, name: str) -> bool:
    """Whether the forward of a causal LM, or of the body it hands its keywords to, names this argument."""
    inner = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    return any(name in _parameters(module)[0] for module in (inner, getattr(inner, "base_model", inner)))


def cache_name(llm: torch.nn.Module) -> str:
    """The name by which a model's forward takes its cache. Raises ModelError where it takes none."""
    inner = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    taken, _ = _parameters(inner)
    name = next((name for name in CACHE_NAMES if name in taken), None)
    if name is None:
        raise ModelError(
            f"the forward of {type(inner).__name__} takes no cache that decoding could continue from",
            remedy="use an architecture that transformers can decode with a cache",
        )
    return name


def cache_of(out: Any) -> Cache | None:
    """The cache in a model's output, or None."""
    held = dict(out.items())  # not by attribute: old names are deprecated properties of the new one
    return next((held[name] for name in CACHE_NAMES if held.get(name) is not None), None)


def _parameters(module: Any) -> tuple[frozenset[str], bool]:
    """Names that a forward takes, and whether it takes any other name too."""
    forward = module.forward
    return _names(getattr(forward, "__func__", forward))


@functools.lru_cache(maxsize=64)  # reading a signature takes as long as a step of a small model's decoding
def _names(forward: Any) -> tuple[frozenset[str], bool]:
    found = inspect.signature(forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(p.name for p in found if p.kind in named), any(p.kind is p.VAR_KEYWORD for p in found)


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
    """(B, T) ids of the tokens whose embeddings these are, -1 where there is none.

    Known limit: an adapter on the table computes its rows with each batch, to the last bit or not; such ids are missed.
    """
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
    # Of all its tensors: what an adapter around the table learns changes its rows and not its weight.
    version = (tuple(p._version for p in words.parameters()), words.weight.device, words.weight.dtype)
    kept = getattr(words, TABLE, None)
    if kept is None or kept[0] != version:
        ids = torch.arange(len(words.weight), device=words.weight.device)
        keys, order = torch.cat([_key(words(part)) for part in ids.split(CHUNK)]).sort(stable=True)
        kept = (version, keys, order)
        setattr(words, TABLE, kept)
    return kept[1], kept[2]
