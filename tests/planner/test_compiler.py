"""Compiling: which rule decides, and everything that is wrong told at once, each with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.planner.deepspeed.read_config import TensorParallelSection, parse_section
from autotp_plan.planner.plan_table import as_json
from autotp_plan.planner.rules.preset_files import preset_names, read_preset
from autotp_plan.schemas.errors import AutoTPError, CompileError, Fault, OptionError
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint, write_llama


def rules(*specs: dict[str, Any], **rest: Any) -> SpecFile:
    return SpecFile.from_dict({"layer_specs": list(specs), **rest})


def rule(pattern: str, partition_type: str = "column", **rest: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": partition_type, **rest}


def faults_of(folder: Any, tp_size: int = 2, error: type[AutoTPError] = CompileError, **options: Any) -> list[Fault]:
    with pytest.raises(error) as caught:
        compile_plan(folder, tp_size=tp_size, **options)
    assert list(caught.value.faults) == sorted(caught.value.faults, key=lambda fault: (fault.where, fault.what))
    for fault in caught.value.faults:
        assert fault.what and fault.where and fault.expected and fault.next, f"{fault} has no way out"
    return list(caught.value.faults)


def whats(faults: Sequence[Fault]) -> list[tuple[str, str]]:
    return [(fault.where, fault.what) for fault in faults]


def of(plan: Plan, name: str) -> dict[str, Any]:
    (found,) = (entry for entry in as_json(plan)["parameters"] if entry["name"] == name)
    return found


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a checkpoint of `{name: shape}` with a config; `make()` is a small Llama."""

    def write(shapes: Any = None, config: Any = None, **changes: Any) -> Path:
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        if shapes is None:
            return write_llama(folder, **changes)
        return write_checkpoint(folder, shapes, config, **changes)

    return write


# what decides


def test_a_llama_by_its_preset(make: Make) -> None:
    plan = compile_plan(make(), tp_size=2)
    assert [(entry.name, entry.style, str(entry.rule)) for entry in plan.parameters] == [
        ("lm_head.weight", "column", "preset llama vocabulary #2"),
        ("model.embed_tokens.weight", "vocab", "preset llama vocabulary #1"),
        ("model.layers.{0..1}.input_layernorm.weight", "replicated", "default for 1-D"),
        ("model.layers.{0..1}.mlp.down_proj.weight", "row", "preset llama #5"),
        ("model.layers.{0..1}.mlp.gate_proj.weight", "column", "preset llama #4"),
        ("model.layers.{0..1}.mlp.up_proj.weight", "column", "preset llama #4"),
        ("model.layers.{0..1}.post_attention_layernorm.weight", "replicated", "default for 1-D"),
        ("model.layers.{0..1}.self_attn.k_proj.weight", "column", "preset llama #2"),
        ("model.layers.{0..1}.self_attn.o_proj.weight", "row", "preset llama #3"),
        ("model.layers.{0..1}.self_attn.q_proj.weight", "column", "preset llama #1"),
        ("model.layers.{0..1}.self_attn.v_proj.weight", "column", "preset llama #2"),
        ("model.norm.weight", "replicated", "default for 1-D"),
    ]
    assert of(plan, "model.layers.1.self_attn.o_proj.weight")["intervals"] == [[[0, 16]], [[16, 32]]]
    assert of(plan, "model.layers.1.self_attn.o_proj.weight")["dim"] == 1
    assert of(plan, "model.norm.weight")["dim"] is None
    assert plan.model.architecture == "LlamaForCausalLM"
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


def test_sources_in_order_of_precedence(make: Make) -> None:
    folder = make()
    first = rules(rule(r".*gate_proj\.weight$", "skip"), rule(r".*down_proj\.weight$", "skip"))
    named = rules(rule(r".*(up|gate)_proj\.weight$", "skip"), name="mine")
    section = parse_section(
        {"partition_config": {"layer_specs": [rule(r".*(q|k|v|o|up)_proj\.weight$", "skip"),
                                              rule(r".*nothing$", optional=True)]}}
    )  # fmt: skip
    plan = compile_plan(folder, tp_size=2, specs=[first, named], deepspeed=section)
    decided = {entry.name.split(".")[-2]: str(entry.rule) for entry in plan.parameters}
    assert decided["gate_proj"] == "spec file 1 #1"
    assert decided["up_proj"] == "spec mine #1"
    assert decided["q_proj"] == "ds-config #1"
    assert decided["embed_tokens"] == "preset llama vocabulary #1"
    alone = rules(rule(r".*\.(self_attn|mlp)\..*weight$", "skip"))
    assert {str(entry.rule) for entry in compile_plan(folder, tp_size=2, specs=[alone]).parameters} >= {"spec file #1"}


def test_presets_none_auto_named_and_mismatched(make: Make) -> None:
    folder = make()
    assert compile_plan(folder, tp_size=2, preset="llama") == compile_plan(folder, tp_size=2, preset="auto")
    (fault,) = faults_of(folder, preset="lama")
    assert (fault.what, fault.next) == ("there is no such preset", 'did you mean "llama"?')
    assert fault.expected == "auto, none, infer, " + ", ".join(preset_names())
    (fault,) = faults_of(folder, preset="qwen2")
    assert (fault.what, fault.next) == ("the preset is not for this model", "use --preset auto or --preset llama")
    undecided = faults_of(folder, preset="none")
    assert {fault.what for fault in undecided} == {"no rule decides a weight"}
    assert undecided == faults_of(make(model_type="somebody_elses"))
    plan = compile_plan(make(model_type="somebody_elses"), tp_size=2, preset="llama")
    assert plan.notes == ("Preset llama was made for model_type llama; this model is somebody_elses.",)
    nameless = write_checkpoint(folder.parent / "nameless", llama_shapes(), None)
    assert {fault.what for fault in faults_of(nameless, preset="llama")} == {"the number of layers is not known"}
    everything = rules(rule(".*", "skip"))
    plan = compile_plan(nameless, tp_size=3, preset="none", specs=[everything])
    assert {entry.style for entry in plan.parameters} == {"replicated"}
    assert (plan.model.model_type, plan.model.config) == (None, None)


def test_use_default_specs_false_leaves_the_preset_its_vocabulary(make: Make) -> None:
    spec = rules(
        rule(r".*\.([qkv]|gate|up)_proj\.weight$"),
        rule(r".*\.(o|down)_proj\.weight$", "row"),
        use_default_specs=False,
    )
    folder = make()
    plan = compile_plan(folder, tp_size=4, specs=[spec])
    assert {str(entry.rule).split(" #")[0] for entry in plan.parameters} == {
        "spec file", "preset llama vocabulary", "default for 1-D"
    }  # fmt: skip
    half = rules(rule(r".*q_proj\.weight$"), use_default_specs=False)
    assert {f.what for f in faults_of(folder, specs=[half])} == {"no rule decides a weight"}


def test_what_a_preset_knows_holds_even_where_it_does_not_decide(make: Make) -> None:
    """Four KV heads over eight ranks: an even cut of the rows would halve heads, and nobody would notice."""
    spec = rules(
        rule(r".*\.([qkv]|gate|up)_proj\.weight$"),
        rule(r".*\.(o|down)_proj\.weight$", "row"),
        use_default_specs=False,
    )
    found = {fault.where.split(" ")[0].split(".")[-2]: fault for fault in faults_of(make(), 8, specs=[spec])}
    assert set(found) == {"k_proj", "v_proj"}
    assert found["k_proj"].got == "4 KV heads of 4 rows over 8 ranks"
    assert found["k_proj"].next == "TP sizes that work for the whole model: 1, 2, 4"


def test_one_rule_for_weights_of_one_shape_and_different_units(make: Make) -> None:
    """gate_proj may be cut anywhere, q_proj between heads only, though one rule decides both and they look alike."""
    spec = rules(rule(r".*(gate|up|q)_proj\.weight$"))
    folder = make(intermediate_size=32, num_key_value_heads=8)
    refused = {fault.where.split(".")[-2] for fault in faults_of(folder, 16, specs=[spec])}
    assert "q_proj" in refused and not refused & {"gate_proj", "up_proj"}


def test_a_row_rule_for_an_embedding_cuts_its_vocabulary(make: Make) -> None:
    plan = compile_plan(make(), tp_size=2, specs=[rules(rule(r".*embed_tokens\.weight$", "row"))])
    embedding = of(plan, "model.embed_tokens.weight")
    assert (embedding["style"], embedding["dim"], embedding["rule"]) == ("vocab", 0, "spec file #1")


def test_model_types_filter_rules(make: Make) -> None:
    spec = rules(
        rule(r".*(gate|up|down)_proj\.weight$", "skip", model_types=["LLAMA"]),
        rule(r"matches nothing$", model_types=["qwen2"]),
    )
    plan = compile_plan(make(), tp_size=2, specs=[spec])
    assert {str(entry.rule) for entry in plan.parameters if "mlp" in entry.name} == {"spec file #1"}


def test_tp_size_comes_from_one_place(make: Make) -> None:
    folder = make()
    section = TensorParallelSection(tp_size=4)
    assert compile_plan(folder, deepspeed=section).tp_size == 4
    assert compile_plan(folder, tp_size=4, deepspeed=section).tp_size == 4
    with pytest.raises(OptionError, match="two different TP sizes"):
        compile_plan(folder, tp_size=2, deepspeed=section)
    with pytest.raises(OptionError, match="the TP size is missing"):
        compile_plan(folder)
    for wrong in (0, -1, 100_000):
        with pytest.raises(OptionError, match="the TP size makes no sense"):
            compile_plan(folder, tp_size=wrong)


# cuts


def test_fused_experts_are_sharded_in_a_view_with_their_bias(make: Make) -> None:
    """DeepSpeed's three-dimensional view of a two-dimensional weight, and a bias along with it."""
    config = {"num_experts": 4, "hidden_size": 5}
    shapes = {"experts.w1.weight": (24, 5), "experts.w1.bias": (24,), "experts.w2.weight": (20, 6)}
    spec = rules(
        rule(r"experts\.w1\.weight$", shape=["num_experts", -1, "hidden_size"], partition_dim=1),
        rule(r"experts\.w2\.weight$", "row", shape=["num_experts", "hidden_size", -1], partition_dim=2),
    )
    plan = compile_plan(make(shapes, config), tp_size=3, preset="none", specs=[spec])
    assert of(plan, "experts.w1.weight") == {
        "name": "experts.w1.weight", "shape": [24, 5], "dtype": "BF16", "style": "column", "rule": "spec file #1",
        "dim": 1, "view": [4, 6, 5], "intervals": [[[0, 2]], [[2, 4]], [[4, 6]]],
    }  # fmt: skip
    bias = of(plan, "experts.w1.bias")
    assert (bias["view"], bias["dim"], bias["intervals"]) == ([4, 6], 1, [[[0, 2]], [[2, 4]], [[4, 6]]])
    assert of(plan, "experts.w2.weight")["view"] == [4, 5, 6]


def test_biases_follow_their_weights(make: Make) -> None:
    shapes = {"up.weight": (8, 4), "up.bias": (8,), "down.weight": (4, 8), "down.bias": (4,), "alone.bias": (4,)}
    spec = rules(rule(r"up\.(weight|bias)$", unit=2), rule(r"down\.weight$", "row"))
    folder = make(shapes, {})
    (fault,) = faults_of(folder, specs=[spec])
    assert fault.what == "a row-parallel weight has no column-parallel output that is sharded the same way"
    spec = rules(rule(r"up\.(weight|bias)$", unit=2), rule(r"down\.weight$", "row", unit=2))
    plan = compile_plan(folder, tp_size=4, specs=[spec])
    assert of(plan, "up.bias")["intervals"] == of(plan, "up.weight")["intervals"]
    assert (of(plan, "up.bias")["style"], of(plan, "down.bias")["style"]) == ("column", "replicated")
    assert of(plan, "down.bias")["rule"] == "spec file #2"
    assert of(plan, "alone.bias")["rule"] == "default for 1-D"
    against = rules(rule(r"up\.bias$", "skip"), rule(r"up\.weight$"), rule(r"down\.weight$", "row"))
    (fault,) = faults_of(folder, specs=[against])
    assert (fault.where, fault.what) == (
        "up.bias (spec file #1)",
        "a rule shards a bias in another way than its weight",
    )
    misfit = make({"up.weight": (8, 4), "up.bias": (6,)}, {})
    assert whats(faults_of(misfit, specs=[rules(rule(r"up\.weight$"))])) == [
        ("up.bias", "a bias does not fit its weight")
    ]


def test_a_vocabulary_that_tp_does_not_divide_is_sharded_unevenly(make: Make) -> None:
    plan = compile_plan(make(vocab_size=63), tp_size=4)
    head = of(plan, "lm_head.weight")
    assert head["intervals"] == of(plan, "model.embed_tokens.weight")["intervals"]
    assert head["intervals"] == [[[0, 16]], [[16, 32]], [[32, 48]], [[48, 63]]]
    section = parse_section({"autotp_size": 4, "vocab_parallel_lm_head": False})
    plan = compile_plan(make(vocab_size=63), deepspeed=section)
    assert (of(plan, "lm_head.weight")["style"], of(plan, "model.embed_tokens.weight")["style"]) == ("replicated",) * 2


@pytest.mark.parametrize("tp_size", [3, 5, 6, 7, 8, 16])
def test_indivisible_sizes_say_the_sizes_that_work(make: Make, tp_size: int) -> None:
    folder = make(num_attention_heads=8, num_key_value_heads=4, intermediate_size=36)
    found = faults_of(folder, tp_size)
    works = {fault.next.split(":")[1].split(";")[0].strip() for fault in found if fault.code == "indivisible"}
    assert works == {"1, 2, 4"}
    for size in (1, 2, 4):
        compile_plan(folder, tp_size=size)


def test_module_attributes_are_resolved_for_each_rank(make: Make) -> None:
    spec = rules(
        module_attributes=[
            {"patterns": [r".*\.self_attn$"], "attributes": {"num_heads": "num_attention_heads // tp_size",
                                                            "first_head": "tp_rank * (num_heads // tp_size)"}},
            {"patterns": [r".*layers\.0\.self_attn$"], "attributes": {"num_heads": 1}},
        ]
    )  # fmt: skip
    plan = compile_plan(make(), tp_size=2, specs=[spec])
    assert [(found.module, found.attribute, found.values) for found in plan.module_attributes] == [
        ("model.layers.{0..1}.self_attn", "first_head", (0, 4)),
        ("model.layers.{0..1}.self_attn", "num_heads", (4, 4)),
    ]
    spec = rules(
        module_attributes=[
            {"patterns": [r".*\.self_atn$", "("], "attributes": {"a": "num_heads // tp_sise"}},
        ]
    )
    found = faults_of(make(), specs=[spec])
    assert whats(found) == [
        ("spec file module_attributes #1", "a pattern is not a regular expression"),
        ("spec file module_attributes #1", "a pattern matches no module that holds sharded weights"),
        ("spec file module_attributes #1", "a size cannot be resolved"),
    ]
    assert 'did you mean "tp_size"?' in found[-1].got


def test_the_first_source_sets_an_attribute(make: Make) -> None:
    specs = [
        rules(module_attributes=[{"patterns": [r".*\.self_attn$"], "attributes": {"num_heads": value}}])
        for value in (3, 4)
    ]
    plan = compile_plan(make(), tp_size=2, specs=specs)
    assert [found.values for found in plan.module_attributes] == [(3, 3)]


def test_optional_rules_may_match_nothing(make: Make) -> None:
    spec = rules(rule(r".*\.experts\..*", "skip", optional=True))
    compile_plan(make(), tp_size=2, specs=[spec])
    (fault,) = faults_of(make(), specs=[rules(rule(r".*\.experts\..*", "skip"))])
    assert (fault.where, fault.what, fault.got) == (
        "spec file #1",
        "a pattern matches no parameter",
        r".*\.experts\..*",
    )
    assert 'or mark the rule "optional": true' in fault.next
    (fault,) = faults_of(make(), specs=[rules(rule(r".*\.gate_proj$", "skip"))])
    assert fault.next.endswith(r"write .*\.gate_proj\.weight$")


def test_norms_of_heads_have_partial_gradients(make: Make) -> None:
    config = {**LLAMA_CONFIG, "model_type": "qwen3", "head_dim": 4}
    shapes = llama_shapes(config)
    for layer in range(2):
        for name in "qk":
            shapes[f"model.layers.{layer}.self_attn.{name}_norm.weight"] = (4,)
    plan = compile_plan(make(shapes, config), tp_size=2)
    partial = [entry.name for entry in plan.parameters if entry.partial_gradient]
    assert partial == ["model.layers.{0..1}.self_attn.k_norm.weight", "model.layers.{0..1}.self_attn.q_norm.weight"]


# ties and names on disk


def test_a_tied_head_is_a_tie_and_no_parameter(make: Make) -> None:
    plan = compile_plan(make(tie_word_embeddings=True), tp_size=2)
    (tie,) = plan.tied
    assert (tie.name, tie.to, tie.style, tie.gather_output) == (
        "lm_head.weight", "model.embed_tokens.weight", "column", True
    )  # fmt: skip
    assert "lm_head.weight" not in [entry.name for entry in plan.parameters]
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    twice = {"lm_head.weight": "model.embed_tokens.weight"}
    noted = compile_plan(make(llama_shapes(), config, tied=twice), tp_size=2)
    assert noted.notes == (
        "lm_head.weight is on disk but tied to model.embed_tokens.weight: only the latter is used.",
    )  # fmt: skip
    assert noted.parameters == plan.parameters
    apart = rules(rule(r"lm_head\.weight$", "skip"))
    (fault,) = faults_of(make(tie_word_embeddings=True), specs=[apart])
    assert (fault.where, fault.what) == ("lm_head.weight", "two names of one tied parameter are sharded differently")


def test_a_tie_never_loses_a_tensor(make: Make) -> None:
    for ties in ([{"name": "b", "to": "b"}], [{"name": "a", "to": "b"}, {"name": "b", "to": "a"}],
                 [{"name": "a", "to": "gone"}]):  # fmt: skip
        spec = rules(tied=ties)
        found = faults_of(make({"a": (2,), "b": (2,)}, {}), error=AutoTPError, specs=[spec])
        assert {fault.what for fault in found} == {"a tensor is tied to a parameter that the checkpoint lacks"}


NEOX = {
    "model_type": "gpt_neox", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 6,
    "intermediate_size": 16,
}  # fmt: skip
NEOX_SHAPES = {
    "gpt_neox.embed_in.weight": (6, 8), "gpt_neox.layers.0.attention.query_key_value.weight": (24, 8),
    "gpt_neox.layers.0.attention.query_key_value.bias": (24,), "gpt_neox.layers.0.attention.dense.weight": (8, 8),
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (16, 8), "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": (8, 16),
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,), "embed_out.weight": (6, 8),
}  # fmt: skip


def test_parameters_keep_the_names_they_have_on_disk(make: Make) -> None:
    plan = compile_plan(make(NEOX_SHAPES, NEOX), tp_size=2)
    (head,) = (entry for entry in plan.parameters if entry.name == "lm_head.weight")
    assert head.source == "embed_out.weight"
    assert plan.ignored == (
        "gpt_neox.layers.{0..0}.attention.bias", "gpt_neox.layers.{0..0}.attention.masked_bias",
        "gpt_neox.layers.{0..0}.attention.rotary_emb.inv_freq",
    )  # fmt: skip
    assert not any("inv_freq" in entry.name for entry in plan.parameters)
    qkv = of(plan, "gpt_neox.layers.0.attention.query_key_value.weight")
    assert qkv["intervals"] == [[[0, 12]], [[12, 24]]], "cut between heads, in one piece"
    both = {**NEOX_SHAPES, "lm_head.weight": (6, 8)}
    (fault,) = faults_of(make(both, NEOX), error=AutoTPError)
    assert (fault.where, fault.what) == ("lm_head.weight", "two tensors of the checkpoint are one parameter")


def test_ignored_tensors_of_a_users_own(make: Make) -> None:
    shapes = {"layers.0.w": (2, 2), "layers.0.table": (2, 2), "layers.1.w": (2, 2), "layers.1.table": (2, 2)}
    folder = make(shapes, {"n": 2})
    keep = rule(r".*\.w$", "skip")
    plan = compile_plan(folder, tp_size=2, specs=[rules(keep, ignored_tensors=["layers.*.table"], num_layers="n")])
    assert [entry.name for entry in plan.parameters] == ["layers.{0..1}.w"]
    (fault,) = faults_of(folder, specs=[rules(keep, ignored_tensors=["layers.*.table"])])
    assert fault.where == "ignored_tensors"


def test_a_live_module_needs_only_named_parameters_and_a_config() -> None:
    """Anything with named_parameters and a config will do; parameters that are one object are tied."""
    weights = {name: SimpleNamespace(shape=shape, dtype="torch.bfloat16") for name, shape in llama_shapes().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    ordered = {"model.embed_tokens.weight": weights.pop("model.embed_tokens.weight"), **weights}
    module = SimpleNamespace(
        named_parameters=lambda remove_duplicate: list(ordered.items()),
        named_modules=list,
        config=SimpleNamespace(to_json_string=lambda: json.dumps({**LLAMA_CONFIG, "tie_word_embeddings": True})),
    )
    plan = compile_plan(module, tp_size=2)
    assert [tie.to for tie in plan.tied] == ["model.embed_tokens.weight"]
    ordered["odd"] = SimpleNamespace(shape=(2,), dtype="torch.complex32")
    (fault,) = faults_of(module, error=AutoTPError)
    assert (fault.where, fault.what) == ("odd", "a parameter has a dtype that cannot be sharded")


# everything that is wrong, told together


def test_every_fault_is_told_at_once_folded_and_sorted(make: Make) -> None:
    shapes = {
        **{f"layers.{n}.{name}.weight": (8, 8) for n in range(3) for name in ("q", "o", "lost", "twice", "inside")},
        **{f"layers.{n}.odd.weight": (6, 8) for n in range(3)},
        **{f"layers.{n}.odd.bias": (6,) for n in range(3)},
    }
    spec = rules(
        rule(r".*\.q\.weight$", unit=2),
        rule(r".*\.o\.weight$", "row"),
        rule(r".*\.odd\.weight$"),
        rule(r".*\.twice\.weight$"),
        rule(r".*\.(twice|nothing)\.weight$", "row"),
        rule(r".*\.nothing\.weight$"),
        rule(r".*\.[.weight$"),
        rule(r".*\.inside\.weight$", unit=3),
        rule(r".*\.inside\.weight$", unit=3),
        rule(r".*\.absent$", shape=[["q_sise"], -1], optional=True),
        rule(r".*\.fused\.weight$", shape=[["q_size", "kv_sise"], -1]),
        rule(r".*\.norm$", "row", gather_output=True, optional=True),
        rule(r".*\.norm$", "column", grad_allreduce=True, optional=True),
        rule(r".*\.norm$", "vocab", partition_dim=1, optional=True),
        symbols={"q_size": "hidden_size", "kv_size": "hidden_size"},
    )
    fused = {f"layers.{n}.fused.weight": (16, 8) for n in range(3)}
    found = faults_of(make({**shapes, **fused}, {"hidden_size": 8}), 4, preset="none", specs=[spec])
    assert whats(found) == [
        ("layers.{0..2}.fused.weight (spec file #11)", "a size cannot be resolved"),
        ("layers.{0..2}.inside.weight (spec file #8)", "a sub-parameter is not whole units"),
        ("layers.{0..2}.lost.weight", "no rule decides a weight"),
        ("layers.{0..2}.odd.weight (spec file #3)", "a weight cannot be split evenly over the ranks"),
        ("layers.{0..2}.twice.weight", "two rules match one parameter and disagree"),
        ("spec file #12", "a rule contradicts itself"),
        ("spec file #13", "a rule contradicts itself"),
        ("spec file #14", "a rule contradicts itself"),
        ("spec file #6", "a pattern matches no parameter"),
        ("spec file #7", "a pattern is not a regular expression"),
    ]
    ways = {fault.where.split(" ")[0]: fault for fault in found}
    assert 'did you mean "kv_size"?' in ways["layers.{0..2}.fused.weight"].got
    assert r'{"patterns": ["layers\\.\\d+\\.lost\\.weight$"], "partition_type": "skip"}' in (
        ways["layers.{0..2}.lost.weight"].next
    )
    assert ways["layers.{0..2}.odd.weight"].next.startswith("TP sizes that work for the whole model: 1, 2;")


def test_the_suggested_rule_works(make: Make) -> None:
    folder = make({"layers.0.w.weight": (4, 4), "layers.1.w.weight": (4, 4)}, {})
    (fault,) = faults_of(folder, preset="none")
    suggested = json.loads(fault.next[fault.next.index("{") : fault.next.index("}") + 1])
    plan = compile_plan(folder, tp_size=2, preset="none", specs=[rules(suggested)])
    assert [entry.style for entry in plan.parameters] == ["replicated"]


def test_a_row_cut_unlike_the_column_that_feeds_it(make: Make) -> None:
    shapes = {"l.0.up.weight": (12, 4), "l.0.down.weight": (4, 12)}
    spec = rules(rule(r".*up\.weight$", unit=4, indivisible="uneven"), rule(r".*down\.weight$", "row"))
    (fault,) = faults_of(make(shapes, {}), specs=[spec])
    assert fault.where == "l.0.down.weight (spec file #2)"
    assert fault.what == "a row-parallel weight has no column-parallel output that is sharded the same way"
    assert "l.0.up.weight in [3] units" in fault.got


def test_rules_that_misread_a_fused_weight(make: Make) -> None:
    config = {**LLAMA_CONFIG, "model_type": "phi3"}
    shapes = {name: shape for name, shape in llama_shapes(config).items() if "proj" not in name or "o_proj" in name}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = (64, 32)
        shapes[f"model.layers.{layer}.mlp.gate_up_proj.weight"] = (96, 32)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (32, 48)
    folder = make(shapes, config)
    compile_plan(folder, tp_size=2)
    for use_default_specs in (True, False):
        spec = rules(
            rule(r".*qkv_proj\.weight$"),
            rule(r".*gate_up_proj\.weight$"),
            rule(r".*(o|down)_proj\.weight$", "row"),
            use_default_specs=use_default_specs,
        )
        found = faults_of(folder, specs=[spec])
        assert whats(found) == [
            (
                "model.layers.{0..1}.mlp.gate_up_proj.weight (spec file #2)",
                "a rule splits a fused weight in the wrong place",
            ),
            (
                "model.layers.{0..1}.self_attn.qkv_proj.weight (spec file #1)",
                "a rule splits a fused weight in the wrong place",
            ),
        ]
        assert found[1].expected == "[32, 16, 16] along dim 0 of [64, 32], as preset phi3 #1 knows the weight"


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": "2"}],
)
def test_a_number_of_layers_that_makes_no_sense(make: Make, changes: dict[str, Any]) -> None:
    folder = make(llama_shapes(), {**LLAMA_CONFIG, **changes})
    assert [fault.what for fault in faults_of(folder)] == ["the number of layers is not known"]


def test_layers_too_many_or_too_few_are_refused(make: Make) -> None:
    folder = make(llama_shapes(), {**LLAMA_CONFIG, "num_hidden_layers": 1})
    found = faults_of(folder)
    assert {fault.what for fault in found} == {"the model has more layers than its config says"}
    assert len(found) == 9
    shapes = llama_shapes()
    del shapes["model.layers.1.self_attn.q_proj.weight"]
    assert whats(faults_of(make(shapes, LLAMA_CONFIG))) == [
        ("model.layers.1.self_attn.q_proj.weight", "the model lacks a parameter that its other layers have")
    ]
    del shapes["model.layers.0.self_attn.q_proj.weight"]
    assert whats(faults_of(make(shapes, LLAMA_CONFIG))) == [("preset llama #1", "a pattern matches no parameter")]


def test_the_input_is_not_changed(make: Make) -> None:
    spec = rules(rule(r".*gate_proj\.weight$"), symbols={"a": 1}, defaults={"b": 2})
    before = repr(spec)
    compile_plan(make(), tp_size=2, specs=[spec])
    assert repr(spec) == before


# rules of one's own against what a preset knows


def test_a_module_is_cut_as_one(make: Make) -> None:
    folder = make()
    (fault,) = faults_of(folder, specs=[rules(rule(r".*\.self_attn\.k_proj\.weight$", "skip"))])
    assert fault.what == "a weight is replicated where the rest of its module is sharded"
    assert fault.where == "model.layers.{0..1}.self_attn.k_proj.weight (spec file #1)"
    assert fault.got == "o_proj, q_proj, v_proj sharded"
    plan = compile_plan(folder, tp_size=2, specs=[rules(rule(r".*\.self_attn\.[qkvo]_proj\.weight$", "skip"))])
    assert {entry.style for entry in plan.parameters if "self_attn" in entry.name} == {"replicated"}


@pytest.mark.parametrize(
    ("pattern", "changes", "way"),
    [
        (r".*\.q_proj\.weight$", {"partition_type": "row"}, "column"),
        (r".*\.o_proj\.weight$", {"partition_type": "column"}, "row"),
        (r".*\.q_proj\.weight$", {"partition_type": "column", "gather_output": True}, "column"),
        (r"lm_head\.weight$", {"partition_type": "column"}, "column with gather_output"),
    ],
)
def test_a_known_weight_runs_the_known_way(make: Make, pattern: str, changes: dict[str, Any], way: str) -> None:
    found = faults_of(make(), specs=[rules(rule(pattern, **changes))])
    assert [fault.expected.split(",")[0] for fault in found if "does not fit its module" in fault.what] == [way]


def test_a_partial_gradient_stays_one_beside_cut_weights_only(make: Make) -> None:
    config = {**LLAMA_CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 4}
    norms = {f"model.layers.{n}.self_attn.{x}_norm.weight": (4,) for n in range(2) for x in "qk"}
    folder = make({**llama_shapes(), **norms}, config)

    def partial(*specs: dict[str, Any]) -> set[str]:
        plan = compile_plan(folder, tp_size=2, specs=[rules(*specs)] if specs else [])
        return {entry.name for entry in plan.parameters if entry.partial_gradient}

    both = {"model.layers.{0..1}.self_attn.k_norm.weight", "model.layers.{0..1}.self_attn.q_norm.weight"}
    assert partial() == both
    assert partial(rule(r".*_norm\.weight$", "skip")) == both, "a rule of one's own does not make the gradient whole"
    assert partial(rule(r".*\.self_attn\..*_proj\.weight$", "skip")) == set(), (
        "nothing is cut: every rank has all of it"
    )
    own = rule(r"model\.norm\.weight$", "skip", grad_allreduce=True)
    (fault,) = faults_of(folder, specs=[rules(own)])
    assert fault.what == "a gradient is summed where every rank has all of it"


def test_a_norm_that_the_preset_does_not_know_is_refused(make: Make) -> None:
    config = {**LLAMA_CONFIG, "model_type": "llama_of_mine"}
    norms = {f"model.layers.{n}.self_attn.q_norm.weight": (4,) for n in range(2)}
    folder = make({**llama_shapes(), **norms}, config)
    (fault,) = faults_of(folder, 2, preset="llama")
    assert fault.what == "the preset does not know a parameter among weights that are sharded"
    assert fault.where == "model.layers.{0..1}.self_attn.q_norm.weight"
    plan = compile_plan(folder, tp_size=2, preset="none", specs=[read_preset("llama")])
    assert any(note.startswith("model.layers.{0..1}.self_attn.q_norm.weight is whole") for note in plan.notes)
    noted = compile_plan(make(llama_shapes(), config), tp_size=2, preset="llama").notes
    assert any("this model is llama_of_mine" in note for note in noted)
    assert compile_plan(make(), tp_size=2).notes == ()


def test_kv_heads_are_replicated_when_there_are_more_ranks(make: Make) -> None:
    config = {**LLAMA_CONFIG, "num_key_value_heads": 2}
    folder = make(llama_shapes(config), config)
    plan = compile_plan(folder, tp_size=8)
    keys = of(plan, "model.layers.0.self_attn.k_proj.weight")["intervals"]
    assert keys == [[[0, 4]]] * 4 + [[[4, 8]]] * 4
    assert [(one.attribute, one.values) for one in plan.module_attributes] == [("num_key_value_groups", (1,) * 8)]
    assert compile_plan(folder, tp_size=2).module_attributes == (), "a value that does not change is not set"
    found = faults_of(folder, tp_size=3)
    assert {fault.next.split(";")[0] for fault in found} == {"TP sizes that work for the whole model: 1, 2, 4, 8"}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForRewards", None])
def test_a_head_that_a_preset_does_not_know_is_cured_by_one_rule(tmp_path: Path, architecture: str | None) -> None:
    config = {**LLAMA_CONFIG, "architectures": None if architecture is None else [architecture]}
    shapes = {name: shape for name, shape in llama_shapes(config).items() if not name.startswith("lm_head")}
    folder = write_checkpoint(tmp_path, {**shapes, "v_head.summary.weight": (1, config["hidden_size"])}, config=config)
    with pytest.raises(CompileError):
        compile_plan(folder, tp_size=2)
    rule = {"patterns": [r"v_head\.summary\.weight$"], "partition_type": "skip"}
    plan = compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": [rule]})])
    assert {e.name: e.style for e in plan.parameters}["v_head.summary.weight"] == "replicated"
    assert any("the head is v_head.summary.weight" in note for note in plan.notes)
    # a rule for something in the layers says nothing of the head
    with pytest.raises(CompileError, match="a pattern matches no parameter"):
        rule = {"patterns": [r".*o_proj\.weight$"], "partition_type": "row"}
        folder = write_checkpoint(tmp_path / "headless", shapes, config=config)
        compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": [rule]})])
