"""Small random checkpoints of real architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp_plan.runtime.verify.float64_passes import EXPERTS
from autotp_plan.runtime.verify.random_inputs import Batches, randomise

COMMON = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 256,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "intermediate_size": 96, "num_key_value_heads": 4},
    "llama_bias_tied": {
        "model_type": "llama", "intermediate_size": 96, "num_key_value_heads": 4, "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "intermediate_size": 96, "num_key_value_heads": 4, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "intermediate_size": 96, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16},
    "phi3": {"model_type": "phi3", "intermediate_size": 96, "num_key_value_heads": 4},
    "gemma2": {
        "model_type": "gemma2", "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        "model_type": "gemma3_text", "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma": {"model_type": "gemma", "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16},
    "granite": {
        "model_type": "granite", "intermediate_size": 96, "num_key_value_heads": 4, "attention_bias": True,
        "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "cohere": {"model_type": "cohere", "intermediate_size": 96, "num_key_value_heads": 4, "logit_scale": 0.5},
    "starcoder2": {"model_type": "starcoder2", "intermediate_size": 96, "num_key_value_heads": 4},
    "glm": {"model_type": "glm", "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16},
    "glm4": {"model_type": "glm4", "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16},
    "phi": {"model_type": "phi", "intermediate_size": 96, "num_key_value_heads": 4},
    "phi_qk_layernorm": {
        "model_type": "phi", "intermediate_size": 96, "num_key_value_heads": 4, "qk_layernorm": True,
    },
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 96},
    "bloom": {"model_type": "bloom", "n_layer": 2, "n_head": 8},
    "falcon_multi_query": {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False},
    "falcon_grouped": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon_alibi": {
        "model_type": "falcon", "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False,
    },
    "mixtral": {"model_type": "mixtral", "intermediate_size": 96, "num_key_value_heads": 4, "num_local_experts": 4},
    "qwen2_moe": {
        "model_type": "qwen2_moe", "intermediate_size": 96, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4,
        "num_hidden_layers": 3, "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4,
        "num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 16,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2", "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 8,
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2", "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 8,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "n_group": 2,
        "topk_group": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 8,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
        "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4_text": {
        "model_type": "llama4_text", "intermediate_size": 48, "intermediate_size_mlp": 96, "num_local_experts": 4,
        "num_key_value_heads": 4, "head_dim": 16, "interleave_moe_layer_step": 2,
    },
    "opt": {"model_type": "opt", "ffn_dim": 96, "dropout": 0.0},
    "opt_350m": {
        "model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False,
        "dropout": 0.0,
    },
    "gpt2": {"model_type": "gpt2", **NO_DROPOUT},
    "gpt_bigcode_multi_query": {"model_type": "gpt_bigcode", "multi_query": True, **NO_DROPOUT},
    "gpt_bigcode_multi_head": {"model_type": "gpt_bigcode", "multi_query": False, **NO_DROPOUT},
    "codegen": {"model_type": "codegen", "rotary_dim": 4, "n_ctx": 64, "num_attention_heads": 16},
    "mpt": {"model_type": "mpt", "max_seq_len": 64, "expansion_ratio": 4},
    "dbrx": {
        "model_type": "dbrx", "d_model": 64, "n_heads": 8, "n_layers": 2,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "olmo2": {"model_type": "olmo2", "intermediate_size": 96, "num_key_value_heads": 4},
    "cohere_qk_norm": {
        "model_type": "cohere", "intermediate_size": 96, "num_key_value_heads": 4, "logit_scale": 0.5,
        "use_qk_norm": True,
    },
    "granitemoe": {
        "model_type": "granitemoe", "intermediate_size": 48, "num_key_value_heads": 4, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip

PRESET_VARIANTS = list(CONFIGS)


def make_config(variant: str, **changes: Any) -> Any:
    """The transformers config of a small variant."""
    from transformers import AutoConfig

    values = {**COMMON, **CONFIGS[variant], **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def save_checkpoint(folder: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random checkpoint of `variant` to `folder`, as transformers does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(make_config(variant, **changes), dtype=torch.float64)
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def load_dense(folder: Path, dtype: torch.dtype | str = torch.float32, **options: Any) -> nn.Module:
    """The unsharded model of a checkpoint, in training mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def eager_experts(dtype: torch.dtype) -> dict[str, Any]:
    """What loading in `dtype` must be told."""
    return EXPERTS if dtype == torch.float64 else {}


batch = Batches(vocab_size=256, length=12, padding=0)
"""Random token ids by seed."""
