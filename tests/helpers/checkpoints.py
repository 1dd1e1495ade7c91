"""Small checkpoints written by hand, without torch or transformers: random bytes under a safetensors header."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotp_plan.schemas.storage.safetensors_header import header_bytes, num_bytes

Shapes = Mapping[str, Sequence[int]]

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


def llama_shapes(config: Mapping[str, Any] = LLAMA_CONFIG, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-like model with `config`; q, k and v with biases where asked."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (size, hidden)
            if biases:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, q_size)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def tensor_bytes(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """The contents of a tensor: random bytes that depend on its name only."""
    return random.Random(name).randbytes(num_bytes(dtype, shape))


def write_file(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], tied: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of `{name: (dtype, shape)}`; what is `tied` has the contents of the tensor it is tied to."""
    tied = tied or {}
    header = header_bytes([(name, dtype, shape) for name, (dtype, shape) in tensors.items()], {"format": "pt"})
    path.write_bytes(header + b"".join(tensor_bytes(tied.get(name, name), *one) for name, one in tensors.items()))
    return path


def write_checkpoint(
    folder: Path,
    shapes: Shapes,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: str | Mapping[str, str] = "BF16",
    num_files: int = 1,
    tied: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint folder of `num_files` files; `dtype` is one for all tensors or one for each (others BF16)."""
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {name: dtype if isinstance(dtype, str) else dtype.get(name, "BF16") for name in shapes}
    tensors = {name: (dtypes[name], tuple(shape)) for name, shape in shapes.items()}
    if num_files == 1:
        write_file(folder / "model.safetensors", tensors, tied)
    else:
        weight_map: dict[str, str] = {}
        names = list(tensors)
        for part in range(num_files):
            file_name = f"model-{part + 1:05d}-of-{num_files:05d}.safetensors"
            mine = names[part::num_files]
            write_file(folder / file_name, {name: tensors[name] for name in mine}, tied)
            weight_map.update(dict.fromkeys(mine, file_name))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_llama(folder: Path, *, biases: bool = False, num_files: int = 1, **changes: Any) -> Path:
    """A checkpoint of a small Llama, its config changed by `changes`."""
    config = {**LLAMA_CONFIG, **changes}
    return write_checkpoint(folder, llama_shapes(config, biases), config, num_files=num_files)
