"""Small random checkpoints of models that hold a language model and a vision tower, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autotp_plan.runtime.verify.random_inputs import randomise

TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256,
    "intermediate_size": 96, "max_position_embeddings": 128, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
NO_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
}  # fmt: skip
CLIP = {**SIGLIP, "model_type": "clip_vision_model"}
QWEN_VISION = {"depth": 3, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TOKENS = {
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253,
}  # fmt: skip

WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3", "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252,
        "mm_tokens_per_image": 4, "vision_config": SIGLIP,
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 8,
                        "layer_types": ["sliding_attention", "full_attention"]},
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl", **QWEN_TOKENS, "text_config": {**NO_HEAD_DIM, "model_type": "qwen2_vl_text", **MROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64},
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl", **QWEN_TOKENS,
        "text_config": {**NO_HEAD_DIM, "model_type": "qwen2_5_vl_text", **MROPE},
        "vision_config": {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                          "fullatt_block_indexes": [1], "window_size": 56},
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl", **QWEN_TOKENS,
        "text_config": {**TEXT, "model_type": "qwen3_vl_text", "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        "vision_config": {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                          "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe", **QWEN_TOKENS,
        "text_config": {**TEXT, "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 24, "num_experts": 4,
                        "num_experts_per_tok": 2, "rope_parameters": {
                            "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        "vision_config": {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                          "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
    "mistral3": {
        "model_type": "mistral3", "image_token_index": 250, "spatial_merge_size": 2,
        "text_config": {**TEXT, "model_type": "mistral"}, "tie_word_embeddings": False,
        "vision_config": {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "head_dim": 8, "image_size": 56, "patch_size": 14},
    },
    "llama4": {
        "model_type": "llama4", "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252,
        "text_config": {**TEXT, "model_type": "llama4_text", "intermediate_size": 48, "intermediate_size_mlp": 96,
                        "num_local_experts": 4, "interleave_moe_layer_step": 2},
        "vision_config": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "vision_output_dim": 48,
                          "projector_input_dim": 48, "projector_output_dim": 48, "pixel_shuffle_ratio": 0.5},
    },
    "llava": {
        "model_type": "llava", "image_token_index": 250, "vision_config": CLIP,
        "text_config": {**TEXT, "model_type": "llama"}, "image_seq_length": 16,
    },
    "llava_next": {
        "model_type": "llava_next", "image_token_index": 250, "vision_config": CLIP, "image_seq_length": 16,
        "text_config": {**TEXT, "model_type": "mistral"}, "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    },
    "llava_onevision": {
        "model_type": "llava_onevision", "image_token_index": 250, "video_token_index": 251, "vision_config": SIGLIP,
        "text_config": {**TEXT, "model_type": "qwen2"}, "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    },
    "paligemma": {
        "model_type": "paligemma", "image_token_index": 250, "projection_dim": 64,
        "vision_config": {**SIGLIP, "projection_dim": 64}, "text_config": {**TEXT, "model_type": "gemma2"},
    },
    "internvl": {
        "model_type": "internvl", "image_token_id": 250, "image_seq_length": 4, "downsample_ratio": 0.5,
        "text_config": {**TEXT, "model_type": "qwen3"}, "tie_word_embeddings": False,
        "vision_config": {"model_type": "internvl_vision", "hidden_size": 32, "intermediate_size": 48,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": [56, 56],
                          "patch_size": [14, 14]},
    },
    "smolvlm": {
        "model_type": "smolvlm", "image_token_id": 250, "scale_factor": 2, "pad_token_id": 0,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGLIP, "model_type": "smolvlm_vision"},
    },
    "idefics3": {
        "model_type": "idefics3", "image_token_id": 250, "scale_factor": 2, "pad_token_id": 0,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGLIP, "model_type": "idefics3_vision"},
    },
    "glm4v": {
        "model_type": "glm4v", "image_token_id": 250, "video_token_id": 251, "image_start_token_id": 252,
        "image_end_token_id": 253, "video_start_token_id": 254, "video_end_token_id": 255,
        "text_config": {**NO_HEAD_DIM, "model_type": "glm4v_text", "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                          "num_heads": 4, "patch_size": 14, "image_size": 56, "spatial_merge_size": 2,
                          "temporal_patch_size": 2},
    },
}  # fmt: skip

_SAM = {
    "hidden_size": 32, "image_size": 64, "patch_size": 16, "mlp_dim": 48, "num_attention_heads": 4, "window_size": 2,
    "num_hidden_layers": 2, "global_attn_indexes": [1], "output_channels": 16,
}  # fmt: skip
_OVIS = {
    "hidden_size": 32, "image_size": 56, "patch_size": 14, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 32, "hidden_stride": 2,
}  # fmt: skip
_AUDIO = {
    "d_model": 32, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "encoder_layers": 1, "num_mel_bins": 16,
    "n_window": 4, "output_dim": 64, "max_source_positions": 32,
}  # fmt: skip
_PERCEIVER = {
    "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
_VQ = {
    "model_type": "janus_vqgan", "base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 8,
    "latent_channels": 8, "num_embeddings": 16, "num_patches": 4, "num_res_blocks": 1, "projection_dim": 64,
    "image_token_embed_dim": 64, "num_hidden_layers": 1,
}  # fmt: skip

OTHERS: dict[str, dict[str, Any]] = {
    "aya_vision": {
        "model_type": "aya_vision", "image_token_index": 250, "vision_config": SIGLIP, "downsample_factor": 2,
        "text_config": {**NO_HEAD_DIM, "model_type": "cohere"},
    },
    "cosmos3_omni": {
        "model_type": "cosmos3_omni", **QWEN_TOKENS, "vision_config": WRAPPERS["qwen3_vl"]["vision_config"],
        "text_config": WRAPPERS["qwen3_vl"]["text_config"],
    },
    "deepseek_vl": {
        "model_type": "deepseek_vl", "image_token_id": 250, "vision_config": SIGLIP,
        "text_config": {**TEXT, "model_type": "llama"},
    },
    "glm46v": {**WRAPPERS["glm4v"], "model_type": "glm46v"},
    "got_ocr2": {
        "model_type": "got_ocr2", "image_token_index": 250, "image_seq_length": 4, "vision_config": _SAM,
        "text_config": {**NO_HEAD_DIM, "model_type": "qwen2"},
    },
    "idefics2": {
        "model_type": "idefics2", "image_token_id": 250, "perceiver_config": _PERCEIVER,
        "vision_config": {**SIGLIP, "model_type": "idefics2_vision"}, "text_config": {**TEXT, "model_type": "mistral"},
    },
    "janus": {
        "model_type": "janus", "image_token_id": 250, "text_config": {**TEXT, "model_type": "llama"}, "vq_config": _VQ,
        "vision_config": {"model_type": "janus_vision_model", "hidden_size": 32, "image_size": 56, "patch_size": 14,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 64, "mlp_ratio": 2.0,
                          "num_image_tokens": 16},
    },
    "lighton_ocr": {
        "model_type": "lighton_ocr", "image_token_id": 250, "spatial_merge_size": 2,
        "vision_config": WRAPPERS["mistral3"]["vision_config"], "text_config": {**TEXT, "model_type": "qwen3"},
    },
    "llava_next_video": {
        "model_type": "llava_next_video", "image_token_index": 250, "video_token_index": 251, "image_seq_length": 16,
        "vision_config": CLIP, "image_grid_pinpoints": [[56, 112], [112, 56]],
        "text_config": {**TEXT, "model_type": "llama"},
    },
    "ovis2": {
        "model_type": "ovis2", "image_token_id": 250, "visual_indicator_token_ids": [251, 252, 253, 254, 255],
        "vocab_size": 256, "hidden_size": 64, "vision_config": _OVIS,
        "text_config": {**NO_HEAD_DIM, "model_type": "qwen2"},
    },
    "qwen2_5_omni_thinker": {
        "model_type": "qwen2_5_omni_thinker", "image_token_index": 250, "video_token_index": 251,
        "audio_token_index": 252, "audio_config": _AUDIO, "vision_config": WRAPPERS["qwen2_5_vl"]["vision_config"],
        "text_config": {**NO_HEAD_DIM, "model_type": "qwen2_5_omni_text", **MROPE},
    },
    "video_llama_3": {
        "model_type": "video_llama_3", "image_token_id": 250, "video_token_id": 251,
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "patch_size": 14},
        "text_config": {**NO_HEAD_DIM, "model_type": "qwen2"},
    },
    "vipllava": {
        "model_type": "vipllava", "image_token_index": 250, "image_seq_length": 16, "vision_config": CLIP,
        "vision_feature_layers": [-2, -1], "text_config": {**TEXT, "model_type": "llama"},
    },
}  # fmt: skip
"""Wrappers without an entry in wrappers.json: planned by what transformers says of them."""

_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "tie_word_embeddings": False, "rope_parameters": {
        "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_QWEN3_5_VISION = {
    **QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 16,
}  # fmt: skip
_GEMMA4_TEXT = {
    **TEXT, "model_type": "gemma4_text", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
    "global_head_dim": 32, "vocab_size_per_layer_input": 256, "use_bidirectional_attention": "vision",
}  # fmt: skip
_GEMMA4_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}  # fmt: skip

INFERRED: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "model_type": "qwen3_5", **QWEN_TOKENS, "vision_config": _QWEN3_5_VISION, "tie_word_embeddings": False,
        "text_config": {**TEXT, **_DELTA_NET, "model_type": "qwen3_5_text"},
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe", **QWEN_TOKENS, "vision_config": _QWEN3_5_VISION, "tie_word_embeddings": False,
        "text_config": {**TEXT, **_DELTA_NET, "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 24,
                        "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    },
    "gemma4": {
        "model_type": "gemma4", "image_token_id": 250, "boi_token_id": 251, "eoi_token_id": 252, "audio_token_id": 253,
        "video_token_id": 254, "audio_config": None, "vision_config": _GEMMA4_VISION,
        "text_config": {**_GEMMA4_TEXT, "hidden_size_per_layer_input": 16},
    },
    "gemma4_moe": {
        "model_type": "gemma4", "image_token_id": 250, "boi_token_id": 251, "eoi_token_id": 252, "audio_token_id": 253,
        "video_token_id": 254, "audio_config": None, "vision_config": _GEMMA4_VISION,
        "text_config": {**_GEMMA4_TEXT, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
                        "top_k_experts": 2, "moe_intermediate_size": 24, "attention_k_eq_v": True,
                        "num_global_key_value_heads": 4},
    },
}  # fmt: skip
"""Wrappers whose language model has no preset: its rules are inferred, and a twin proves them."""


def make_wrapper_config(variant: str, **changes: Any) -> Any:
    """The transformers config of a small wrapper."""
    from transformers import AutoConfig

    values = {**WRAPPERS, **OTHERS, **INFERRED}[variant] | changes
    return AutoConfig.for_model(values.pop("model_type"), **values)


def save_wrapper(folder: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random checkpoint of a wrapper to `folder`, as transformers does."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(make_wrapper_config(variant, **changes), dtype=dtype)
    randomise(model)
    model.save_pretrained(folder)
    return folder
