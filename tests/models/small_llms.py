"""Small language models of many architectures from one set of dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from mmit.models.config_keys import config_keys

WINDOW = 8  # of sliding windows and chunks, and where longrope changes its factors: records get three times as long
VOCABULARY = 64

# What most configurations call their dimensions, in all their dialects; a model type takes those it has.
DIMENSIONS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": WINDOW,
    # mixtures of experts
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    # state spaces, gated delta rules, convolutions
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "conv_kernel": 4,
    "expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # older names
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 40,
    "max_seq_len": 256,
    "word_embed_proj_dim": 32,
    # dropout of any kind
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layerdrop": 0.0,
}
BOTH = ["sliding_attention", "full_attention"]
DELTA = ["linear_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [8.0, 12.0, 20.0, 40.0],
    "original_max_position_embeddings": 2 * WINDOW,
    "partial_rotary_factor": 1.0,
}

# name -> what makes the family special beside DIMENSIONS; `model_type` where it is not the name; ... for a key to drop.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 40,
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 2,
    },
    "qwen2": {"use_sliding_window": True, "layer_types": BOTH},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": DELTA, "linear_conv_kernel_dim": 4},
    "qwen3_5_text": {"layer_types": DELTA, "linear_conv_kernel_dim": 4},
    "mistral": {},
    "ministral": {"layer_types": BOTH},
    "mixtral": {},
    "gemma": {},
    "gemma2": {"layer_types": BOTH, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"layer_types": BOTH, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        "layer_types": BOTH,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "global_head_dim": 8,
    },
    "gpt_oss": {"layer_types": BOTH},
    "phi3-longrope": {
        "model_type": "phi3",
        "sliding_window": None,
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 2 * WINDOW,
    },
    "phi3": {},
    "olmo2": {},
    "olmo3": {"layer_types": BOTH},
    "olmoe": {},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 24,
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
    },
    "cohere2": {"layer_types": BOTH},
    "exaone4": {"layer_types": BOTH, "sliding_window_pattern": 2},
    "glm4": {},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "stablelm": {},
    "starcoder2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "embedding_multiplier": 5.0,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.4,
        "attention_out_multiplier": 0.9,
        "ssm_out_multiplier": 0.3,
        "mlp_multipliers": [0.9, 0.2],
    },
    "bamba": {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    # beyond those that users lead with
    "apertus": {},
    "arcee": {},
    "axk1": {"head_dim": 4, "num_key_value_heads": 4},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cwm": {"layer_types": BOTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4},
    "diffllama": {},
    "doge": {},
    "dots1": {"layer_types": BOTH},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone_moe": {"layer_types": BOTH, "mlp_layer_types": ["dense", "sparse"]},
    "falcon": {"head_dim": ..., "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma3n_text": {
        "layer_types": BOTH,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"head_dim": 4, "num_key_value_heads": 4},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "resid_dropout": 0.0},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "granitemoe": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jetmoe": {"kv_channels": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "num_key_value_heads": 4, "zero_expert_num": 1},
    "mamba": {},
    "minimax": {"layer_types": DELTA},
    "minimax_m2": {},
    "ministral3": {},
    "mpt": {"expansion_ratio": 2},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo_hybrid": {"layer_types": DELTA},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {"layer_types": DELTA, "linear_conv_kernel_dim": 4},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "lru_width": 32,
        "attention_window_size": WINDOW,
        "conv1d_width": 4,
    },
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": {},
    "solar_open": {},
    "vaultgemma": {"layer_types": BOTH, "query_pre_attn_scalar": 8},
    "xglm": {},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 16, "n_mamba_heads": 4, "num_mem_blocks": 1},
}
MLA: dict[str, Any] = {"head_dim": 4, "num_key_value_heads": 4}  # latent attention
# Families that not every supported version of transformers has.
NEWER: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus1p5_text": {},
    "aria_text": {},
    "axk2": {**MLA, "index_topk": WINDOW},
    "bailing_hybrid": {"layer_types": DELTA, "head_dim": 8, "num_key_value_heads": 4},
    "beam": {},
    "cohere2_moe": {},
    "cohere_compass_text": {
        "layer_types": BOTH,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "deepseek_v32": {**MLA, "index_topk": WINDOW},
    "dory": {"layer_types": BOTH + BOTH, "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots3_note_text": {**MLA, "index_topk": WINDOW},
    "exaone": {},
    "flint": {},
    "glm_moe_dsa": {**MLA, "index_topk": WINDOW},
    "gpt_neox_japanese": {},
    "granite_swa": {},
    "granitemoe_swa": {},
    "hy_v3": {},
    "hrm_text": {"initializer_range": 0.1},  # its stacks run eight times: with 0.3 that makes 1e-4 of one rounding
    "hy_v4": {},
    "hyperclovax": {},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling_text": {},
    "jais2": {},
    "kimi_linear": {
        "layer_types": DELTA,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
    },
    "kolibri1": {},
    "laguna": {"layer_types": BOTH},
    "lara_mini": {},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": MLA,
    "minimax_m3_vl_text": {},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "linear_conv_kernel_dim": 4,
        "hc_count": 2,
        "hc_lowrank": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "eos_token_id": 2,
    },
    "sarvam_mla": MLA,
    "sarvam_moe": {},
    "youtu": MLA,
    "zaya": {"num_experts_per_tok": 1},
}
# Described as transformers 5.24 has them: 5.17 names their layers otherwise, or builds them for large heads alone.
LATER = {"cohere_compass_text", "qwen4_exp_text"} if Version(transformers.__version__) < Version("5.24") else set()
FAMILIES |= {name: options for name, options in NEWER.items() if name in CONFIG_MAPPING and name not in LATER}
FIRST_LIST = tuple(FAMILIES)[:35]  # what users lead with


def described(common: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Join the dimensions that a model type has to what makes it special."""
    names = config_keys(options.get("model_type", "llama"), published=False)
    return {key: value for key, value in common.items() if key in names} | dict(options)


def model_type(name: str) -> str:
    """Model type of a family."""
    return FAMILIES[name].get("model_type", name)


def family(name: str) -> dict[str, Any]:
    """Configuration of a small model of a family, for `random_init`."""
    options = described(DIMENSIONS, {"model_type": name, **FAMILIES[name]})
    return {key: value for key, value in options.items() if value is not ...}
