"""Inference for models that are not from transformers: the function's arguments are their config."""

from __future__ import annotations

from typing import Any

import pytest

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.inference.infer import infer_module_spec, infer_rules
from autotp_plan.planner import compile_plan
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.paths import EXAMPLES, ROOT
from tests.inference.test_infer import Unproven, facts

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = "tests.helpers.own_models"


def planned(factory: ModuleFactory, tp_size: int = 2, **options: Any) -> Plan:
    return compile_plan(
        None, tp_size=tp_size, factory=factory, infer=infer_rules, prove=lambda _: Unproven(), **options
    )


def styles(plan: Plan) -> dict[str, str]:
    return {entry.name: entry.style for entry in plan.parameters if entry.style != "replicated"}


def test_the_example_is_planned_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_model"))
    factory = ModuleFactory(name="gpt:GPT")
    by_hand = SpecFile.read(ROOT / "tests" / "helpers" / "own_gpt_spec.json")
    for tp_size in (2, 4):
        expected = compile_plan(factory.on_meta(), tp_size=tp_size, specs=[by_hand])
        assert facts(planned(factory, tp_size)) == facts(expected)


def test_fused_weights_and_attributes_of_any_name() -> None:
    spec = infer_module_spec(ModuleFactory(name=f"{OWN}:Nano"))
    (qkv,) = (rule for rule in spec["layer_specs"] if "c_attn" in rule["patterns"][0])
    assert qkv["shape"] == [["n_embd"] * 3, -1] and qkv["unit"] == "head_dim"
    assert spec["symbols"] == {"head_dim": "n_embd // n_head"} and spec["defaults"]["n_embd"] == 96
    (attributes,) = spec["module_attributes"]
    assert attributes["attributes"] == {"n_head": "share(n_head)", "n_embd": "share(n_head) * head_dim"}
    assert "model_types" not in spec


def test_a_table_that_is_read_by_a_function_stays_whole_and_norms_of_heads_are_summed() -> None:
    plan = planned(ModuleFactory(name=f"{OWN}:gated"))
    assert not any("table" in name for name in styles(plan))
    assert styles(plan)["layers.{0..1}.wk.weight"] == "column"
    assert [entry.name for entry in plan.parameters if entry.partial_gradient] == ["layers.{0..1}.q_norm.weight"]


def test_what_holds_for_one_kind_of_layers_only_is_left_whole() -> None:
    """Layers with further parameters are asked too, and a rule is for all that it names."""
    found = styles(planned(ModuleFactory(name=f"{OWN}:Carried")))
    assert found["layers.{0..2}.w1.weight"] == "column" and not any("routers" in name for name in found)


def test_a_model_of_one_size_is_written_in_numbers() -> None:
    spec = infer_module_spec(ModuleFactory(name=f"{OWN}:frames"))
    assert spec["symbols"] == {"num_heads": 4, "head_dim": 12}
    assert styles(planned(ModuleFactory(name=f"{OWN}:frames"))) == {
        "blocks.{0..1}.c_attn.weight": "column", "blocks.{0..1}.c_attn.bias": "column",
        "blocks.{0..1}.c_fc.weight": "column", "blocks.{0..1}.c_fc.bias": "column",
        "blocks.{0..1}.c_proj.weight": "row", "blocks.{0..1}.c_out.weight": "row",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Nano", "gated"])
def test_the_spec_file_holds_for_other_sizes(name: str) -> None:
    """Inferred from a small model, it plans the large one as what is inferred from that does, and the reverse."""
    large = {"Nano": {"n_embd": 1536, "n_head": 12, "n_layer": 8, "vocab_size": 50304},
             "gated": {"dim": 2048, "n_heads": 16, "n_kv_heads": 8, "ffn_dim": 5632, "depth": 6}}[name]  # fmt: skip
    one, other = ModuleFactory(name=f"{OWN}:{name}"), ModuleFactory(name=f"{OWN}:{name}", arguments=large)
    for factory in (one, other):
        found = []
        for source in (one, other):
            spec = infer_module_spec(source)
            spec["defaults"] |= {key: factory.config()[key] for key in spec["defaults"]}
            rules = SpecFile.from_dict(spec)
            found.append(facts(compile_plan(None, tp_size=2, factory=factory, specs=[rules])))
        assert found[0] == found[1]


def test_what_is_refused_names_what_was_tried() -> None:
    with pytest.raises(AutoTPError, match=r"25653248 parameters is too large(.|\n)*--small"):
        planned(ModuleFactory(name=f"{OWN}:too_large"))
    with pytest.raises(AutoTPError, match="no weights were found that can be sharded"):
        planned(ModuleFactory(name=f"{OWN}:Convolution"))
    with pytest.raises(AutoTPError, match="needs graph too"):
        planned(ModuleFactory(name=f"{OWN}:Uncounted"))
    with pytest.raises(AutoTPError, match="no way to infer"):
        compile_plan(None, tp_size=2, factory=ModuleFactory(name=f"{OWN}:Nano"))


def test_small_sizes_that_are_given_help() -> None:
    large = {"sizes": [80, 2048], "heads": 16}
    with pytest.raises(AutoTPError, match="--small"):
        planned(ModuleFactory(name=f"{OWN}:blocks_of_sizes", arguments=large))
    plan = planned(ModuleFactory(name=f"{OWN}:blocks_of_sizes", arguments=large, small=({"sizes": [12, 96]},)))
    assert styles(plan)["blocks.{0..1}.c_fc.weight"] == "column"


def test_a_users_rule_comes_first() -> None:
    rules = SpecFile.from_dict({"layer_specs": [{"patterns": ["(wte|lm_head)\\."], "partition_type": "skip"}]})
    plan = planned(ModuleFactory(name=f"{OWN}:Nano"), specs=[rules])
    assert not any("wte" in name or "lm_head" in name for name in styles(plan))
    assert styles(plan)["h.{0..2}.c_attn.weight"] == "column"


@pytest.mark.parametrize(
    ("name", "sharded", "whole"),
    [
        ("Encoder", ["blocks.{0..1}.c_fc.weight"], ["encoder.layers.{0..1}.linear1.weight"]),
        ("Sparsely", ["mixtures.{0..1}.experts.{0..3}.down.weight"], ["mixtures.{0..1}.router.weight"]),
        ("of_transformers", ["model.layers.{0..1}.self_attn.k_proj.weight", "lm_head.weight"], []),
    ],
)
def test_other_ways_to_write_a_model(name: str, sharded: list[str], whole: list[str]) -> None:
    """torch's encoder, whose fused path reads weights past their layers; experts one by one; a cache."""
    plan = planned(ModuleFactory(name=f"{OWN}:{name}"))
    assert not set(sharded) - styles(plan).keys() and not set(whole) & styles(plan).keys()
    assert not set(whole) - {entry.name for entry in plan.parameters}


def test_layers_that_are_passed_by_without_gradients_stay_whole() -> None:
    spec = infer_module_spec(ModuleFactory(name=f"{OWN}:Shortcut"))
    assert "without gradients blocks.0.c_out is passed by" in spec["description"]
    assert not any(rule["partition_type"] != "skip" for rule in spec["layer_specs"] if "c_fc" in rule["patterns"][0])
