"""Values for the fields of a tiny config: rules by field name, and exceptions by model type.

All widths are small; there are four layers, two of four experts per token, and windows shorter than
the sequences. Where the defaults would make all layers the same kind, an exception mixes kinds.
"""

from __future__ import annotations

from typing import Any

NUM_LAYERS = 4
HIDDEN = 32
HEADS = 4
VOCABULARY = 130
"""The size of the demo tokenizer's vocabulary."""

RULES: tuple[tuple[str, Any], ...] = (
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers", NUM_LAYERS),
    (r"encoder_layers|num_encoder_layers", 2),
    (r"(shared_|moe_|dense_|expert_|prefix_dense_)?(shared_expert_)?intermediate_size(_mlp)?", 48),
    (r"(shared_|moe_|dense_|expert_)?(shared_expert_|shared_experts_)?intermediate_size", 48),
    (r"(encoder_|decoder_)?ffn_(hidden_size|dim)|n_inner|d_inner|dff|dim_ff|d_ff|ffn_dim", 48),
    (r"vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"hidden_size|d_model|n_embd|dim|emb_dim|embed(ding)?_(dim|size)|word_embed_proj_dim", HIDDEN),
    (r"lru_width|ple_embed_dim|text_hidden_size|attention_dim|index_hidden_size", HIDDEN),
    (r"(num|n)_(attention_)?heads?|(num_)?(encoder|decoder)_attention_heads", HEADS),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|swa_num_key_value_heads", 2),
    (r"swa_num_attention_heads|index_n_heads|indexer_n_heads|n_heads", HEADS),
    (r"head_dim|kv_channels|v_head_dim|qk_(nope_|rope_)?head_dim", 8),
    (r"(swa|global|linear)_.*head_dim", 8),
    (r"linear_(key|value)_head_dim|d_kv|rotary_dim|index_head_dim|indexer_head_dim", 8),
    (r"linear_num_(key_|value_)?heads", HEADS),
    (r".*lora_(rank|dim)|.*_lora_rank|adapter_rank|laurel_rank", 8),
    (r"(num|n|moe_num)_(local_|routed_)?experts", 4),
    (r"(num|n)_experts_per_(tok|token)|moe_top_?k|top_k_experts|experts_top_k|moe_k", 2),
    (r"n_group|topk_group|(n|num|moe_num)_shared_experts", 1),
    (r"sliding_window(_size)?|attention_window_size|attention_window|local_attention", 6),
    (r"max_(position_embeddings|seq_len|sequence_length|window)|n_positions|n_ctx", 64),
    (r"(mamba_)?(ssm_)?(d_)?state(_size)?|mamba_d_state", 8),
    (r"mamba_(n|num)_heads|n_mamba_heads", HEADS),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"mamba_d_ssm", 64),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"(mamba_)?chunk_size|block_size", 8),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"index_topk|indexer_budget", 4),
    (r"initializer_range", 0.2),
    (r"(attn|hidden|resid|embd|embed|attention|classifier|activation|.*)_?(p)?(dropout|pdrop|layerdrop)"
     r"(_prob|_rate)?|dropout", 0.0),
    (r"num_nextn_predict_layers|num_mtp_layers", None),
    (r"depth", NUM_LAYERS),
    (r"image_size", 16),
    (r"patch_size", 8),
    (r"mlp_dim", 48),
    (r"out_hidden_size|projection_dim|vision_output_dim", HIDDEN),
)  # fmt: skip

DROP: Any = object()
_MLA = {"num_key_value_heads": HEADS, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
_DENSE_FIRST = {"first_k_dense_replace": 1}
_DECODER = {"encoder_layers": NUM_LAYERS, "is_decoder": True}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {
        **_MLA,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "first_k_dense_replace": 1,
    },
    "bamba": {"attn_layer_indices": [1, 3], "attn_rotary_emb": 4},
    "bart": _DECODER,
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bigbird_pegasus": _DECODER,
    "blt": {
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "global_config": {"hidden_size": 64},
        "encoder_hash_byte_group_vocab": 20,
        "patch_in_forward": False,
    },
    "blenderbot": _DECODER,
    "blenderbot-small": _DECODER,
    "camembert": {"is_decoder": True},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "data2vec-text": {"is_decoder": True},
    "deepseek_v2": {**_MLA, **_DENSE_FIRST, "head_dim": 8, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, **_DENSE_FIRST, "head_dim": 8},
    "deepseek_v32": {**_MLA, **_DENSE_FIRST},
    "dots1": _DENSE_FIRST,
    "dots3_note_text": {
        **_MLA,
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "index_head_dim": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense"] * NUM_LAYERS,
            "per_layer_config": {},
            "adapter_input_size": HIDDEN,
            "adapter_in_dim": HIDDEN,
            "adapter_output_size": HIDDEN,
            "adapter_out_dim": HIDDEN,
        }
    },
    "electra": {"is_decoder": True},
    "ernie": {"is_decoder": True},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": {**_MLA, **_DENSE_FIRST},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": NUM_LAYERS,
        },
        "backbone_hidden_size": HIDDEN,
    },
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": NUM_LAYERS},
        "backbone_hidden_size": HIDDEN,
    },
    "got_ocr2": {"vision_config": {"output_channels": 16, "image_size": 64}},
    "kimi_linear": {
        **_MLA,
        "q_lora_rank": None,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "head_dim": 8,
            "num_heads": HEADS,
            "short_conv_kernel_size": 4,
        },
        "num_local_experts": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {
        **_MLA,
        "num_key_value_heads": DROP,
        "qk_head_dim": 16,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": HEADS, "head_dim": 16},
    "marian": {**_DECODER, "decoder_start_token_id": 0},
    "mbart": _DECODER,
    "megatron-bert": {"is_decoder": True},
    "minicpm3": _MLA,
    "mpt": {"attn_config": {"attn_pdrop": 0, "alibi": True}},
    "mvp": _DECODER,
    "pegasus": _DECODER,
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": HIDDEN,
            "depthwise_separable_out_channel": HIDDEN,
            "num_blocks": 2,
        },
        "vision_config": {"crop_size": 16},
    },
    "plbart": _DECODER,
    "prophetnet": {"num_encoder_layers": NUM_LAYERS, "is_decoder": True, "ngram": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 11,
        "make_ngram_vocab_size_divisible_by": 4,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"] * 1
        + ["linear_attention"],
        "ple_layer_ids": [1, 2],
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_embds": False,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 1,
        "attention_head_size": 8,
    },
    "rembert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "roberta-prelayernorm": {"is_decoder": True},
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCABULARY,
    },
    "roformer": {"is_decoder": True},
    "rwkv": {"rescale_every": 2, "attention_hidden_size": HIDDEN},
    "trocr": {"is_decoder": True},
    "whisper": _DECODER,
    "xlm-roberta": {"is_decoder": True},
    "xlm-roberta-xl": {"is_decoder": True},
    "xlstm": {
        "num_heads": HEADS,
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 8,
        "hidden_size": 64,
        "embedding_dim": 64,
        "chunk_size": 8,
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
    "youtu": _MLA,
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "use_mem_rope": True,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
