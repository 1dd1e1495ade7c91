"""Small configs of models with mixers that are not attention, in the words of their config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON = {"vocab_size": 256, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ATTENTION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
_DELTA_NET = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 8,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": {
        **_ATTENTION, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
        "mamba_n_groups": 1, "mamba_expand": 2,
    },
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 4, "state_size": 16, "expand": 2},
    "falcon_h1": {
        **_ATTENTION, "mamba_d_ssm": 96, "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 16,
        "mamba_n_groups": 1, "mamba_rms_norm": True, "head_dim": 8,
    },
    "nemotron_h": {
        **_ATTENTION, "num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 4, "ssm_state_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen3_next": {
        **_ATTENTION, **_DELTA_NET, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_5_text": {**_ATTENTION, **_DELTA_NET},
    "jamba": {
        **_ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 6,
    },
    "falcon_mamba": {"hidden_size": 64, "state_size": 8, "time_step_rank": 6, "expand": 2},
    "lfm2": {**_ATTENTION, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "minicpm3": {**_ATTENTION, **_MLA},
}  # fmt: skip
"""By `model_type`."""


def mixer_folder(folder: Path, model_type: str) -> Path:
    """A folder with the config.json of a small model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(model_type, **{**_COMMON, **CONFIGS[model_type]})
    values = json.loads(config.to_json_string(use_diff=False))
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    (folder / "config.json").write_text(json.dumps(values))
    return folder
