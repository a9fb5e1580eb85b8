"""A tiny random model of every causal LM that transformers has, built offline from the default config of its type.

What a default config holds is made small by name (`SIZES`), and of its layers one of each kind is kept. `OVERRIDES` is
what a type needs beyond that: mechanisms its default leaves out, or sizes that only fit together.
"""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY = 131


def _named(value, names: str) -> dict:
    return dict.fromkeys(names.split(), value)


SIZES = {
    **_named(VOCABULARY, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    **_named(VOCABULARY, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"),
    **_named(512, "max_position_embeddings n_positions max_seq_len n_ctx model_max_length context_length"),
    **_named(64, "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size lru_width"),
    **_named(64, "input_embedding_size output_embedding_size hidden_size_global"),
    **_named(96, "intermediate_size intermediate_size_mlp shared_intermediate_size dense_intermediate_size"),
    **_named(96, "ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner n_inner"),
    **_named(32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **_named(32, "shared_experts_intermediate_size expert_ffn_hidden_size prefix_dense_intermediate_size"),
    **_named(4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    **_named(4, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads"),
    **_named(4, "num_encoder_attention_heads linear_num_key_heads linear_num_value_heads linear_num_heads"),
    **_named(4, "mamba_n_heads"),
    **_named(2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads index_n_heads"),
    **_named(16, "head_dim d_head dim_head kv_channels swa_head_dim v_head_dim qk_nope_head_dim kv_lora_rank"),
    **_named(16, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size"),
    **_named(16, "index_head_dim index_topk"),
    **_named(24, "q_lora_rank"),
    **_named(8, "qk_rope_head_dim rotary_dim hidden_size_per_layer_input"),
    **_named(24, "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size"),
    # Every expert is chosen: routers would answer the error of 8 bits with another expert, which is another model.
    **_named(2, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    **_named(1, "n_group topk_group num_expert_group"),
    # Scores that differ, so that a wrong mask or position changes the tokens.
    **_named(0.3, "initializer_range init_std"),
    **_named(0.25, "attention_multiplier"),
    **_named(True, "is_decoder use_cache"),
    **_named(False, "tie_word_embeddings"),
    **_named(0, "pad_token_id"),
    **_named(1, "bos_token_id decoder_start_token_id"),
    **_named(None, "eos_token_id forced_eos_token_id"),
}
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
COUNTS += ("encoder_layers", "num_encoder_layers")
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
OVERRIDES = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64},
    },
    "dory": {"layer_types": SLIDING, **_named(1, "n_input_layers n_recurrent_layers n_output_layers")},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 2, "n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {
        **_named(4, "swa_num_attention_heads swa_num_key_value_heads"),
        **_named(16, "swa_q_lora_rank swa_kv_lora_rank swa_qk_nope_head_dim swa_v_head_dim"),
        **_named(24, "swa_head_dim"),
    },
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": [*SLIDING, "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0] * 5,
        "intermediate_size": [96] * 5,
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"initializer_range": 0.2},  # its scores are not scaled
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hrm_text": {"initializer_range": 0.1, "num_hidden_layers": 2, "L_cycles": 1},  # its depth makes any error large
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [8, 8, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": SLIDING},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "musicgen": {"decoder": {"num_codebooks": 1, "decoder_start_token_id": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1, "decoder_start_token_id": 1}},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"num_buckets": 8, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def _by_layer(default: dict, count: int) -> dict[str, list]:
    """Lists of a config that say something of each layer."""
    return {
        name: value
        for name, value in default.items()
        if isinstance(value, list) and len(value) == count and len(set(map(str, value))) < count
    }


def _kept_layers(lists: dict[str, list], count: int) -> list[int]:
    """Three layers or more of `count`, among them one of each kind."""
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(str([values[index] for values in lists.values()]), index)
    more = [index for index in range(count) if index not in kinds.values()]
    return sorted([*kinds.values(), *more[: max(0, 3 - len(kinds))]])


def _small(config: PreTrainedConfig) -> dict:
    """Arguments that make a config of the same class small."""
    default = config.to_dict()
    options = {name: SIZES[name] for name in default if name in SIZES}
    count = next((default[name] for name in COUNTS if isinstance(default.get(name), int)), 0)
    if count:
        lists = _by_layer(default, count)
        kept = _kept_layers(lists, count)
        options |= {name: len(kept) for name in COUNTS if name in default}
        options |= {name: [values[index] for index in kept] for name, values in lists.items()}
    if default.get("kv_lora_rank"):  # all heads share what is cached
        options["num_key_value_heads"] = options["num_attention_heads"]
        options.pop("head_dim", None)
        if default.get("head_dim") == default["qk_rope_head_dim"]:
            options["head_dim"] = options["qk_rope_head_dim"]
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            options[name] = _small(part)
    return _merged(options, OVERRIDES.get(config.model_type, {}))


def _merged(options: dict, more: dict) -> dict:
    """Both, nested dicts of both too."""
    nested = {name: _merged(options[name], x) for name, x in more.items() if isinstance(options.get(name), dict)}
    return options | more | nested


def build(name: str) -> torch.nn.Module:
    """The tiny model of a type, the same weights each time."""
    kind = CONFIG_MAPPING[name]
    config = kind(**_small(kind()))
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    if not isinstance(config, model_class.config_class):  # of a whole, of which the class is the decoder
        config = config.get_text_config(decoder=True)
    torch.manual_seed(0)
    return model_class._from_config(config).eval()
