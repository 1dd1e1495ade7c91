"""The `tp_plan` of a model of one's own: `config.base_model_tp_plan` and `_tp_plan`, as DeepSpeed reads them.

That such a plan computes what the dense model does, and has DeepSpeed's shards, is in
tests/planner/deepspeed/test_partition_configs.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autotp_plan.planner import Plan, SpecFile, compile_plan
from autotp_plan.planner.deepspeed.read_config import parse_section
from autotp_plan.schemas.errors import CompileError
from tests.planner.deepspeed.test_partition_configs import TP_PLAN, Decoder

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 128,
}  # fmt: skip


class OwnConfig(LlamaConfig):  # type: ignore[misc]
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):  # type: ignore[misc]
    """Not of transformers, as far as one can know: its class is defined here."""

    config_class = OwnConfig


def cuts(plan: Plan) -> list[Any]:
    return [(one.name, plan.layouts[one.layout].intervals, one.style, one.gather_output) for one in plan.expanded()]


def styles(plan: Plan) -> dict[str, str]:
    return {entry.name.removeprefix("layers.{0..1}."): entry.style for entry in plan.parameters}


def refusal(model: Any, **options: Any) -> str:
    with pytest.raises(CompileError) as caught:
        compile_plan(model, tp_size=2, **options)
    return str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_model_of_ones_own_is_planned_as_its_family(tied: bool) -> None:
    """Its tp_plan is Llama's, and its own config and class carry it."""
    with torch.device("meta"):
        own = OwnModel(OwnConfig(**SMALL, tie_word_embeddings=tied))
        llama = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    own.tie_weights()
    llama.tie_weights()
    plan = compile_plan(own, tp_size=2)
    assert cuts(plan) == cuts(compile_plan(llama, tp_size=2))
    assert {str(entry.rule).partition(" #")[0] for entry in plan.parameters} == {
        "tp_plan of the model",
        "default for 1-D",
    }
    assert "the model's own tp_plan, and are not proven" in plan.notes[0]


def test_keys_match_the_ends_of_names_and_the_class_counts_too() -> None:
    class WithPlan(Decoder):
        _tp_plan: ClassVar = {
            "lm_head": "colwise_rep",
            "mlp.gate_up_proj": "packed_colwise",
            "layers.*.mlp.down_proj": "rowwise",
        }

    plan = compile_plan(WithPlan(tp_plan={key: TP_PLAN[key] for key in TP_PLAN if key != "lm_head"}), tp_size=2)
    found = styles(plan)
    assert found["mlp.gate_up_proj.weight"] == found["self_attn.q_proj.weight"] == found["lm_head.weight"] == "column"
    assert found["mlp.down_proj.weight"] == found["self_attn.o_proj.weight"] == "row"
    (q_norm,) = (one for one in plan.parameters if one.name.endswith("q_norm.weight"))
    assert q_norm.partial_gradient
    subs = {one.name: plan.layouts[one.layout].sub_parameters for one in plan.parameters}
    assert [sub.size for sub in subs["layers.{0..1}.mlp.gate_up_proj.weight"]] == [48, 48]
    assert [sub.unit for sub in subs["layers.{0..1}.self_attn.q_proj.weight"]] == [8], "whole heads"


def test_what_it_does_not_name_stays_whole_and_is_counted() -> None:
    plan = compile_plan(Decoder(tp_plan=TP_PLAN), tp_size=2)
    found = styles(plan)
    assert found["mlp.down_proj.weight"] == found["embed_tokens.weight"] == "replicated"
    held = 4 * (64 * 32 + 2 * 3 * 48 * 32)
    assert f"5 parameters, {held} bytes" in plan.notes[1]
    assert "no rule decides a weight" in refusal(Decoder(tp_plan=TP_PLAN), strict=True)


def test_a_tied_embedding_goes_with_a_gathered_head() -> None:
    plan = compile_plan(Decoder(tp_plan=TP_PLAN, tied=True), tp_size=2)
    assert styles(plan)["embed_tokens.weight"] == "vocab"
    assert [(tie.name, tie.style, tie.gather_output) for tie in plan.tied] == [("lm_head.weight", "column", True)]


MLP = ("mlp.gate_up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("changes", "name", "style"),
    [
        ({MLP[0]: "packed_colwise", MLP[1]: "rowwise"}, "mlp.down_proj.weight", "row"),
        ({"lm_head": "colwise_rep"}, "lm_head.weight", "column"),
        ({"lm_head": "rowwise_split_input"}, "lm_head.weight", "row"),
        ({"lm_head": "rowwise_rep"}, "lm_head.weight", "row"),
        ({"lm_head": "replicated"}, "lm_head.weight", "replicated"),
        ({"lm_head": "replicate"}, "lm_head.weight", "replicated"),
        ({"embed_tokens": "embedding_rowwise"}, "embed_tokens.weight", "vocab"),
    ],
)
def test_every_style_that_is_understood(changes: dict[str, str], name: str, style: str) -> None:
    assert styles(compile_plan(Decoder(tp_plan={**TP_PLAN, **changes}), tp_size=2))[name] == style


@pytest.mark.parametrize(
    "style", ["sequence_parallel", "ep_router", "grouped_gemm", "moe_identity_expert", "gather", "local_colwise", "x"]
)
def test_every_other_style_is_refused_by_name(style: str) -> None:
    text = refusal(Decoder(tp_plan={**TP_PLAN, "layers.*.norm1": style}))
    assert f"styles that are not understood: {style}" in text and "--spec" in text


def test_what_may_have_a_partial_gradient_must_be_named() -> None:
    """DeepSpeed trains it with wrong gradients. Each way out that the error names is taken."""
    without = {key: style for key, style in TP_PLAN.items() if "q_norm" not in key}
    text = refusal(Decoder(tp_plan=without))
    assert "q_norm.weight" in text and "the model's own tp_plan has no rule for it" in text
    by_spec = SpecFile.from_dict(
        {"layer_specs": [{"patterns": [r".*q_norm\..*"], "partition_type": "skip", "grad_allreduce": True}]}
    )
    for plan in (
        compile_plan(Decoder(tp_plan=without), tp_size=2, specs=[by_spec]),
        compile_plan(Decoder(tp_plan=TP_PLAN), tp_size=2),
    ):
        assert [one.partial_gradient for one in plan.parameters if "q_norm" in one.name] == [True, True]
    plan = compile_plan(Decoder(tp_plan={**without, "q_norm": "replicated"}), tp_size=2)
    assert [one.partial_gradient for one in plan.parameters if "q_norm" in one.name] == [False, False]


def test_attributes_that_count_heads_are_divided_as_deepspeed_does() -> None:
    options = {"tp_plan": TP_PLAN, "counted": True}
    for tp_size, wanted in ((2, (4, 2, 32)), (4, (2, 1, 16))):
        found = compile_plan(Decoder(**options), tp_size=tp_size).module_attributes
        assert {one.module for one in found} == {"layers.{0..1}.self_attn"}
        counts = dict(zip(("num_heads", "num_kv_heads", "embed_dim"), wanted))
        assert {one.attribute: one.values for one in found} == {key: (n,) * tp_size for key, n in counts.items()}
    assert not compile_plan(Decoder(tp_plan=TP_PLAN), tp_size=2).module_attributes


def test_half_of_an_attention_module_is_refused() -> None:
    without = {key: style for key, style in TP_PLAN.items() if "o_proj" not in key}
    assert "no row-parallel layer consumes it" in refusal(Decoder(tp_plan=without))


def test_a_partition_config_without_default_specs_does_not_read_it() -> None:
    """And one with them is completed by it; DeepSpeed reads either the one or the other."""
    mlp = [
        {"patterns": [r".*gate_up_proj\.weight$"], "shape": [2, -1]},
        {"patterns": [r".*down_proj\.weight$"], "partition_type": "row"},
    ]
    for use, expected in ((False, "replicated"), (True, "column")):
        section = parse_section({"partition_config": {"use_default_specs": use, "layer_specs": mlp}})
        found = styles(compile_plan(Decoder(tp_plan=TP_PLAN), tp_size=2, deepspeed=section))
        assert (found["mlp.gate_up_proj.weight"], found["self_attn.q_proj.weight"]) == ("column", expected)


def test_a_model_without_a_tp_plan_needs_rules() -> None:
    assert "no rule decides a weight" in refusal(Decoder())
