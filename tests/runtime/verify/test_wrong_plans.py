"""Plans that are wrong in the ways that models have been cut wrongly before: every one of them must be caught.

Each is sound by its own arithmetic. It either fails in the forward, or shows in the comparison with the dense model; a
forgotten gradient sum shows in gradients only.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch
from tests.helpers.paths import PRESETS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

Change = Callable[[Any], Any]


def rule(ending: str, **changes: Any) -> Change:
    """Change the preset's rule whose pattern contains `ending`; keys that are None go."""

    def change(preset: dict[str, Any]) -> None:
        found = [spec for spec in preset["layer_specs"] if any(ending in pattern for pattern in spec["patterns"])]
        assert found, ending
        for spec in found:
            spec.update(changes)
            for key in [key for key, value in spec.items() if value is None]:
                del spec[key]

    return change


def both(first: Change, second: Change) -> Change:
    """One change after the other."""

    def change(preset: dict[str, Any]) -> None:
        first(preset)
        second(preset)

    return change


def without(key: str) -> Change:
    """The preset without one of its sections."""

    def change(preset: dict[str, Any]) -> None:
        assert preset.pop(key)

    return change


def inputs(**kept: Any) -> Change:
    """The preset's modules with these inputs only."""

    def change(preset: dict[str, Any]) -> None:
        for module in preset["modules"]:
            if "inputs" in module:
                module["inputs"] = kept

    return change


def plan_without(**changes: Any) -> Change:
    """The plan's parameters with these fields."""

    def change(plan: Any) -> Any:
        parameters = [
            dataclasses.replace(entry, **{k: v for k, v in changes.items() if getattr(entry, k)})
            for entry in plan.parameters
        ]
        assert tuple(parameters) != plan.parameters
        return dataclasses.replace(plan, parameters=tuple(parameters))

    return change


def built_from_fewer_heads(preset: dict[str, Any]) -> None:
    """The ALiBi table made for the rank's own number of heads, as DeepSpeed's AutoTP does."""
    heads = next(iter(preset["module_attributes"][0]["attributes"]))
    preset["module_attributes"].append({"patterns": ["transformer$"], "attributes": {"num_heads": "share(num_heads)"}})
    del preset["modules"]
    assert heads


CONCATENATED = {"shape": [3, -1], "unit": "head_dim"}
CONTIGUOUS = {"shape": None, "unit": None, "indivisible": None}
HALVES = {"shape": None, "unit": None}
WRONG: dict[str, tuple[str, Change]] = {
    "gpt_neox: qkv as [Q; K; V]": ("gpt_neox", rule("query_key_value", **CONCATENATED)),
    "bloom: qkv as [Q; K; V]": ("bloom", rule("query_key_value", **CONCATENATED)),
    "falcon with ALiBi: qkv as [Q; K; V]": ("falcon_alibi", rule("query_key_value", **CONCATENATED)),
    "gpt_bigcode, multi-head: qkv as [Q; K; V]": (
        "gpt_bigcode_multi_head", rule("c_attn", indivisible="error", **CONCATENATED),
    ),
    "falcon, grouped: qkv as [Q; K; V]": (
        "falcon_grouped",
        rule("query_key_value", shape=[["hidden_size", "num_kv_heads * head_dim", "num_kv_heads * head_dim"], -1],
             unit=["group * head_dim", "head_dim", "head_dim"]),
    ),
    "gpt2: qkv contiguous": ("gpt2", rule("c_attn", shape=[-1, -1], unit=None)),
    "mpt: qkv contiguous": ("mpt", rule("Wqkv", **CONTIGUOUS)),
    "dbrx: qkv contiguous": ("dbrx", rule("Wqkv", **CONTIGUOUS)),
    "codegen: qkv contiguous": ("codegen", rule("qkv_proj", **CONTIGUOUS)),
    "codegen: qkv as three": ("codegen", rule("qkv_proj", shape=[3, -1])),
    "phi3: qkv as three": ("phi3_two_kv_heads", rule("qkv_proj", shape=[3, -1], unit=None, indivisible=None)),
    "phi3: qkv contiguous": ("phi3", rule("qkv_proj", **CONTIGUOUS)),
    "phi3: gate_up contiguous": ("phi3", rule("gate_up_proj", **HALVES)),
    "glm: gate_up contiguous": ("glm", rule("gate_up_proj", **HALVES)),
    "mixtral: gate_up contiguous": ("mixtral", rule("gate_up_proj", **HALVES)),
    "llama4: gate_up contiguous": ("llama4_text", rule("gate_up_proj", **HALVES)),
    "gpt_oss: gate_up as [gate; up]": (
        "gpt_oss", rule("gate_up_proj$", shape=[-1, -1, ["intermediate_size", "intermediate_size"]], unit=1),
    ),
    "gpt_oss: the bias of the experts on every rank": (
        "gpt_oss", plan_without(add_once=False, partial_gradient=False),
    ),
    "dbrx: experts one above the other cut in the middle": (
        "dbrx", rule("experts", shape=None, partition_dim=0),
    ),
    "olmo2: the norm of a rank's own width": ("olmo2", without("modules")),
    "olmo2: the norm whole": (
        "olmo2",
        both(rule("_norm", partition_type="skip", shape=None, unit=None, indivisible=None), without("modules")),
    ),
    "bloom: ALiBi for fewer heads": ("bloom", built_from_fewer_heads),
    "bloom, six heads: ALiBi for fewer heads": ("bloom_six_heads", built_from_fewer_heads),
    "mpt: ALiBi for fewer heads": ("mpt", built_from_fewer_heads),
    "falcon: ALiBi for fewer heads": ("falcon_alibi", built_from_fewer_heads),
    "falcon, multi-query: qkv contiguous": ("falcon_multi_query", rule("query_key_value", **CONTIGUOUS)),
    "gpt_bigcode, multi-query: qkv contiguous": ("gpt_bigcode_multi_query", rule("c_attn", **CONTIGUOUS)),
    "gpt_oss: sinks whole": ("gpt_oss", rule("sinks", partition_type="skip", shape=None, unit=None)),
    "cohere: norms of heads whole": (
        "cohere_qk_norm", rule("_norm", partition_type="skip", shape=None, unit=None, indivisible=None),
    ),
    **{
        f"{variant}: head counts whole": (variant, without("module_attributes"))
        for variant in ("phi3", "opt", "bloom", "falcon_grouped", "falcon_multi_query", "falcon_alibi", "codegen",
                        "gpt2", "gpt_bigcode_multi_query", "gpt_bigcode_multi_head", "mpt", "dbrx")
    },
}  # fmt: skip
"""Wrong logits, or an error in the forward."""

GRADIENTS: dict[str, tuple[str, Change]] = {
    **{
        f"{variant}: norms of heads not summed": (variant, plan_without(partial_gradient=False))
        for variant in ("qwen3", "qwen3_moe", "gemma3_text", "phi_qk_layernorm")
    },
    **{
        f"{variant}: the shared key not summed": (variant, rule_modules)
        for variant in ("deepseek_v2", "deepseek_v3")
        for rule_modules in [lambda preset: preset["modules"].pop()]
    },
    **{
        f"{variant}: routing weights not summed": (variant, inputs(hidden_states="copy"))
        for variant in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe", "dbrx")
    },
}
"""Right logits, wrong gradients."""

UNSUMMED = {"falcon_multi_query": "query_key_value", "gpt_bigcode_multi_query": "c_attn"}
"""Shared K and V rows whose gradients are not summed over the ranks that share them, and whose parameter shows it."""
CHANGED_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom_six_heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "phi3_two_kv_heads": ("phi3", {"num_key_value_heads": 2}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, the dense numbers and a wrong plan for each case."""
    import torch

    from autotp_plan.planner import SpecFile, compile_plan, compiler
    from tests.helpers import parity
    from tests.helpers.models import load_dense, save_checkpoint

    work = tmp_path_factory.mktemp("wrong")
    cases = {**WRONG, **GRADIENTS}
    for variant in {variant for variant, _ in cases.values()} | set(UNSUMMED):
        name, changes = CHANGED_CONFIGS.get(variant, (variant, {}))
        save_checkpoint(work / variant, name, **changes)
        dense = load_dense(work / variant, torch.float64, experts_implementation="eager")
        torch.save(parity.gradients(dense), work / f"{variant}.dense")
        (work / f"{variant}.json").write_text(compile_plan(work / variant, tp_size=2).to_json())
    for case, (variant, change) in cases.items():
        right = compile_plan(work / variant, tp_size=2)
        preset = json.loads((PRESETS / f"{right.model.model_type}.json").read_text())
        if change.__qualname__.startswith("plan_without"):
            wrong = change(right)
        else:
            preset = copy.deepcopy(preset)
            change(preset)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compiler, "check_plan", lambda plan: [])  # some are refused here already
                rules = wrong_rules(preset, SpecFile)
                wrong = compile_plan(work / variant, tp_size=2, preset="none", specs=[rules])
        assert (wrong.layouts, wrong.parameters, wrong.modules, wrong.module_attributes) != (
            right.layouts, right.parameters, right.modules, right.module_attributes,
        ), f"{case} is not wrong"  # fmt: skip
        (work / f"{file_name(case)}.json").write_text(wrong.to_json())
    return work


def wrong_rules(preset: dict[str, Any], spec_file: Any) -> Any:
    """A preset's text as a spec file of one's own, which is held against nothing."""
    for spec in preset["layer_specs"]:
        spec["optional"] = True
    preset["module_attributes"] = preset.get("module_attributes", [])
    return spec_file.from_dict(preset)


def file_name(case: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in case)


def in_ranks(work: Path) -> dict[str, dict[str, float]]:
    """Inside a rank: the errors of every wrong plan; an exception is an infinite one."""
    from autotp_plan.runtime.tensor_parallel import sharded_params
    from tests.helpers import parity

    found: dict[str, dict[str, float]] = {}
    for case, (variant, _) in {**WRONG, **GRADIENTS}.items():
        try:
            plan = work / f"{file_name(case)}.json"
            found[case] = parity.compare_sharded(plan, work / variant, work / f"{variant}.dense")
        except Exception as error:  # whatever a forward raises on shapes that do not fit
            found[case] = {f"{type(error).__name__}: {error}": float("inf")}
    summed = sharded_params._sum_over_replicas
    sharded_params._sum_over_replicas = lambda gradient, **_: gradient
    for variant in UNSUMMED:
        found[variant] = parity.compare_sharded(work / f"{variant}.json", work / variant, work / f"{variant}.dense")
    sharded_params._sum_over_replicas = summed
    return found


@pytest.fixture(scope="module")
def errors(work: Path) -> dict[str, dict[str, float]]:
    return launch(in_ranks, 2, work, timeout=300)[0]


@pytest.mark.parametrize("case", list(WRONG))
def test_plans_with_wrong_layouts_or_attributes_have_wrong_logits_or_raise(
    errors: dict[str, dict[str, float]], case: str
) -> None:
    found = errors[case]
    seen = max(error for name, error in found.items() if name.startswith("logits") or error == float("inf"))
    assert seen > 1e-3, f"{case} went unnoticed: {seen}"


@pytest.mark.parametrize("case", list(GRADIENTS))
def test_plans_that_forget_a_sum_have_wrong_gradients_only(errors: dict[str, dict[str, float]], case: str) -> None:
    found = errors[case]
    assert max(error for name, error in found.items() if name.startswith(("logits", "loss"))) < 1e-9, "logits are exact"
    assert max(found.values()) > 1e-4, f"{case} went unnoticed: {max(found.values())}"


@pytest.mark.parametrize("variant", list(UNSUMMED))
def test_gradients_of_shared_rows_that_are_not_summed_are_wrong_there_only(
    errors: dict[str, dict[str, float]], variant: str
) -> None:
    found = errors[variant]
    wrong = {name for name, error in found.items() if error > 1e-6}
    assert wrong and all(UNSUMMED[variant] in name for name in wrong), wrong
