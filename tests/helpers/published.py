"""Large quantised models as they are published: names, dtypes and shapes of every tensor, for files without content.

Counted against the published indices: DeepSeek-V3 has 91,991 tensors in 163 files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]
Entries = Iterator[tuple[str, tuple[str, tuple[int, ...]]]]
Linear = Callable[[str, int, int], Entries]
"""The tensors of a linear layer, from its name and its output and input features."""


def fp8_linear(name: str, rows: int, columns: int) -> Entries:
    """As DeepSeek-V3 stores a linear layer."""
    yield f"{name}.weight", ("F8_E4M3", (rows, columns))
    yield f"{name}.weight_scale_inv", ("F32", (-(-rows // 128), -(-columns // 128)))


def bf16_linear(name: str, rows: int, columns: int) -> Entries:
    yield f"{name}.weight", ("BF16", (rows, columns))


def int4_linear(name: str, rows: int, columns: int) -> Entries:
    """As Kimi-K2-Thinking stores a linear layer of an expert."""
    yield f"{name}.weight_packed", ("I32", (rows, columns // 8))
    yield f"{name}.weight_scale", ("BF16", (rows, columns // 32))
    yield f"{name}.weight_shape", ("I32", (2,))


def _mlp(name: str, linear: Linear, hidden: int, inner: int) -> Entries:
    yield from linear(f"{name}.gate_proj", inner, hidden)
    yield from linear(f"{name}.up_proj", inner, hidden)
    yield from linear(f"{name}.down_proj", hidden, inner)


def deepseek_tensors(config: Mapping[str, Any], linear: Linear, experts: Linear) -> Tensors:
    """DeepSeek-V3 and Kimi-K2, with DeepSeek's layer that predicts a further token, where there is one."""
    return dict(_deepseek(config, linear, experts))


def _deepseek(config: Mapping[str, Any], linear: Linear, experts: Linear) -> Entries:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    kv_head = config["qk_nope_head_dim"] + config["v_head_dim"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    layers = config["num_hidden_layers"]
    yield from bf16_linear("model.embed_tokens", config["vocab_size"], hidden)
    for number in range(layers + config.get("num_nextn_predict_layers", 0)):
        layer = f"model.layers.{number}"
        if number == layers:
            yield from bf16_linear(f"{layer}.embed_tokens", config["vocab_size"], hidden)
            yield from bf16_linear(f"{layer}.eh_proj", hidden, 2 * hidden)
            yield from bf16_linear(f"{layer}.shared_head.head", config["vocab_size"], hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{layer}.{norm}.weight", ("BF16", (hidden,))
        attention = f"{layer}.self_attn"
        yield from linear(f"{attention}.q_a_proj", q_rank, hidden)
        yield from linear(f"{attention}.q_b_proj", heads * q_head, q_rank)
        yield from linear(f"{attention}.kv_a_proj_with_mqa", kv_rank + config["qk_rope_head_dim"], hidden)
        yield from linear(f"{attention}.kv_b_proj", heads * kv_head, kv_rank)
        yield from linear(f"{attention}.o_proj", hidden, heads * config["v_head_dim"])
        yield f"{attention}.q_a_layernorm.weight", ("BF16", (q_rank,))
        yield f"{attention}.kv_a_layernorm.weight", ("BF16", (kv_rank,))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", ("BF16", (hidden,))
        if number < config["first_k_dense_replace"]:
            yield from _mlp(f"{layer}.mlp", linear, hidden, config["intermediate_size"])
            continue
        inner = config["moe_intermediate_size"]
        yield from bf16_linear(f"{layer}.mlp.gate", config["n_routed_experts"], hidden)
        yield f"{layer}.mlp.gate.e_score_correction_bias", ("F32", (config["n_routed_experts"],))
        for expert in range(config["n_routed_experts"]):
            yield from _mlp(f"{layer}.mlp.experts.{expert}", experts, hidden, inner)
        yield from _mlp(f"{layer}.mlp.shared_experts", linear, hidden, inner * config["n_shared_experts"])
    yield "model.norm.weight", ("BF16", (hidden,))
    yield from bf16_linear("lm_head", config["vocab_size"], hidden)


def gpt_oss_tensors(config: Mapping[str, Any]) -> Tensors:
    """gpt-oss with experts in MXFP4."""
    return dict(_gpt_oss(config))


def _gpt_oss(config: Mapping[str, Any]) -> Entries:
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    yield from bf16_linear("model.embed_tokens", config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows, columns in (
            ("q_proj", q_size, hidden), ("k_proj", kv_size, hidden), ("v_proj", kv_size, hidden),
            ("o_proj", hidden, q_size),
        ):  # fmt: skip
            yield from bf16_linear(f"{layer}.self_attn.{name}", rows, columns)
            yield f"{layer}.self_attn.{name}.bias", ("BF16", (rows,))
        yield f"{layer}.self_attn.sinks", ("BF16", (config["num_attention_heads"],))
        yield from bf16_linear(f"{layer}.mlp.router", experts, hidden)
        yield f"{layer}.mlp.router.bias", ("BF16", (experts,))
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield f"{layer}.mlp.experts.{name}_blocks", ("U8", (experts, rows, columns // 32, 16))
            yield f"{layer}.mlp.experts.{name}_scales", ("U8", (experts, rows, columns // 32))
            yield f"{layer}.mlp.experts.{name}_bias", ("BF16", (experts, rows))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", ("BF16", (hidden,))
    yield "model.norm.weight", ("BF16", (hidden,))
    yield from bf16_linear("lm_head", config["vocab_size"], hidden)
