"""Names of the keys in config files of published models, by model_type: those of files that public repositories keep
for tests and tools (ai-dynamo/aiconfigurator, NVIDIA-NeMo/Megatron-Bridge, ml-explore/mlx-lm), names alone.
"""

from __future__ import annotations

PUBLISHED: dict[str, str] = {
    "apertus": (
        "attention_bias hidden_size intermediate_size max_position_embeddings mlp_bias num_attention_heads "
        "num_hidden_layers num_key_value_heads post_norm qk_norm rms_norm_eps rope_theta tie_word_embeddings "
        "vocab_size"
    ),
    "bitnet": (
        "hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps "
        "vocab_size"
    ),
    "cohere": "",
    "cohere2": "head_dim hidden_size num_hidden_layers sliding_window sliding_window_pattern",
    "deepseek_v2": (
        "hidden_size intermediate_size kv_lora_rank moe_intermediate_size num_attention_heads num_hidden_layers "
        "num_key_value_heads q_lora_rank qk_nope_head_dim qk_rope_head_dim rope_scaling v_head_dim vocab_size"
    ),
    "deepseek_v3": (
        "_name_or_path architectures attention_bias attention_dropout auto_map aux_loss_alpha bos_token_id "
        "chunk_size_feed_forward dtype eos_token_id ep_size first_k_dense_replace hidden_act hidden_size id2label "
        "initializer_range intermediate_size is_encoder_decoder kv_lora_rank label2id max_position_embeddings "
        "moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob "
        "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers "
        "output_attentions output_hidden_states pad_token_id pretraining_tp problem_type q_lora_rank "
        "qk_nope_head_dim qk_rope_head_dim quantization_config return_dict rms_norm_eps rope_parameters "
        "rope_scaling rope_theta routed_scaling_factor scoring_func seq_aux tie_word_embeddings topk_group "
        "topk_method torch_dtype transformers_version use_cache v_head_dim vocab_size"
    ),
    "deepseek_v32": (
        "architectures attention_bias attention_dropout bos_token_id eos_token_id ep_size first_k_dense_replace "
        "hidden_act hidden_size index_head_dim index_n_heads index_topk initializer_range intermediate_size "
        "kv_lora_rank max_position_embeddings moe_intermediate_size moe_layer_freq n_group n_routed_experts "
        "n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers "
        "num_key_value_heads num_nextn_predict_layers q_lora_rank qk_nope_head_dim qk_rope_head_dim "
        "quantization_config rms_norm_eps rope_scaling rope_theta routed_scaling_factor scoring_func "
        "tie_word_embeddings topk_group topk_method torch_dtype transformers_version use_cache v_head_dim "
        "vocab_size"
    ),
    "deepseek_v4": (
        "architectures attention_bias attention_dropout bos_token_id compress_ratios compress_rope_theta "
        "eos_token_id expert_dtype first_k_dense_replace hc_eps hc_mult hc_sinkhorn_iters head_dim hidden_act "
        "hidden_size index_head_dim index_n_heads index_topk initializer_range intermediate_size "
        "max_position_embeddings moe_intermediate_size n_routed_experts n_shared_experts norm_topk_prob "
        "num_attention_heads num_experts_per_tok num_hash_layers num_hidden_layers num_key_value_heads "
        "num_nextn_predict_layers o_groups o_lora_rank q_lora_rank qk_rope_head_dim quantization_config "
        "rms_norm_eps rope_scaling rope_theta routed_scaling_factor scoring_func sliding_window swiglu_limit "
        "tie_word_embeddings topk_method torch_dtype transformers_version use_cache vocab_size"
    ),
    "dots1": (
        "first_k_dense_replace hidden_size intermediate_size max_position_embeddings moe_intermediate_size "
        "n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok "
        "num_hidden_layers num_key_value_heads rms_norm_eps rope_theta routed_scaling_factor vocab_size"
    ),
    "ernie4_5": (
        "head_dim hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings use_bias vocab_size"
    ),
    "ernie4_5_moe": (
        "architectures bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size "
        "max_position_embeddings moe_intermediate_size moe_k moe_layer_end_index moe_layer_interval "
        "moe_layer_start_index moe_num_experts moe_num_shared_experts num_attention_heads num_hidden_layers "
        "num_key_value_heads output_router_logits pad_token_id rms_norm_eps rope_theta router_aux_loss_coef "
        "tie_word_embeddings torch_dtype use_bias use_cache vocab_size"
    ),
    "exaone4": (
        "architectures head_dim hidden_size initializer_range intermediate_size layer_norm_epsilon "
        "max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps "
        "rope_scaling rope_theta sliding_window sliding_window_pattern tie_word_embeddings torch_dtype vocab_size"
    ),
    "exaone_moe": (
        "head_dim hidden_size intermediate_size is_moe_layer layer_types max_position_embeddings "
        "moe_intermediate_size n_group norm_topk_prob num_attention_heads num_experts num_experts_per_tok "
        "num_hidden_layers num_key_value_heads num_shared_experts rms_norm_eps rope_theta routed_scaling_factor "
        "sliding_window tie_word_embeddings topk_group vocab_size"
    ),
    "falcon_h1": (
        "architectures attention_bias attention_dropout attention_in_multiplier attention_out_multiplier "
        "attn_layer_indices embedding_multiplier head_dim hidden_act hidden_size initializer_range "
        "intermediate_size key_multiplier lm_head_multiplier mamba_chunk_size mamba_conv_bias mamba_d_conv "
        "mamba_d_head mamba_d_state mamba_expand mamba_n_groups mamba_n_heads mamba_norm_before_gate "
        "mamba_proj_bias mamba_rms_norm mamba_use_mlp max_position_embeddings mlp_bias mlp_multipliers "
        "num_attention_heads num_hidden_layers num_key_value_heads projectors_bias rms_norm_eps rope_scaling "
        "rope_theta ssm_in_multiplier ssm_multipliers ssm_out_multiplier tie_word_embeddings torch_dtype "
        "vocab_size"
    ),
    "falcon_mamba": (
        "conv_kernel hidden_size intermediate_size num_hidden_layers state_size time_step_rank use_bias "
        "use_conv_bias vocab_size"
    ),
    "gemma": (
        "head_dim hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads "
        "rms_norm_eps vocab_size"
    ),
    "gemma2": (
        "head_dim hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads "
        "rms_norm_eps vocab_size"
    ),
    "gemma3_text": (
        "architectures attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act "
        "hidden_activation hidden_size initializer_range intermediate_size max_position_embeddings "
        "num_attention_heads num_hidden_layers num_key_value_heads pad_token_id query_pre_attn_scalar "
        "rms_norm_eps rope_local_base_freq rope_scaling rope_theta sliding_window sliding_window_pattern "
        "torch_dtype transformers_version use_cache vocab_size"
    ),
    "gemma4_text": (
        "architectures attention_bias attention_dropout attention_k_eq_v bos_token_id dtype enable_moe_block "
        "eos_token_id expert_intermediate_size final_logit_softcapping global_head_dim head_dim hidden_act "
        "hidden_activation hidden_size hidden_size_per_layer_input initializer_range intermediate_size "
        "layer_types max_position_embeddings moe_intermediate_size num_attention_heads num_experts "
        "num_global_key_value_heads num_hidden_layers num_key_value_heads num_kv_shared_layers pad_token_id "
        "query_pre_attn_scalar rms_norm_eps rope_local_base_freq rope_parameters rope_theta sliding_window "
        "sliding_window_pattern tie_word_embeddings top_k_experts torch_dtype transformers_version "
        "use_bidirectional_attention use_cache use_double_wide_mlp vocab_size vocab_size_per_layer_input"
    ),
    "glm": (
        "architectures attention_bias attention_dropout auto_map bos_token_id eos_token_id head_dim hidden_act "
        "hidden_size initializer_range intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers num_key_value_heads partial_rotary_factor rms_norm_eps rope_theta "
        "routed_scaling_factor tie_word_embeddings torch_dtype use_cache use_qk_norm vocab_size"
    ),
    "glm4": (
        "attention_bias head_dim hidden_size intermediate_size num_attention_heads num_hidden_layers "
        "num_key_value_heads partial_rotary_factor rms_norm_eps rope_theta vocab_size"
    ),
    "glm4_moe": (
        "architectures attention_bias attention_dropout bos_token_id eos_token_id first_k_dense_replace head_dim "
        "hidden_act hidden_size initializer_range intermediate_size max_position_embeddings moe_intermediate_size "
        "n_group n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok "
        "num_hidden_layers num_key_value_heads num_local_experts num_nextn_predict_layers partial_rotary_factor "
        "rms_norm_eps rope_scaling rope_theta routed_scaling_factor tie_word_embeddings topk_group torch_dtype "
        "transformers_version use_cache use_qk_norm vocab_size"
    ),
    "glm4_moe_lite": (
        "attention_bias first_k_dense_replace hidden_size intermediate_size kv_lora_rank max_position_embeddings "
        "moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob "
        "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers "
        "partial_rotary_factor q_lora_rank qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_scaling rope_theta "
        "routed_scaling_factor scoring_func tie_word_embeddings topk_group topk_method v_head_dim vocab_size"
    ),
    "glm_moe_dsa": (
        "architectures attention_bias attention_dropout bos_token_id dtype eos_token_id ep_size "
        "first_k_dense_replace head_dim hidden_act hidden_size index_head_dim index_n_heads "
        "index_share_for_mtp_iteration index_skip_topk_offset index_topk index_topk_freq index_topk_pattern "
        "indexer_rope_interleave indexer_types initializer_range intermediate_size kv_lora_rank layer_types "
        "max_position_embeddings mlp_bias mlp_layer_types moe_intermediate_size moe_layer_freq moe_router_dtype "
        "n_group n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts "
        "num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers pad_token_id "
        "pretraining_tp q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim quantization_config "
        "rms_norm_eps rope_interleave rope_parameters routed_scaling_factor scoring_func tie_word_embeddings "
        "topk_group topk_method transformers_version use_cache v_head_dim vocab_size"
    ),
    "gpt2": "layer_norm_epsilon n_ctx n_embd n_head n_layer n_positions vocab_size",
    "gpt_bigcode": "layer_norm_epsilon n_embd n_head n_inner n_layer n_positions vocab_size",
    "gpt_neox": (
        "hidden_size layer_norm_eps max_position_embeddings num_attention_heads num_hidden_layers rotary_emb_base "
        "rotary_pct vocab_size"
    ),
    "gpt_oss": (
        "architectures attention_bias attention_dropout eos_token_id experts_per_token head_dim hidden_act "
        "hidden_size initial_context_length initializer_range intermediate_size layer_types "
        "max_position_embeddings num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads "
        "num_local_experts output_router_logits pad_token_id quantization_config rms_norm_eps rope_scaling "
        "rope_theta router_aux_loss_coef sliding_window swiglu_limit tie_word_embeddings transformers_version "
        "use_cache vocab_size"
    ),
    "granite": (
        "attention_bias attention_multiplier embedding_multiplier hidden_size intermediate_size logits_scaling "
        "max_position_embeddings mlp_bias num_attention_heads num_hidden_layers num_key_value_heads "
        "residual_multiplier rms_norm_eps rope_theta vocab_size"
    ),
    "granitemoe": (
        "attention_bias attention_multiplier embedding_multiplier hidden_size intermediate_size logits_scaling "
        "max_position_embeddings num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads "
        "num_local_experts residual_multiplier rms_norm_eps rope_theta vocab_size"
    ),
    "granitemoehybrid": (
        "attention_bias attention_multiplier embedding_multiplier hidden_size intermediate_size layer_types "
        "logits_scaling mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state mamba_n_groups mamba_n_heads "
        "mamba_proj_bias max_position_embeddings num_attention_heads num_experts_per_tok num_hidden_layers "
        "num_key_value_heads num_local_experts residual_multiplier rms_norm_eps rope_theta "
        "shared_intermediate_size vocab_size"
    ),
    "helium": (
        "attention_bias head_dim hidden_size intermediate_size max_position_embeddings mlp_bias "
        "num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings "
        "vocab_size"
    ),
    "hunyuan_v1_dense": (
        "attention_bias hidden_size intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers num_key_value_heads rms_norm_eps rope_scaling rope_theta use_qk_norm vocab_size"
    ),
    "jamba": (
        "attn_layer_offset attn_layer_period expert_layer_offset expert_layer_period hidden_size "
        "intermediate_size mamba_d_conv mamba_d_state mamba_expand max_position_embeddings num_attention_heads "
        "num_experts num_experts_per_tok num_hidden_layers num_key_value_heads rms_norm_eps vocab_size"
    ),
    "lfm2": (
        "block_auto_adjust_ff_dim block_dim block_ff_dim block_ffn_dim_multiplier block_multiple_of conv_L_cache "
        "conv_bias full_attn_idxs hidden_size layer_types max_position_embeddings norm_eps num_attention_heads "
        "num_hidden_layers num_key_value_heads rope_theta vocab_size"
    ),
    "lfm2_moe": (
        "conv_L_cache conv_bias full_attn_idxs hidden_size intermediate_size max_position_embeddings "
        "moe_intermediate_size norm_eps norm_topk_prob num_attention_heads num_dense_layers num_experts "
        "num_experts_per_tok num_hidden_layers num_key_value_heads rope_theta use_expert_bias vocab_size"
    ),
    "llama": (
        "_name_or_path architectures attention_bias attention_dropout bos_token_id eos_token_id head_dim "
        "hidden_act hidden_size initializer_range intermediate_size layer_types max_position_embeddings mlp_bias "
        "num_attention_heads num_hidden_layers num_key_value_heads pretraining_tp rms_norm_eps rope_parameters "
        "rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype transformers_version use_cache "
        "vocab_size"
    ),
    "llama4_text": (
        "attention_bias attention_chunk_size attention_dropout head_dim hidden_act hidden_size "
        "interleave_moe_layer_step intermediate_size intermediate_size_mlp max_position_embeddings no_rope_layers "
        "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts "
        "output_router_logits rms_norm_eps rope_scaling rope_theta router_aux_loss_coef tie_word_embeddings "
        "torch_dtype use_cache use_qk_norm vocab_size"
    ),
    "longcat_flash": (
        "attention_bias attention_method expert_ffn_hidden_size ffn_hidden_size hidden_size kv_lora_rank "
        "max_position_embeddings mla_scale_kv_lora mla_scale_q_lora moe_topk n_routed_experts num_attention_heads "
        "num_layers q_lora_rank qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_theta routed_scaling_factor "
        "v_head_dim vocab_size zero_expert_num zero_expert_type"
    ),
    "mamba": (
        "conv_kernel hidden_size intermediate_size num_hidden_layers state_size time_step_rank use_bias "
        "use_conv_bias vocab_size"
    ),
    "mamba2": (
        "conv_kernel head_dim hidden_size layer_norm_epsilon n_groups num_heads num_hidden_layers state_size "
        "tie_word_embeddings time_step_limit time_step_rank use_bias use_conv_bias vocab_size"
    ),
    "minimax": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_experts_per_tok "
        "num_hidden_layers num_key_value_heads num_local_experts rms_norm_eps rope_theta rotary_dim "
        "shared_intermediate_size vocab_size"
    ),
    "minimax_m2": (
        "architectures attention_dropout attn_type_list auto_map bos_token_id dtype eos_token_id head_dim "
        "hidden_act hidden_size initializer_range intermediate_size max_position_embeddings "
        "mtp_transformer_layers num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads "
        "num_local_experts num_mtp_modules output_router_logits partial_rotary_factor qk_norm_type "
        "quantization_config rms_norm_eps rope_theta rotary_dim router_aux_loss_coef router_jitter_noise "
        "scoring_func shared_intermediate_size sliding_window tie_word_embeddings torch_dtype "
        "transformers_version use_cache use_mtp use_qk_norm use_routing_bias vocab_size"
    ),
    "ministral3": (
        "head_dim hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "num_key_value_heads rms_norm_eps rope_parameters rope_theta tie_word_embeddings vocab_size"
    ),
    "mixtral": (
        "architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
        "intermediate_size max_position_embeddings num_attention_heads num_experts_per_tok num_hidden_layers "
        "num_key_value_heads num_local_experts output_router_logits rms_norm_eps rope_theta router_aux_loss_coef "
        "sliding_window tie_word_embeddings torch_dtype transformers_version use_cache vocab_size"
    ),
    "nanochat": "hidden_size intermediate_size num_hidden_layers vocab_size",
    "nemotron": (
        "hidden_act hidden_size intermediate_size norm_eps num_attention_heads num_hidden_layers "
        "num_key_value_heads vocab_size"
    ),
    "nemotron_h": (
        "architectures attention_bias attention_dropout attention_head_dim auto_map bos_token_id chunk_size "
        "conv_kernel dtype eos_token_id expand head_dim hidden_act hidden_dropout hidden_size "
        "hybrid_override_pattern initializer_range intermediate_size layer_norm_epsilon layers_block_type "
        "mamba_head_dim mamba_hidden_act mamba_num_heads mamba_proj_bias mamba_ssm_cache_dtype "
        "max_position_embeddings mlp_bias mlp_hidden_act moe_intermediate_size moe_latent_size "
        "moe_shared_expert_intermediate_size moe_shared_expert_overlap mtp_hybrid_override_pattern "
        "mtp_layers_block_type n_group n_groups n_routed_experts n_shared_experts norm_eps norm_topk_prob "
        "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_logits_to_keep "
        "num_nextn_predict_layers pad_token_id partial_rotary_factor rescale_prenorm_residual residual_in_fp32 "
        "rms_norm_eps rope_theta routed_scaling_factor sliding_window ssm_state_size tie_word_embeddings "
        "time_step_floor time_step_limit time_step_max time_step_min time_step_rank topk_group torch_dtype "
        "transformers_version use_bias use_cache use_conv_bias use_mamba_kernels vocab_size"
    ),
    "olmo": "vocab_size",
    "olmo2": (
        "attention_bias hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads "
        "rms_norm_eps rope_theta vocab_size"
    ),
    "olmo3": (
        "head_dim hidden_size intermediate_size max_position_embeddings num_attention_heads num_heads "
        "num_hidden_layers rms_norm_eps rope_theta sliding_window tie_word_embeddings vocab_size"
    ),
    "olmoe": (
        "architectures attention_bias attention_dropout bos_token_id eos_token_id hidden_act hidden_size "
        "initializer_range intermediate_size max_position_embeddings num_attention_heads num_experts "
        "num_experts_per_tok num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps rope_theta "
        "router_aux_loss_coef tie_word_embeddings torch_dtype transformers_version use_cache vocab_size"
    ),
    "phi3": "hidden_size intermediate_size num_attention_heads num_hidden_layers rms_norm_eps vocab_size",
    "phimoe": (
        "hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads rope_scaling "
        "vocab_size"
    ),
    "qwen2": (
        "architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
        "intermediate_size max_position_embeddings max_window_layers num_attention_heads num_hidden_layers "
        "num_key_value_heads rms_norm_eps rope_parameters rope_theta sliding_window tie_word_embeddings "
        "torch_dtype transformers_version use_cache use_sliding_window vocab_size"
    ),
    "qwen2_moe": (
        "hidden_size intermediate_size moe_intermediate_size num_attention_heads num_experts num_experts_per_tok "
        "num_hidden_layers rms_norm_eps shared_expert_intermediate_size vocab_size"
    ),
    "qwen3": (
        "architectures attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size "
        "initializer_range intermediate_size max_position_embeddings max_window_layers num_attention_heads "
        "num_hidden_layers num_key_value_heads quantization_config rms_norm_eps rope_scaling rope_theta "
        "sliding_window tie_word_embeddings torch_dtype transformers_version use_cache use_sliding_window "
        "vocab_size"
    ),
    "qwen3_5_moe_text": (
        "architectures attention_bias attention_dropout attn_output_gate bos_token_id dtype eos_token_id "
        "full_attention_interval head_dim hidden_act hidden_size initializer_range layer_types "
        "linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads "
        "linear_value_head_dim mamba_ssm_dtype max_position_embeddings mlp_only_layers moe_intermediate_size "
        "mtp_num_hidden_layers mtp_use_dedicated_embeddings num_attention_heads num_experts num_experts_per_tok "
        "num_hidden_layers num_key_value_heads output_router_logits pad_token_id partial_rotary_factor "
        "rms_norm_eps rope_parameters router_aux_loss_coef shared_expert_intermediate_size tie_word_embeddings "
        "torch_dtype use_cache vocab_size"
    ),
    "qwen3_5_text": (
        "architectures attention_bias attention_dropout attn_output_gate bos_token_id dtype eos_token_id "
        "full_attention_interval head_dim hidden_act hidden_size initializer_range intermediate_size layer_types "
        "linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads "
        "linear_value_head_dim mamba_ssm_dtype max_position_embeddings mlp_only_layers mtp_num_hidden_layers "
        "mtp_use_dedicated_embeddings num_attention_heads num_hidden_layers num_key_value_heads output_gate_type "
        "pad_token_id partial_rotary_factor rms_norm_eps rope_parameters tie_word_embeddings torch_dtype "
        "use_cache vocab_size"
    ),
    "qwen3_moe": (
        "architectures attention_bias attention_dropout bos_token_id decoder_sparse_step eos_token_id head_dim "
        "hidden_act hidden_size initializer_range intermediate_size max_position_embeddings max_window_layers "
        "mlp_only_layers moe_intermediate_size norm_topk_prob num_attention_heads num_experts num_experts_per_tok "
        "num_hidden_layers num_key_value_heads output_router_logits qkv_bias quantization_config rms_norm_eps "
        "rope_scaling rope_theta router_aux_loss_coef shared_expert_intermediate_size sliding_window "
        "tie_word_embeddings torch_dtype transformers_version use_cache use_qk_norm use_sliding_window vocab_size"
    ),
    "qwen3_next": (
        "architectures attention_dropout bos_token_id decoder_sparse_step eos_token_id full_attention_interval "
        "head_dim hidden_act hidden_size initializer_range intermediate_size linear_conv_kernel_dim "
        "linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim "
        "max_position_embeddings mlp_only_layers moe_intermediate_size norm_topk_prob num_attention_heads "
        "num_experts num_experts_per_tok num_hidden_layers num_key_value_heads output_router_logits "
        "partial_rotary_factor rms_norm_eps rope_scaling rope_theta router_aux_loss_coef "
        "shared_expert_intermediate_size tie_word_embeddings torch_dtype transformers_version use_cache "
        "use_sliding_window vocab_size"
    ),
    "qwen3_vl_moe_text": (
        "attention_bias attention_dropout bos_token_id decoder_sparse_step dtype eos_token_id head_dim hidden_act "
        "hidden_size initializer_range intermediate_size max_position_embeddings mlp_only_layers "
        "moe_intermediate_size norm_topk_prob num_attention_heads num_experts num_experts_per_tok "
        "num_hidden_layers num_key_value_heads rms_norm_eps rope_theta use_cache vocab_size"
    ),
    "qwen3_vl_text": (
        "attention_bias attention_dropout bos_token_id dtype eos_token_id head_dim hidden_act hidden_size "
        "initializer_range intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "num_key_value_heads rms_norm_eps rope_scaling rope_theta tie_word_embeddings use_cache vocab_size"
    ),
    "recurrent_gemma": (
        "attention_bias attention_window_size block_types conv1d_width hidden_size intermediate_size "
        "logits_soft_cap num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_theta "
        "vocab_size"
    ),
    "seed_oss": (
        "head_dim hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads "
        "rms_norm_eps vocab_size"
    ),
    "smollm3": "hidden_size intermediate_size num_attention_heads num_hidden_layers rms_norm_eps vocab_size",
    "stablelm": (
        "hidden_size intermediate_size layer_norm_eps num_attention_heads num_hidden_layers num_key_value_heads "
        "partial_rotary_factor rope_theta use_qkv_bias vocab_size"
    ),
    "starcoder2": "hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads",
}
