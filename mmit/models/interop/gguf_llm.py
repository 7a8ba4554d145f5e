"""A language model as the keys and tensors of a GGUF file.

Goes in: a causal LM of plain weights, adapters merged. Comes out: what llama.cpp reads of it, under the names of the
package gguf. Refuses families that are not in FAMILIES, and values of their configurations that llama.cpp computes
otherwise: each family is held against llama.cpp by the slow tests.

V vocabulary, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen3Config

from mmit.errors import ModelError
from mmit.models.interop.gguf_file import library
from mmit.models.interop.llava_names import named_tensors

if TYPE_CHECKING:
    from mmit.models.interop.gguf_tokens import Vocabulary


@dataclass(frozen=True, slots=True)
class Family:
    """How one model_type is written.

    Attributes:
        arch: name in gguf.MODEL_ARCH.
        paired: llama.cpp turns neighbouring channels of queries and keys, transformers the halves of a head: rows of
            these weights change places.
        biases: modules that may have one.
        factors: key of the config -> method of the GGUFWriter.
    """

    arch: str
    paired: bool = False
    biases: tuple[str, ...] = ()
    factors: Mapping[str, str] = field(default_factory=dict)


ATTENTION = ("q_proj", "k_proj", "v_proj")
ALL = (*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj")
GRANITE = {
    "embedding_multiplier": "add_embedding_scale",
    "attention_multiplier": "add_attention_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}
FAMILIES = {
    "llama": Family("LLAMA", paired=True, biases=ALL),
    "mistral": Family("LLAMA", paired=True, biases=ALL),
    "qwen2": Family("QWEN2", biases=ATTENTION),
    "qwen3": Family("QWEN3"),
    "olmo2": Family("OLMO2"),
    "smollm3": Family("SMOLLM3", paired=True),
    "granite": Family("GRANITE", paired=True, factors=GRANITE),
}
NOPE_STEP = 4  # llama.cpp: every fourth layer of a SmolLM3 turns no positions
ROTATIONS = ("default", "linear", "llama3", "yarn")
_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}


def why_not(llm: Any) -> str | None:
    """What keeps a language model out of a GGUF file, or None; asks shapes and configuration alone."""
    config = llm.config
    kind = config.model_type
    if kind not in FAMILIES:
        return f"mmit writes no {kind} LLM as GGUF; it writes {', '.join(FAMILIES)}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"llama.cpp computes a {kind} LLM with silu, and this one has {config.hidden_act}"
    if _windowed(config):
        return "some of its layers see a window of tokens, which llama.cpp leaves out"
    rope = config.rope_parameters
    name = rope.get("rope_type", "default")
    if (
        name not in ROTATIONS
        or rope.get("partial_rotary_factor", 1.0) != 1.0
        or (name == "yarn" and rope.keys() - _YARN)
    ):
        return f"its positions are turned in a way that is not written ({name}, {', '.join(sorted(rope))})"
    layers = config.num_hidden_layers
    if kind == "smollm3" and [bool(turned) for turned in config.no_rope_layers] != [
        (layer + 1) % NOPE_STEP != 0 for layer in range(layers)
    ]:
        return "llama.cpp turns no positions in every fourth layer of a SmolLM3, and this one in others"
    if FAMILIES[kind].arch not in library().MODEL_ARCH.__members__:
        return f"the installed gguf package is too old for a {kind} LLM (pip install -U gguf)"
    state = llm.state_dict()
    odd = [key for key in state if key.endswith(".bias") and key.split(".")[-2] not in FAMILIES[kind].biases]
    return f"llama.cpp has no place for {odd[0]} in a {kind} LLM" if odd else None


def _windowed(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def llm_tensors(llm: Any) -> dict[str, torch.Tensor]:
    """Tensors by their names in the file. Raises ModelError for one that has none."""
    gguf, config = library(), llm.config
    family = FAMILIES[config.model_type]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch], config.num_hidden_layers)
    found: dict[str, torch.Tensor] = {}
    for key, tensor in named_tensors(llm).items():
        # Tied in the file by being left out: a copy would be read as a head of its own.
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"gguf has no name for the tensor {key}", where="model.llm", remedy="use --format mmit")
        module = key.split(".")[-2]
        # llama.cpp rotates neighbouring channels of these families; the rows of queries and keys are laid so that the
        # same pairs meet.
        if family.paired and module in ("q_proj", "k_proj"):
            tensor = paired(tensor, config.num_attention_heads if module == "q_proj" else config.num_key_value_heads)
        found[name] = tensor
    if config.rope_parameters.get("rope_type") == "llama3":
        found[gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"] = _llama_3_factors(config)
    return found


def paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(H * d, ...): rows of each head from (first half, second half) to (first of each, second of each, ...)."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _head(config: Any) -> int:
    """Channels of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama_3_factors(config: Any) -> torch.Tensor:
    """(d / 2,) by how much Llama 3.1 slows each frequency (transformers' `_compute_llama3_parameters`)."""
    rope = config.rope_parameters
    width = _head(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def llm_keys(writer: Any, llm: Any, words: Vocabulary, *, ends: tuple[int, ...], told: Mapping[str, Any]) -> None:
    """Write the keys of a language model and its tokenizer.

    Args:
        ends: ids that end an answer, the chat format's own first.
        told: name, the text of the chat template, id and use of BOS (bos, add_bos), pad and unk.
    """
    gguf, config = library(), llm.config
    rope, head = config.rope_parameters, _head(config)
    writer.add_name(told["name"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(words.tokens))
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{add}")(rope[key])
    for key, method in FAMILIES[config.model_type].factors.items():
        getattr(writer, method)(float(getattr(config, key)))
    _token_keys(writer, words, ends, told)


def _token_keys(writer: Any, words: Vocabulary, ends: tuple[int, ...], told: Mapping[str, Any]) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.model == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.prefix)
    else:
        writer.add_token_merges(words.merges)
    for kind in ("bos", "pad", "unk"):
        if told[kind] is not None:
            getattr(writer, f"add_{kind}_token_id")(told[kind])
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    writer.add_add_bos_token(told["add_bos"])
    # The chat template ends an answer; a tokenizer that added an end by itself would end the prompt.
    writer.add_add_eos_token(False)
    writer.add_chat_template(told["template"])


def read_by_transformers(llm: Any) -> bool:
    """Whether transformers' own reader of GGUF files gives this model back.

    It knows four of the families, plain positions, no biases of Llama's, and of Qwen3 one width of a head.
    """
    config = llm.config
    if config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return False
    if config.rope_parameters.get("rope_type", "default") != "default":
        return False
    if config.model_type == "qwen3":
        return bool(config.head_dim == Qwen3Config().head_dim)
    return config.model_type == "qwen2" or not any(key.endswith(".bias") for key in llm.state_dict())
