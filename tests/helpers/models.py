"""Small random checkpoints of real architectures, and the dense model's numbers to compare with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMMON = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 256,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

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
}  # fmt: skip

PRESET_VARIANTS = list(CONFIGS)


def make_config(variant: str, **changes: Any) -> Any:
    """The transformers config of a small variant."""
    from transformers import AutoConfig

    values = {**COMMON, **CONFIGS[variant], **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter, norms and biases too, a random value: zeros and ones hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                value = noise / math.sqrt(parameter.shape[-1])
            else:
                value = noise * 0.2 + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(value)
    return model


def save_checkpoint(folder: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random checkpoint of `variant` to `folder`, as transformers does."""
    from transformers import AutoModelForCausalLM

    model = randomise(AutoModelForCausalLM.from_config(make_config(variant, **changes), dtype=torch.float64))
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def load_dense(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The whole model of a checkpoint, in evaluation-free training mode without dropout."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def batch(seed: int, size: int = 2, length: int = 12, vocab_size: int = 256) -> Tensor:
    """Random token ids, `(size, length)`; the padding token is among them."""
    tokens = torch.randint(vocab_size, (size, length), generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = 0
    return tokens
