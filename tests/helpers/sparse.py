"""Checkpoints of any size that take no space: real headers, index and config.json; the tensors' bytes are holes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME
from autotp_plan.schemas.storage.plan_fit import exchanged
from autotp_plan.schemas.storage.safetensors_header import header_bytes, num_bytes

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype (in safetensors' words) and shape by name on disk."""

LLAMA_LAYER = {
    "self_attn.q_proj": ("q_size", "hidden_size"),
    "self_attn.k_proj": ("kv_size", "hidden_size"),
    "self_attn.v_proj": ("kv_size", "hidden_size"),
    "self_attn.o_proj": ("hidden_size", "q_size"),
    "mlp.gate_proj": ("intermediate_size", "hidden_size"),
    "mlp.up_proj": ("intermediate_size", "hidden_size"),
    "mlp.down_proj": ("hidden_size", "intermediate_size"),
    "input_layernorm": ("hidden_size",),
    "post_attention_layernorm": ("hidden_size",),
}
NEOX_LAYER = {
    "attention.query_key_value": ("qkv_size", "hidden_size"),
    "attention.dense": ("hidden_size", "hidden_size"),
    "mlp.dense_h_to_4h": ("intermediate_size", "hidden_size"),
    "mlp.dense_4h_to_h": ("hidden_size", "intermediate_size"),
    "input_layernorm": ("hidden_size",),
    "post_attention_layernorm": ("hidden_size",),
}


def llama_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama checkpoint on the Hugging Face hub, in the order of its files."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    sizes = {**config, "q_size": config["hidden_size"], "kv_size": config["num_key_value_heads"] * head_dim}
    vocabulary = (config["vocab_size"], config["hidden_size"])
    found = {"model.embed_tokens.weight": ("BF16", vocabulary)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in LLAMA_LAYER.items():
            found[f"model.layers.{layer}.{name}.weight"] = ("BF16", tuple(sizes[size] for size in shape))
    return {**found, "model.norm.weight": ("BF16", (config["hidden_size"],)), "lm_head.weight": ("BF16", vocabulary)}


def neox_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a Pythia checkpoint on the Hugging Face hub, with the tables that are no parameters."""
    hidden, length = config["hidden_size"], config["max_position_embeddings"]
    sizes = {**config, "qkv_size": 3 * hidden}
    rotary = int(config["rotary_pct"] * hidden // config["num_attention_heads"]) // 2
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    found["gpt_neox.embed_in.weight"] = ("F16", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, dims in NEOX_LAYER.items():
            shape = tuple(sizes[size] for size in dims)
            found[f"gpt_neox.layers.{layer}.{name}.weight"] = ("F16", shape)
            found[f"gpt_neox.layers.{layer}.{name}.bias"] = ("F16", shape[:1])
        attention = f"gpt_neox.layers.{layer}.attention"
        found[f"{attention}.bias"] = ("U8", (1, 1, length, length))
        found[f"{attention}.masked_bias"] = ("F16", ())
        found[f"{attention}.rotary_emb.inv_freq"] = ("F16", (rotary,))
    norm = {f"gpt_neox.final_layer_norm.{leaf}": ("F16", (hidden,)) for leaf in ("weight", "bias")}
    return {**found, **norm, "embed_out.weight": ("F16", (config["vocab_size"], hidden))}


def write_sparse_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Tensors, num_files: int) -> int:
    """Write a checkpoint of `tensors` over `num_files` files of about the same size; returns its size in bytes.

    Only headers, index and config.json take space.
    """
    total = sum(num_bytes(dtype, shape) for dtype, shape in tensors.values())
    grouped: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(num_files)]
    at = 0
    for name, (dtype, shape) in tensors.items():
        grouped[at * num_files // total].append((name, dtype, shape))
        at += num_bytes(dtype, shape)
    weight_map = {}
    for index, members in enumerate(grouped, 1):
        path = folder / f"model-{index:05}-of-{num_files:05}.safetensors"
        header = header_bytes(members, {"format": "pt"})
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(num_bytes(dtype, shape) for _, dtype, shape in members))
        weight_map.update({name: path.name for name, _, _ in members})
    index_text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    )
    (folder / INDEX_NAME).write_text(index_text)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2))
    return total


def planned_tensors(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of the checkpoint that a plan is for. Those that are concatenated are of the same size each."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for parameter in plan.expanded():
        shape, names = plan.shape_of(parameter), parameter.names_on_disk()
        if parameter.sources is not None:
            rows, *rest = shape[1:] if parameter.sources.stacked else shape
            shape = (rows // len(parameter.sources.names), *rest)
        elif parameter.transposed:
            shape = exchanged(shape)
        found.update(dict.fromkeys(names, (parameter.dtype, shape)))
    return found
