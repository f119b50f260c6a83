"""A tiny random model of every causal-LM type that transformers has, built from its config class with small sizes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY, WIDTH, LAYERS = 160, 64, 4
_MOST_PARAMETERS = 90e6

# The sizes that config classes know, by name; where a class has the name, it gets the size.
_SIZES: dict[str, int] = {
    # widths
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "embedding_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("attention_hidden_size", "axial_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "ffn_hidden_size", "feed_forward_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff", "dense_intermediate_size"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "mamba_d_ssm", "shared_intermediate_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "max_window_layers", "num_layers_per_stack"), LAYERS),
    "encoder_layers": LAYERS,  # what a decoder's cache is made for, in the families of BART
    **dict.fromkeys(("num_encoder_layers", "mamba_num_layers"), 2),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_head_dim", "swa_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("attention_head_dim", "attention_head_size", "dim_head", "d_head", "linear_head_dim"), 16),
    **dict.fromkeys(("swa_v_head_dim", "kv_lora_rank", "d_kv"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "laurel_rank"), 8),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank"), 24),
    "o_groups": 2, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16,
    # linear attention, state spaces, convolutions
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "n_mamba_heads": 2, "mamba_d_head": 16, "mamba_head_dim": 16,
    "mamba_headdim": 16, "mamba_d_state": 16, "ssm_state_size": 16, "state_size": 16, "n_groups": 1, "mamba_n_groups": 1,
    "mamba_ngroups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "mamba_dt_rank": 8, "time_step_rank": 8,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_dense_layers", "first_k_dense_replace"), 1),
    # vocabulary and lengths
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "context_length"), 128),
    **dict.fromkeys(("max_source_positions", "model_max_length", "original_max_position_embeddings", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "attention_chunk_size"), 16),
    "hidden_size_per_layer_input": 16, "encoder_hash_byte_group_vocab": 64,
    "ngram_vocab_size_base": 100, "hc_lowrank": 8,
}  # fmt: skip

# Sizes that are set although the class leaves them open, where the model cannot be built without.
_NEEDED = frozenset({
    "head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group", "topk_group",
})  # fmt: skip
_HYBRID = ["linear_attention", "hybrid"] * (LAYERS // 2)
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What single classes need besides: their sizes depend on one another.
_OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 32}},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "intermediate_size": [96] * LAYERS, "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    **dict.fromkeys(("bailing_hybrid", "granitemoehybrid", "kimi_linear"), _MIXED),
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 16), "attn_layers": ["local", "lsh"] * (LAYERS // 2),
    },
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": WIDTH // 2},
    "zamba2": {"layers_block_type": _HYBRID, "n_mamba_heads": 8, "attention_hidden_size": 2 * WIDTH,
               "num_query_groups": 4, "attention_head_dim": WIDTH // 2},
}  # fmt: skip


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of that type in fp32, frozen, with the weights that its own code starts from."""
    torch.manual_seed(seed)
    config = tiny_config(CONFIG_MAPPING[model_type])
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, kind.config_class):  # the decoder of a model of several parts
        parts = [getattr(config, name) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, kind.config_class)), config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"its config class leaves it at {count / 1e6:.0f} million parameters")
    model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)
    return model.float().eval().requires_grad_(False)


def tiny_config(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """A config of that class with small sizes, made by its own constructor, so that what depends on sizes fits them."""
    default = kind()
    given = vars(default)
    settings: dict[str, Any] = {
        name: size
        for name, size in _SIZES.items()
        if name in given and ((type(given[name]) is int) or (given[name] is None and name in _NEEDED))
    }
    if "qk_rope_head_dim" in given:  # latent attention: every head has its own keys, and a part of each is rotated
        settings["num_key_value_heads"] = settings["num_attention_heads"]
        if given.get("head_dim") == given["qk_rope_head_dim"]:
            settings["head_dim"] = settings["qk_rope_head_dim"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(given.get(name), int) and given[name] >= VOCABULARY:
            settings[name] = 0
    for name in kind.sub_configs:
        nested = given.get(name)
        if isinstance(nested, PretrainedConfig):
            settings[name] = tiny_config(type(nested))
    return kind(**{**settings, **_OWN.get(kind.model_type, {})})


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Give matrices the size that keeps a signal as large as it was, and every norm and bias a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and name.endswith(("weight", "_proj")):  # embeddings, matrices, those of experts
            parameter.copy_(noise if "embed" in name else noise / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(noise / 4)
        elif name.endswith("weight"):
            parameter.add_(noise.clamp(-2, 2) / 4)
