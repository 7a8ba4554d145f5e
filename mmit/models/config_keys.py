"""The keys that describe a language model: those of the installed classes, and those that published files have besides.

In: a model_type. Out: names. transformers keeps any other key as an attribute that nothing reads.
"""

from __future__ import annotations

import functools
import inspect
import re

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Of published config files: transformers translates the first three, some models read a head_dim they do not declare.
FORMER_KEYS = ("rope_theta", "rope_scaling", "torch_dtype", "head_dim")
# Written by training code or former versions, read by no class: what a key says is in another one or in the weights.
PUBLISHED = (
    "auto_map", "architectures", "transformers_version", "_name_or_path", "quantization_config", "use_cache",
    "pretraining_tp", "tie_word_embeddings", "torch_dtype", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "unsloth_fixed", "unsloth_version", "model_name", "cache_implementation",
    "ep_size", "moe_layer_freq", "aux_loss_alpha", "seq_aux", "scoring_func", "topk_method", "num_nextn_predict_layers",
    "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor",  # DeepSeek
    "sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern",
    "layer_types", "no_rope_layers", "no_rope_layer_interval", "full_attention_interval", "mlp_only_layers",
    "hybrid_override_pattern", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype",
    "use_mamba_kernels", "rescale_prenorm_residual", "residual_in_fp32", "attn_output_gate",
    "initial_context_length", "experts_per_token", "swiglu_limit", "output_router_logits", "router_aux_loss_coef",
    "block_dim", "block_ff_dim", "conv_dim", "conv_use_xavier_init", "block_use_swiglu", "block_norm_eps",
    "full_attn_idxs", "block_mlp_init_scale", "block_out_init_scale", "block_multiple_of", "block_ffn_dim_multiplier",
    "block_auto_adjust_ff_dim", "use_pos_enc", "num_heads", "theta", "tie_embedding",  # LFM2
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "embedding_dropout", "interpolate_factor", "lm_head_bias",
    "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "hidden_activation", "hidden_act",
    "rope_theta", "rope_scaling", "rope_local_base_freq", "global_rope_theta", "partial_rotary_factor", "rope_type",
    "attention_bias", "mlp_bias", "use_qk_norm", "qk_norm", "clip_qkv", "rms_norm_eps", "layer_norm_eps",
)  # fmt: skip
# What the base class of transformers 4 wrote into every file, most of it options of generation.
FORMER_BASE = (
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "is_decoder",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "prefix", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p",
    "use_bfloat16",
)  # fmt: skip
# Of single families, read by no class of transformers.
PUBLISHED_OF: dict[str, tuple[str, ...]] = {
    "apertus": ("post_norm",),
    "deepseek_v4": ("expert_dtype", "first_k_dense_replace"),
    "exaone4": ("layer_norm_epsilon",),
    "exaone_moe": ("is_moe_layer",),
    "falcon_h1": ("attn_layer_indices", "mamba_use_mlp"),
    "gemma4_text": ("expert_intermediate_size",),
    "glm4_moe_lite": ("first_k_dense_replace",),
    "glm_moe_dsa": ("index_share_for_mtp_iteration", "indexer_rope_interleave", "moe_router_dtype", "rope_interleave"),
    "gpt2": ("n_ctx",),
    "longcat_flash": ("attention_method", "mla_scale_kv_lora", "mla_scale_q_lora", "zero_expert_type"),
    "minimax": ("rotary_dim", "shared_intermediate_size"),
    "minimax_m2": (
        "rotary_dim",  # older transformers take it without naming it
        "attn_type_list", "mtp_transformer_layers", "num_mtp_modules", "qk_norm_type", "shared_intermediate_size",
        "use_mtp", "use_routing_bias",
    ),
    "nemotron_h": ("attention_head_dim", "norm_eps", "num_hidden_layers", "time_step_rank"),
    "qwen3_5_text": ("output_gate_type",),
    "qwen3_moe": ("qkv_bias", "shared_expert_intermediate_size"),
    "qwen3_vl_text": ("bos_token_id", "eos_token_id"),
}  # fmt: skip


@functools.cache
def config_keys(kind: str, *, published: bool = True) -> frozenset[str]:
    """Return the keys that describe a model of this `model_type`, with those that only published files have."""
    known = CONFIG_MAPPING[kind]
    # From the installed class, so that a newer transformers brings its keys by itself; the lists above hold only what
    # no class can tell.
    names = {*known().to_dict(), *known.attribute_map, *inspect.signature(known).parameters, *FORMER_KEYS}
    names |= {*PUBLISHED, *FORMER_BASE, *PUBLISHED_OF.get(kind, ())} if published else set()
    return frozenset(names.union(*map(_popped_keys, known.__mro__)))


@functools.cache  # the base class of all configs has a long source, which takes a tenth of a second to parse
def _popped_keys(kind: type) -> frozenset[str]:
    """Keys of older files that a config class takes out of its keyword arguments."""
    if not issubclass(kind, PreTrainedConfig):
        return frozenset()
    # Known limit: keys that a class takes out in other ways are not seen, and would be refused as unknown.
    return frozenset(re.findall(r"""kwargs\.(?:pop|get)\(\s*["'](\w+)""", inspect.getsource(kind)))
