"""The twin of a plan: smaller in every way that does not matter, and cut in the same places."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from autotp_plan.huggingface import scale_config
from autotp_plan.runtime.verify.scale_plan import TwinError, num_layers_needed, scaled_layout, twin_plan
from autotp_plan.schemas.intervals import divide
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.plan.document import Crossing, ModelIdentity, ModuleAttribute, Parameter, Plan, PlannedModule
from autotp_plan.schemas.plan.rule_ref import NO_RULE

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "attention_dropout": 0.1, "eos_token_id": 128001,
    "sliding_window": 4096, "sliding_window_pattern": 6, "max_window_layers": 28, "use_sliding_window": True,
    "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096, "long_factor": [1.0] * 64},
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "hidden_size": 7168, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "num_hidden_layers": 61,
}  # fmt: skip


def shrink(config: dict[str, Any], tp_size: int = 2, divisor: int = 32) -> dict[str, Any]:
    return scale_config.shrink(config, divisor=divisor, layers=2, experts=16, tp_size=tp_size)


def cut(size: int, tp_size: int, unit: int = 1, *, dim: int = 0, shape: tuple[int, ...] = ()) -> Layout:
    shares = divide(size // unit, tp_size)
    return Layout(
        shape=shape or (size, 4096),
        dim=dim,
        sub_parameters=(SubParameter(size=size, unit=unit),),
        intervals=tuple(((start * unit, stop * unit),) for start, stop in shares),
    )


def test_widths_keep_their_ratios_and_heads_their_number() -> None:
    assert scale_config.divisors(LLAMA_8B)[:2] == [32, 16]
    small = shrink(LLAMA_8B)
    assert (small["hidden_size"], small["intermediate_size"], small["head_dim"]) == (128, 448, 4)
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (32, 8)
    assert (small["num_hidden_layers"], small["attention_dropout"]) == (2, 0.0)
    assert (small["sliding_window"], small["sliding_window_pattern"], small["max_window_layers"]) == (8, 6, 28)
    assert small["rope_parameters"]["long_factor"] == [1.0, 1.0]
    assert small["rope_parameters"]["original_max_position_embeddings"] == 4096


def test_a_twins_tokens_fill_more_than_a_window_and_a_chunk() -> None:
    """State-space mixers pad to a chunk: 256 by 256 numbers for each head and state."""
    small = shrink({**LLAMA_8B, "mamba_chunk_size": 256, "chunk_size": 4, "chunk_size_feed_forward": 0})
    assert (small["mamba_chunk_size"], small["chunk_size"], small["chunk_size_feed_forward"]) == (8, 4, 0)


def test_widths_of_what_a_model_does_not_have_do_not_count() -> None:
    """As Nemotron-H-8B's: transformers completes the config with experts, of which the model has none."""
    config = {**LLAMA_8B, "moe_intermediate_size": 7688}
    assert scale_config.divisors(config)[0] == 8
    assert scale_config.divisors(config, {4096, 14336, 1024, 128256})[0] == 32
    assert scale_config.divisors(config, {4096, 14336, 1024, 7688})[0] == 8


def test_norms_of_a_twin_do_not_amplify_rounding() -> None:
    config = {"rms_norm_eps": 1e-6, "text_config": {"layer_norm_epsilon": 0.1}, "num_steps": 3, "norm": "rms"}
    mild = {"rms_norm_eps": 1e-2, "text_config": {"layer_norm_epsilon": 0.1}, "num_steps": 3, "norm": "rms"}
    assert scale_config.with_mild_norms(config) == mild


def test_a_rotated_part_of_a_head_stays_even() -> None:
    pythia = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, "rotary_pct": 0.25}
    assert scale_config.divisors(pythia)[0] == 16  # heads of 8, of which 2 are rotated


@pytest.mark.parametrize(("vocab_size", "tp_size"), [(128256, 8), (50257, 2), (50257, 4), (151936, 3), (300, 7)])
def test_the_vocabulary_keeps_its_remainder(vocab_size: int, tp_size: int) -> None:
    small = shrink({**LLAMA_8B, "vocab_size": vocab_size}, tp_size)
    assert small["vocab_size"] < 300 and small["vocab_size"] % tp_size == vocab_size % tp_size
    assert small["eos_token_id"] < small["vocab_size"]


def test_a_twin_has_so_many_experts_that_routers_have_a_choice() -> None:
    assert scale_config.fewest_experts(DEEPSEEK_V3) == 16  # 8 groups of 2; 4 groups give the 8 of a token
    assert scale_config.fewest_experts({"num_local_experts": 8, "num_experts_per_tok": 2}) == 4
    assert scale_config.fewest_experts({"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}) == 5
    assert scale_config.fewest_experts(LLAMA_8B) is None


def test_what_a_mixer_normalizes_stays_wide() -> None:
    """Norms of a vector of a few features are noise: heads of delta nets stay 16 wide, states 4."""
    heads = {"linear_key_head_dim": 96, "linear_value_head_dim": 192, "linear_num_value_heads": 30}
    small = shrink({**LLAMA_8B, **heads, "mamba_d_state": 16}, 2)
    assert (small["linear_key_head_dim"], small["linear_value_head_dim"], small["mamba_d_state"]) == (24, 48, 16)
    assert small["hidden_size"] == 128 and shrink({**LLAMA_8B, "mamba_d_state": 128}, 2)["mamba_d_state"] == 4


def plan_of(layers: dict[str, str], **changes: Any) -> Plan:
    """A plan of parameters that are all 64 x 64 whole, `layers` being names and dtypes."""
    return Plan(
        model=ModelIdentity(model_type="llama", architecture=None, config={}, inventory="sha256:" + "0" * 64),
        tp_size=2,
        layouts={"whole": Layout(shape=(64, 64))},
        parameters=tuple(
            Parameter(name=name, layout="whole", dtype=dtype, style="replicated", rule=NO_RULE)
            for name, dtype in layers.items()
        ),
        **changes,
    )


def test_a_twin_has_every_kind_of_layer() -> None:
    dense = "model.layers.{0..2}.mlp.up_proj.weight"
    plan = plan_of({"embed.weight": "F32", dense: "F32", "model.layers.{3..60}.mlp.experts.up_proj": "F32"})
    assert num_layers_needed(plan, {"num_hidden_layers": 61}) == 4
    alike = plan_of({"model.layers.{0..31}.mlp.up_proj.weight": "F32"})
    assert num_layers_needed(alike, {"num_hidden_layers": 32}) == 2
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    assert num_layers_needed(alike, {"num_hidden_layers": 32, "layer_types": pattern * 5 + pattern[:2]}) == 6
    every_layer = {"num_hidden_layers": 32, "moe_layers": [*range(32)], "no_rope_layers": [1, 1, 1, 0] * 8}
    assert num_layers_needed(alike, every_layer) == 4
    assert num_layers_needed(alike, {"num_hidden_layers": 40}) is None
    kinds = ["mamba", "mlp", "mamba", "attention"] * 8
    assert num_layers_needed(alike, {"layers_block_type": kinds}) == 4, "transformers computes the number"
    assert scale_config.shrink({"layers_block_type": kinds}, divisor=1, layers=4, experts=None, tp_size=2) == {
        "layers_block_type": kinds[:4]
    }
    attribute = ModuleAttribute(module="model.layers.2.attn", attribute="num_heads", values=(4, 4))
    assert num_layers_needed(plan_of({"h.{0..7}.w": "F32"}), {"n_layer": 8}) == 2
    odd = plan_of({"model.layers.{0..7}.w": "F32"}, module_attributes=(attribute,))
    assert num_layers_needed(odd, {"n_layer": 8}) == 3


def test_a_scaled_layout_has_as_many_units() -> None:
    heads = scaled_layout(cut(4096, 4, 128), (4096, 4096), (128, 128), 32)
    assert heads.sub_parameters == (SubParameter(size=128, unit=4),)
    assert heads.intervals == (((0, 32),), ((32, 64),), ((64, 96),), ((96, 128),))


def test_uneven_layouts_stay_uneven_and_equal_ones_equal() -> None:
    words = scaled_layout(cut(50257, 2), (50257, 4096), (257, 128), 32)
    assert words.intervals == (((0, 129),), ((129, 257),))
    features = scaled_layout(cut(11008, 3), (11008, 4096), (344, 128), 32)
    assert [stop for ((_, stop),) in features.intervals] == [115, 230, 344]
    fused = Layout(
        shape=(2 * 11008, 4096),
        dim=0,
        sub_parameters=(SubParameter(size=11008, unit=1),) * 2,
        intervals=tuple(((start, stop), (11008 + start, 11008 + stop)) for start, stop in divide(11008, 3)),
    )
    halves = scaled_layout(fused, fused.shape, (688, 128), 32)
    assert [first for first, _ in halves.intervals] == [first for (first,) in features.intervals]
    assert [(start - 344, stop - 344) for _, (start, stop) in halves.intervals] == [
        first for (first,) in features.intervals
    ]


def test_a_layout_in_a_view_is_scaled_with_the_parameter() -> None:
    flat = cut(10752, 2, dim=1, shape=(16, 10752, 6144))  # 16 experts of 10752 features, one after the other
    small = scaled_layout(flat, (16 * 10752, 6144), (5 * 336, 192), 32)
    assert (small.shape, small.intervals) == ((5, 336, 192), (((0, 168),), ((168, 336),)))


def test_a_layout_that_does_not_scale_is_refused() -> None:
    with pytest.raises(TwinError, match="cannot be sharded in the same places"):
        scaled_layout(cut(64, 8), (64, 4096), (4, 128), 16)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads, self.split_size = 8, width


def test_counts_stay_and_widths_scale_in_attributes_and_crossings() -> None:
    attributes = (
        ModuleAttribute(module="0", attribute="num_heads", values=(4, 4)),
        ModuleAttribute(module="0", attribute="split_size", values=(32, 32)),
        ModuleAttribute(module="7", attribute="num_heads", values=(4, 4)),
    )
    heads = Crossing(operation="split", dim=1, size=8, intervals=(((0, 4),), ((4, 8),)))
    rotated = Crossing(operation="copy", interval=(64, 96))
    modules = (PlannedModule(module="0", inputs={"alibi": heads}, output=rotated),)
    original, twin = nn.Sequential(Attention(64)), nn.Sequential(Attention(16))
    small = twin_plan(plan_of({}, module_attributes=attributes, modules=modules), original, twin, 4)
    assert [entry.values for entry in small.module_attributes] == [(4, 4), (8, 8)]
    assert small.modules[0].inputs == {"alibi": heads}
    assert small.modules[0].output == Crossing(operation="copy", interval=(16, 24))
