"""Every causal language model that transformers can build, tiny: a few layers, random weights, 258 tokens.

A configuration gets the sizes below for those of its fields that have these names, and a few of `OWN` where they do not
fit together. What still cannot be built is skipped by the tests, which count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import tiny

MODEL_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 4_000_000
"""Weights of a model that still counts as tiny."""

WIDTH = {"hidden_size", "d_model", "n_embd", "embedding_size", "dim", "emb_dim"}
INNER = {"intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "hidden_dim"}
EXPERT = {"moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"}
EIGHTS = {
    *("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim", "rotary_dim", "index_topk"),
    *("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input", "kv_lora_rank", "q_lora_rank"),
    *("mamba_d_state", "mamba_n_heads", "mamba_d_head", "state_size"),
}
FOURS = {
    *("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head", "n_heads", "num_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"),
}
TWOS = {
    *("num_key_value_heads", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    *("encoder_layers", "num_experts_per_tok", "moe_topk", "linear_num_key_heads", "global_attn_every_n_layers"),
    "mamba_expand",
}
ONES = {
    *("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group", "num_dense_layers"),
    *("first_k_dense_replace", "mamba_n_groups"),
}
SIZES: dict[str, Any] = {
    **dict.fromkeys(WIDTH, 32),
    **dict.fromkeys(INNER, 64),
    **dict.fromkeys(EXPERT, 32),
    **dict.fromkeys(EIGHTS, 8),
    **dict.fromkeys(FOURS, 4),
    **dict.fromkeys(TWOS, 2),
    **dict.fromkeys(ONES, 1),
    "vocab_size": tiny.VOCAB,
    "vocab_size_per_layer_input": tiny.VOCAB,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "sliding_window": 20,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "index_n_heads": 32,  # with few of them many scores are exactly 0, and which of these are the largest is arbitrary
    "num_kv_shared_layers": 0,
    "initializer_range": 0.3,  # logits that are far from uniform
    "init_std": 0.3,
    "is_decoder": True,
    "pad_token_id": 257,
    "bos_token_id": 257,
    "eos_token_id": 257,
}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 20},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hrm_text": {"initializer_range": 0.1},  # 32 layers after one another: rounding grows
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "recurrent_gemma": {"attention_window_size": 20, "num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "feed_forward_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"n_mamba_heads": 2, "num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "adapter_rank": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny one, in evaluation mode. Raises whatever transformers raises where these sizes do not fit."""
    own = {**OWN.get(model_type, {}), **changes}
    # kinds of layers often alternate, so that four have all of them; with some models these sizes fit two only
    for layers in ({"num_hidden_layers": 4}, {}):
        try:
            config = config_of(CONFIG_MAPPING[model_type], **{**layers, **own})
            with torch.device("meta"):
                weights = sum(part.numel() for part in AutoModelForCausalLM.from_config(config).parameters())
            assert weights <= LARGEST, f"{weights} weights"
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                assert model(input_ids=torch.arange(12)[None], use_cache=False).logits.isfinite().all()
        except Exception:
            if not layers:
                raise
        else:
            return model
    raise AssertionError


def config_of(kind: type[PretrainedConfig], **own: Any) -> PretrainedConfig:
    """A configuration with the sizes of this module, wherever it has fields of these names."""
    names = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has as many keys as heads
        given["num_key_value_heads"] = 4
    for name, inner in (kind.sub_configs or {}).items():
        if name in names and dataclasses.is_dataclass(inner):
            given[name] = config_of(inner).to_dict()
    return kind(**{**given, **own})
