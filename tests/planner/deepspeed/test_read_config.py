"""Existing DeepSpeed configs: each documented form compiles for a model it fits, or is refused for a true reason.

The forms are those of DeepSpeed's AutoTP tutorial, its configuration page, its training API page, and the docstrings of
`TPLayerSpec`, `AutoTPConfig` and `TPTrainingConfig` (0.19.8).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.planner.deepspeed.read_config import parse_section, read_deepspeed_config
from autotp_plan.planner.plan_table import as_json
from autotp_plan.schemas.errors import AutoTPError, DocumentError, Fault
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import LLAMA_CONFIG, write_checkpoint, write_llama

ROW, COLUMN, SKIP = ({"partition_type": kind} for kind in ("row", "column", "skip"))
O_AND_DOWN = {"patterns": [r".*\.o_proj\.weight$", r".*\.down_proj\.weight$"], **ROW}
QKV = {"patterns": [r".*\.[qkv]_proj\.weight$"], **COLUMN}
GATE_UP = {"patterns": [r".*\.gate_up_proj\.weight$"], **COLUMN, "shape": [2, -1], "partition_dim": 0}
CUSTOM = {"use_default_specs": False, "layer_specs": [O_AND_DOWN, QKV, GATE_UP]}

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 8, 4, 4


def fused_shapes(qkv: bool = False, prefix: str = "model.layers.") -> dict[str, tuple[int, ...]]:
    """A model with a fused gate_up_proj, and on request a fused qkv_proj."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        at = f"{prefix}{layer}"
        sizes = {"qkv": HIDDEN + 2 * KV_HEADS * HEAD_DIM} if qkv else {"q": HIDDEN, "k": 16, "v": 16}
        shapes.update({f"{at}.self_attn.{name}_proj.weight": (size, HIDDEN) for name, size in sizes.items()})
        shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{at}.mlp.gate_up_proj.weight"] = (2 * INNER, HIDDEN)
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    return shapes


def compiled(folder: Path, section: dict[str, Any], tp_size: int | None = None, **options: Any) -> Plan:
    return compile_plan(folder, tp_size=tp_size, deepspeed=parse_section(section), **options)


def refused(folder: Path, section: dict[str, Any], tp_size: int | None = None, **options: Any) -> list[Fault]:
    with pytest.raises(AutoTPError) as caught:
        compiled(folder, section, tp_size, **options)
    return list(caught.value.faults)


def intervals(plan: Plan, name: str) -> Any:
    return next(entry["intervals"] for entry in as_json(plan)["parameters"] if entry["name"] == name)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


# documented forms


def test_a_section_with_only_a_size_uses_our_preset(llama: Path) -> None:
    """The minimal form: DeepSpeed takes the model's own plan, we take the preset of its model_type."""
    assert compiled(llama, {"autotp_size": 4}) == compile_plan(llama, tp_size=4)


@pytest.mark.parametrize("name", ["llama", "LLaMA"])
def test_a_preset_by_name(llama: Path, name: str) -> None:
    plan = compiled(llama, {"autotp_size": 4, "preset_model": name})
    assert plan.parameters == compile_plan(llama, tp_size=4).parameters


@pytest.mark.parametrize("name", ["bloom", "chatglm", "mixtral", "deepseek_v2"])
def test_a_preset_of_deepspeed_that_is_another_models(llama: Path, name: str) -> None:
    plan = compiled(llama, {"autotp_size": 2, "preset_model": name})
    assert plan.parameters == compile_plan(llama, tp_size=2).parameters
    assert f"preset_model '{name}' of the DeepSpeed config was replaced by preset 'llama'" in plan.notes[0]


def test_the_tutorials_partition_config_shards_a_model_of_ones_own(tmp_path: Path) -> None:
    """The tutorial's partition_config for a model of one's own, without config.json's help."""
    folder = write_checkpoint(tmp_path / "own", fused_shapes(), {"model_type": "own"})
    plan = compiled(folder, {"autotp_size": 4, "partition_config": CUSTOM})
    gate_up = intervals(plan, "model.layers.1.mlp.gate_up_proj.weight")
    assert gate_up == [[[12 * r, 12 * r + 12], [48 + 12 * r, 60 + 12 * r]] for r in range(4)]
    assert intervals(plan, "model.layers.0.self_attn.k_proj.weight")[3] == [[12, 16]]
    assert {entry.style for entry in plan.parameters} == {"row", "column"}


def test_the_tutorials_partition_config_is_refused_for_a_llama(llama: Path) -> None:
    """On a Llama the same config has a rule for a weight that is not there, and leaves gate and up whole."""
    section = {"autotp_size": 4, "partition_config": CUSTOM}
    found = {(fault.what, fault.where) for fault in refused(llama, section, strict=True)}
    assert found == {
        ("a pattern matches no parameter", "ds-config #3"),
        ("no rule decides a weight", "model.layers.{0..1}.mlp.gate_proj.weight"),
        ("no rule decides a weight", "model.layers.{0..1}.mlp.up_proj.weight"),
    }
    found = {(fault.what, fault.where) for fault in refused(llama, section)}
    torn = "a weight is replicated where the rest of its module is sharded"
    assert found == {
        (torn, "model.layers.{0..1}.mlp.gate_proj.weight (no rule)"),
        (torn, "model.layers.{0..1}.mlp.up_proj.weight (no rule)"),
    }


def test_the_example_of_deepspeeds_configuration_page_is_refused(llama: Path) -> None:
    """Only o_proj and down_proj are decided: rows without columns to feed them, which trains wrong numbers."""
    section = {
        "autotp_size": 4, "preset_model": "llama", "tp_overlap_comm": False,
        "partition_config": {"use_default_specs": False, "layer_specs": [O_AND_DOWN]},
    }  # fmt: skip
    found = refused(llama, section, strict=True)
    assert {fault.what for fault in found} == {"no rule decides a weight"}
    assert {fault.where.split(".")[-2] for fault in found} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    section["partition_config"]["use_default_specs"] = True  # type: ignore[index]
    plan = compiled(llama, section)
    assert {str(entry.rule) for entry in plan.parameters if entry.style == "row"} == {"ds-config #1"}
    assert intervals(plan, "model.layers.0.self_attn.o_proj.weight") == intervals(
        compile_plan(llama, tp_size=4), "model.layers.0.self_attn.o_proj.weight"
    )


@pytest.mark.parametrize("sizes", [[HIDDEN, 16, 16], ["q_size", "kv_size", "kv_size"]])
def test_sub_parameters_of_unequal_sizes_are_sharded_each(tmp_path: Path, sizes: list[Any]) -> None:
    """GQA; the documentation writes q_size and kv_size, which here are names that a spec file defines."""
    folder = write_checkpoint(tmp_path / "own", fused_shapes(qkv=True), {**LLAMA_CONFIG, "model_type": "own"})
    fused = {"patterns": [r".*\.qkv_proj\.weight$"], **COLUMN, "shape": [sizes, -1], "partition_dim": 0}
    partition: dict[str, Any] = {"layer_specs": [fused, O_AND_DOWN, GATE_UP]}
    if isinstance(sizes[0], str):
        (fault,) = refused(folder, {"autotp_size": 4, "partition_config": partition})
        assert fault.what == "a size cannot be resolved"
        partition["symbols"] = {"q_size": "hidden_size", "kv_size": "num_key_value_heads * 4"}
    plan = compiled(folder, {"autotp_size": 4, "partition_config": partition})
    assert intervals(plan, "model.layers.0.self_attn.qkv_proj.weight")[1] == [[8, 16], [36, 40], [52, 56]]


def test_rules_for_other_model_types_do_not_count(tmp_path: Path) -> None:
    """Two rules for one pattern, each for a family: no conflict, and the wrong one for Qwen2 never counts."""
    gqa = {"patterns": [r".*\.qkv_proj\.weight$"], "shape": [[32, 16, 16], -1], "partition_dim": 0}
    equal = {"patterns": [r".*\.qkv_proj\.weight$"], "shape": [3, -1], "partition_dim": 0}
    partition = {
        "layer_specs": [{**gqa, "model_types": ["mine"]}, {**equal, "model_types": ["yours"]}, O_AND_DOWN, GATE_UP]
    }
    folder = write_checkpoint(tmp_path / "mine", fused_shapes(qkv=True), {"model_type": "mine"})
    plan = compiled(folder, {"autotp_size": 4, "partition_config": partition})
    assert {str(entry.rule) for entry in plan.parameters if "qkv" in entry.name} == {"ds-config #1"}
    folder = write_checkpoint(tmp_path / "yours", fused_shapes(qkv=True), {"model_type": "yours"})
    (fault,) = refused(folder, {"autotp_size": 4, "partition_config": partition})
    assert (fault.what, fault.got) == ("the dimension is not equal sub-parameters", "64 in 3")
    partition["layer_specs"] = [gqa, equal, O_AND_DOWN, GATE_UP]
    with pytest.raises(AutoTPError, match="two rules match one parameter and disagree"):
        compile_plan(folder, tp_size=4, specs=[SpecFile.from_dict(partition)])
    plan = compiled(folder, {"autotp_size": 4, "partition_config": partition})
    assert {str(entry.rule) for entry in plan.parameters if "qkv" in entry.name} == {"ds-config #1"}
    assert any("ds-config #2 (column) decides nothing" in note and "ds-config #1." in note for note in plan.notes)


def test_the_documented_bloom_form_is_refused_where_heads_would_be_cut(tmp_path: Path) -> None:
    """`[q, k, v]` for GPT-NeoX's query_key_value, which is interleaved per head: wrong numbers in DeepSpeed."""
    config = {
        "model_type": "gpt_neox", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 6,
        "intermediate_size": 16,
    }  # fmt: skip
    at = "gpt_neox.layers.0"
    shapes = {
        "gpt_neox.embed_in.weight": (6, 8), f"{at}.attention.query_key_value.weight": (24, 8),
        f"{at}.attention.dense.weight": (8, 8), f"{at}.mlp.dense_h_to_4h.weight": (16, 8),
        f"{at}.mlp.dense_4h_to_h.weight": (8, 16), "embed_out.weight": (6, 8),
    }  # fmt: skip
    folder = write_checkpoint(tmp_path / "neox", shapes, config)
    fused = {"patterns": [r".*\.query_key_value\.weight$"], **COLUMN}
    for shape in ([[8, 8, 8], -1], [3, -1]):
        rule = {**fused, "shape": shape, "partition_dim": 0}
        (fault,) = refused(folder, {"autotp_size": 2, "partition_config": {"layer_specs": [rule]}})
        assert fault.what == "a rule splits a fused weight in the wrong place"
    plan = compiled(folder, {"autotp_size": 2, "partition_config": {"layer_specs": [fused]}})
    assert intervals(plan, f"{at}.attention.query_key_value.weight") == [[[0, 12]], [[12, 24]]]
    (fault, *_) = refused(folder, {"autotp_size": 4, "partition_config": {"layer_specs": [fused]}})
    assert fault.what == "a weight cannot be split evenly over the ranks", (
        "a rule without a unit takes the preset's: whole heads"
    )


def test_every_form_in_the_docstrings_of_tp_layer_spec_compiles(tmp_path: Path) -> None:
    """Row, column, gathered head, fused `(3, -1)` and `(2, -1)`, experts in a view, skip: one model with them all."""
    shapes = {
        "h.0.query_key_value.weight": (24, 8), "h.0.o_proj.weight": (8, 8), "h.0.gate_up_proj.weight": (32, 8),
        "h.0.down_proj.weight": (8, 16), "h.0.gate.weight": (4, 8), "h.0.router.weight": (4, 8),
        "m.0.experts.0.w1.weight": (32, 8), "m.0.experts.0.w2.weight": (8, 32), "lm_head.weight": (11, 8),
    }  # fmt: skip
    specs = [
        {"patterns": [r".*\.o_proj\.weight$", r".*\.down_proj\.weight$"], "partition_type": "ROW"},
        {"patterns": [r".*\.query_key_value\.weight$"], **COLUMN, "shape": [3, -1], "partition_dim": 0},
        GATE_UP,
        {"patterns": [r".*\.experts\..*\.w1\.weight$"], **COLUMN, "shape": [4, -1, 8], "partition_dim": 1},
        {"patterns": [r".*\.experts\..*\.w2\.weight$"], **ROW, "shape": [8, 4, -1], "partition_dim": 2},
        {"patterns": [r".*\.gate\.weight$", r".*\.router\.weight$"], **SKIP, "grad_allreduce": True},
        {"patterns": [r".*lm_head\.weight$"], "gather_output": True, "indivisible": "uneven"},
    ]
    folder = write_checkpoint(tmp_path / "all", shapes, {"model_type": "own"})
    plan = compiled(folder, {"autotp_size": 2, "partition_config": {"layer_specs": specs, "strict_mode": True}})
    assert intervals(plan, "h.0.query_key_value.weight") == [[[0, 4], [8, 12], [16, 20]], [[4, 8], [12, 16], [20, 24]]]
    assert intervals(plan, "m.0.experts.0.w1.weight") == [[[0, 4]], [[4, 8]]]
    assert intervals(plan, "lm_head.weight") == [[[0, 6]], [[6, 11]]]
    assert [entry.name for entry in plan.parameters if entry.gather_output] == ["lm_head.weight"]
    assert [entry.name for entry in plan.parameters if entry.partial_gradient] == [
        "h.0.gate.weight",
        "h.0.router.weight",
    ]


def test_patterns_for_modules_say_how_to_mend_them(llama: Path) -> None:
    r"""Docstrings write `.*\.o_proj$`; DeepSpeed matches parameter names, so that this matches nothing, silently."""
    section = {"autotp_size": 2, "partition_config": {"layer_specs": [{"patterns": [r".*\.o_proj$"], **ROW}]}}
    hint = r"patterns are matched against parameter names, not modules: write .*\.o_proj\.weight$"
    assert [fault.next for fault in refused(llama, section, strict=True)] == [hint]
    assert any("ds-config #1" in note and hint in note for note in compiled(llama, section).notes)
    open_end = {"patterns": [r".*\.o_proj", r".*\.down_proj"], **ROW}
    plan = compiled(llama, {"autotp_size": 2, "partition_config": {"layer_specs": [open_end]}})
    assert {str(entry.rule) for entry in plan.parameters if entry.style == "row"} == {"ds-config #1"}


# every key of the section


@pytest.mark.parametrize(
    ("dtype", "ours"), [("bf16", "bfloat16"), ("torch.float16", "float16"), ("fp32", "float32"), ("half", "float16")]
)
def test_dtype_is_honoured(llama: Path, dtype: str, ours: str) -> None:
    assert compiled(llama, {"autotp_size": 2, "dtype": dtype}).runtime.dtype == ours


def test_overlap_is_honoured(llama: Path) -> None:
    assert compiled(llama, {"autotp_size": 2, "tp_overlap_comm": True}).runtime.tp_overlap_comm
    assert not compiled(llama, {"autotp_size": 2}).runtime.tp_overlap_comm


@pytest.mark.parametrize(
    ("section", "note"),
    [
        ({"keep_module_on_host": True}, "keep_module_on_host is not applied"),
        ({"vocab_parallel_lm_head": True}, "the loss is computed on full logits"),
        ({"tp": {"tp_size": 1, "tp_grain_size": 64}}, "tp_grain_size is not applied"),
        ({"partition_config": {"tp_size": 8}}, "DeepSpeed overwrites it with autotp_size"),
        ({"partition_config": {"embedding_partition_dim": 1}}, "DeepSpeed never reads it"),
        ({"partition_config": {"lm_head_patterns": ["x"]}}, "says which weight is the head"),
    ],
)
def test_what_is_not_applied_is_noted(llama: Path, section: dict[str, Any], note: str) -> None:
    assert note in " ".join(compiled(llama, {"autotp_size": 2, **section}).notes)


@pytest.mark.parametrize(
    "section",
    [
        {}, {"autotp_size": 0}, {"replace_with_kernel_inject": False}, {"kernel_inject": False}, {"preset_model": None},
        {"injection_policy_tuple": None}, {"partition_config": None}, {"dtype": None}, {"vocab_parallel_lm_head": None},
        {"vocab_parallel_ce_backend": "torch"}, {"tensor_parallel": {}}, {"keep_module_on_host": False},
        {"tp": {}},
        {"tp": {"tp_size": 2, "tp_grain_size": 1, "mpu": None, "tp_group": None}, "autotp_size": 2},
    ],
)  # fmt: skip
def test_default_options_change_nothing(llama: Path, section: dict[str, Any]) -> None:
    assert compiled(llama, section, tp_size=2) == compile_plan(llama, tp_size=2)


@pytest.mark.parametrize(
    ("section", "where", "expected"),
    [
        ({"autotp_size": -1}, "autotp_size", "a positive integer"),
        ({"autotp_size": "4"}, "autotp_size", "an integer"),
        ({"autotp_size": True}, "autotp_size", "an integer"),
        ({"autotp_size": 2.0}, "autotp_size", "an integer"),
        ({"preset_model": 3}, "preset_model", "a string"),
        ({"dtype": "int8"}, "dtype", "one of bf16"),
        ({"dtype": ["bf16"]}, "dtype", "one of bf16"),
        ({"tp_overlap_comm": "yes"}, "tp_overlap_comm", "true or false"),
        ({"vocab_parallel_lm_head": 1}, "vocab_parallel_lm_head", "true or false"),
        ({"vocab_parallel_ce_backend": "liger"}, "vocab_parallel_ce_backend", '"torch"'),
        ({"replace_with_kernel_inject": True}, "replace_with_kernel_inject", "kernels are for inference only"),
        ({"kernel_inject": True}, "replace_with_kernel_inject", "kernels are for inference only"),
        ({"injection_policy_tuple": ["a"]}, "injection_policy_tuple", "say it as partition_config"),
        ({"tp": {"tp_size": 4}, "autotp_size": 2}, "tp.tp_size", "autotp_size (2)"),
        ({"tensor_parallel": {"tp_size": 4}}, "tp.tp_size", "autotp_size (None)"),
        ({"tp": 4}, "tp", "a JSON object"),
        ({"tp": {"tp_sise": 4}}, "tp.tp_sise", 'did you mean "tp_size"?'),
        ({"tp": {"mpu": "x"}}, "tp.mpu", "a JSON file cannot hold it"),
        ({"autotp_sise": 4}, "autotp_sise", 'did you mean "autotp_size"?'),
        ({"partition_config": []}, "partition_config", "Rules that say"),
        ({"partition_config": {"strict_mode": 1}}, "partition_config.strict_mode", "true or false"),
        ({"partition_config": {"lm_head_patterns": "head"}}, "partition_config.lm_head_patterns", "a list of names"),
        ({"partition_config": {"layer_spec": []}}, "partition_config.layer_spec", 'did you mean "layer_specs"?'),
        ({"partition_config": {"layer_specs": [{"patterns": ["x"], "partition_type": "diagonal"}]}},
         "partition_config.layer_specs[0].partition_type", "column (split output features)"),
        ({"partition_config": {"layer_specs": [{"patterns": ["x"], "shape": [[[1]], -1]}]}},
         "partition_config.layer_specs[0].shape[0][0]", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(section: dict[str, Any], where: str, expected: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_section(section)
    (fault,) = caught.value.faults
    assert fault.where == f"tensor_parallel.{where}"
    assert expected in fault.expected + fault.next


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_section({"autotp_size": "x", "dtype": 1, "other": 1, "partition_config": {"a": 1, "b": 2}})
    assert len(caught.value.faults) == 5


def test_partition_config_may_say_what_a_spec_file_says(tmp_path: Path) -> None:
    """Symbols, vocabulary rules, module attributes and ties count, though DeepSpeed itself does not know them."""
    shapes = {"embed.weight": (8, 4), "up.weight": (8, 4), "down.weight": (4, 8)}
    partition: dict[str, Any] = {
        "symbols": {"inner": "width * 2"},
        "vocabulary_specs": [{"patterns": ["embed"], "partition_type": "vocab"}],
        "layer_specs": [{"patterns": ["up"], "shape": [["inner"], -1]}, {"patterns": ["down"], **ROW}],
        "module_attributes": [{"patterns": ["up$"], "attributes": {"out": "inner // tp_size"}}],
        "tied": [{"name": "head.weight", "to": "embed.weight"}],
    }
    partition["vocabulary_specs"].append({"patterns": ["head"], "gather_output": True})
    folder = write_checkpoint(tmp_path / "own", shapes, {"width": 4})
    plan = compiled(folder, {"autotp_size": 2, "partition_config": partition})
    assert [str(tie.rule) for tie in plan.tied] == ["ds-config #4"]
    assert [(found.module, found.values) for found in plan.module_attributes] == [("up", (4, 4))]


# files


def test_a_file_without_a_tensor_parallel_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "tensor_parallel": {"autotp_size": 4}}))
    assert read_deepspeed_config(path).tp_size == 4
    for text, expected in (
        ('{"tensor_paralel": {}}', 'did you mean "tensor_parallel"?'),
        ('{"train_batch_size": 8}', "a tensor_parallel section"),
        ("[]", "a JSON object"),
        ('{"tensor_parallel": []}', "a JSON object"),
        ('{"tensor_parallel": {"autotp_size": 2, "autotp_size": 4}}', "a JSON document"),
    ):
        path.write_text(text)
        with pytest.raises(DocumentError) as caught:
            read_deepspeed_config(path)
        assert expected in str(caught.value)
