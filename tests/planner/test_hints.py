"""What `next:` of an error proposes works when it is done: each fault is provoked, and its way out taken.

A case is a generator: it gives a callable that must raise, is sent the fault, and does what its `next` says. Wherever
the hint holds the command, the key or the rule itself, that text is what is used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.planner import (
    Plan,
    SpecFile,
    check_plan,
    check_shards,
    compile_plan,
    merge,
    presplit,
    reshard,
)
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.deepspeed.read_config import parse_section
from autotp_plan.schemas.errors import AutoTPError, Fault
from autotp_plan.schemas.plan.rules import Rules
from autotp_plan.schemas.shards.folder import read_shards
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint, write_llama

Case = Generator[Callable[[], Any], Fault, None]
CASES: list[tuple[str, str, Callable[[Path], Case]]] = []


def hint(code: str, says: str) -> Callable[[Callable[[Path], Case]], Callable[[Path], Case]]:
    """A case of the fault `code`, whose `next` has `says` in it."""

    def register(function: Callable[[Path], Case]) -> Callable[[Path], Case]:
        CASES.append((code, says, function))
        return function

    return register


def rule(pattern: str, kind: str = "column", **rest: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **rest}


def spec(*rules: dict[str, Any], **rest: Any) -> SpecFile:
    return SpecFile.from_dict({"layer_specs": list(rules), **rest})


def plan_of(folder: Path, tp_size: int = 2, **options: Any) -> Plan:
    """A plan that also passes all checks."""
    plan = compile_plan(folder, tp_size=tp_size, **options)
    assert not check_plan(plan)
    return plan


def with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def run(*words: Any) -> str:
    """A command line; its stderr. Raises what it reports."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (0, 2)
    if done.exit_code:
        raise Refused(done.stderr)
    return done.stderr


class Refused(Exception):
    """A command that ended with exit status 2."""


def json_in(text: str) -> dict[str, Any]:
    """The JSON object that a text holds."""
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    return found


SKIP_ALL = rule(".*", "skip")
OWN = {"model_type": "own"}
PAIR = {"h.0.up.weight": (8, 4), "h.0.down.weight": (4, 8)}
UP, DOWN = rule(r".*\.up\.weight$"), rule(r".*\.down\.weight$", "row")


# rules


@hint("undecided-weight", "add a rule: {")
def a_weight_that_no_rule_decides(work: Path) -> Case:
    folder = write_checkpoint(work / "own", {**PAIR, "h.0.other.weight": (4, 4)}, OWN)
    fault = yield lambda: plan_of(folder, specs=[spec(UP, DOWN)])
    plan = plan_of(folder, specs=[spec(UP, DOWN, json_in(fault.next))])
    assert {one.style for one in plan.parameters if "other" in one.name} == {"replicated"}


@hint("pattern-without-match", "write ")
def a_pattern_for_modules(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)
    fault = yield lambda: plan_of(folder, specs=[spec(rule(r".*\.up$"), DOWN)])
    plan_of(folder, specs=[spec(rule(fault.next.split("write ")[1]), DOWN)])


@hint("pattern-without-match", '"optional": true')
def a_pattern_that_matches_nothing(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)
    other = rule(r".*\.gate\.weight$")
    yield lambda: plan_of(folder, specs=[spec(UP, DOWN, other)])
    plan_of(folder, specs=[spec(UP, DOWN, {**other, "optional": True})])


@hint("pattern-without-match", '"optional": true')
def a_pattern_that_matches_nothing_in_a_strict_deepspeed_config(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)

    def planned(other: dict[str, Any]) -> Plan:
        section = parse_section({"partition_config": {"layer_specs": [UP, DOWN, other]}})
        return plan_of(folder, deepspeed=section, strict=True)

    yield lambda: planned(rule(r".*\.gate\.weight$"))
    planned(rule(r".*\.gate\.weight$", optional=True))


@hint("pattern-without-match", "--preset none --spec FILE")
def a_preset_whose_pattern_matches_nothing(work: Path) -> Case:
    shapes = {name.replace("down_proj", "w2"): shape for name, shape in llama_shapes().items()}
    folder, file = write_checkpoint(work / "other", shapes, LLAMA_CONFIG), work / "spec.json"
    yield lambda: plan_of(folder)
    columns, rows = rule(r".*(q|k|v|gate|up)_proj\.weight$"), rule(r".*(o_proj|w2)\.weight$", "row")
    vocabulary = [rule(".*embed_tokens.*", "vocab"), rule("lm_head.*", gather_output=True)]
    file.write_text(json.dumps({"layer_specs": [columns, rows, *vocabulary]}))
    run("compile", "--model", folder, "--tp", 2, "-o", work / "plan.json", "--preset", "none", "--spec", file)


@hint("bad-pattern", "escape dots and brackets")
def a_pattern_that_is_no_regular_expression(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)
    yield lambda: plan_of(folder, specs=[spec(UP, DOWN, rule("h[0", optional=True))])
    plan_of(folder, specs=[spec(UP, DOWN, rule(r"h\[0", optional=True))])


@hint("rules-disagree", "narrow one of the patterns")
def two_rules_that_disagree(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)
    yield lambda: plan_of(folder, specs=[spec(rule(r"h\..*"), DOWN)])
    plan_of(folder, specs=[spec(rule(r"h\..*up.*"), DOWN)])


@hint("rule-contradicts-itself", "change the partition_type, or remove the other key")
def a_rule_that_contradicts_itself(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)
    yield lambda: plan_of(folder, specs=[spec(UP, {**DOWN, "gather_output": True})])
    plan_of(folder, specs=[spec(UP, DOWN)])


@hint("bias-style", "narrow the pattern to weights; biases follow")
def a_rule_that_matches_a_bias_too(work: Path) -> Case:
    folder = write_checkpoint(work / "own", {**PAIR, "h.0.up.bias": (8,)}, OWN)
    yield lambda: plan_of(folder, specs=[spec(UP, DOWN, rule(r".*\.bias$", "skip"))])
    plan = plan_of(folder, specs=[spec(UP, DOWN)])
    assert {one.style for one in plan.parameters if one.name.endswith("bias")} == {"column"}


@hint("unconsumed-column", 'say "gather_output": true')
def a_column_that_nothing_consumes(work: Path) -> Case:
    folder = write_checkpoint(work / "own", {"head.weight": (8, 4)}, OWN)
    yield lambda: plan_of(folder, specs=[spec(rule("head.*"))])
    plan_of(folder, specs=[spec(rule("head.*", gather_output=True))])


@hint("row-without-column", "or replicate this one (skip)")
def a_row_without_a_column(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)
    yield lambda: plan_of(folder, specs=[spec(rule(".*up.*", "skip"), DOWN)])
    plan_of(folder, specs=[spec(rule(".*up.*", "skip"), rule(".*down.*", "skip"))])
    plan_of(folder, specs=[spec(UP, DOWN)])


@hint("style-of-another-module", "remove the rule")
def a_rule_that_does_not_fit_its_module(work: Path) -> Case:
    folder = write_llama(work / "llama")
    yield lambda: plan_of(folder, specs=[spec(rule(r".*o_proj\.weight$"))])
    plan_of(folder, specs=[spec()])


@hint("fused-weight-misread", "give it the shape that is expected")
def a_fused_weight_that_is_misread(work: Path) -> Case:
    shapes = llama_shapes()
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name in ("q", "k", "v"):
            del shapes[f"{at}.self_attn.{name}_proj.weight"]
        del shapes[f"{at}.mlp.gate_proj.weight"], shapes[f"{at}.mlp.up_proj.weight"]
        shapes |= {f"{at}.self_attn.qkv_proj.weight": (64, 32), f"{at}.mlp.gate_up_proj.weight": (96, 32)}
    folder = write_checkpoint(work / "phi3", shapes, {**LLAMA_CONFIG, "model_type": "phi3"})
    wrong = rule(r".*qkv_proj\.weight$", shape=[2, -1])
    fault = yield lambda: plan_of(folder, specs=[spec(wrong)])
    expected = json.loads(re.match(r"\[.*?\]", fault.expected)[0])  # type: ignore[index]
    plan = plan_of(folder, specs=[spec({**wrong, "shape": [expected, -1]})])
    assert plan.layouts == plan_of(folder).layouts


@hint("gradient-summed-twice", "remove grad_allreduce")
def a_gradient_that_is_summed_twice(work: Path) -> Case:
    folder = write_llama(work / "llama")
    norm = rule(r"model\.norm\.weight$", "skip")
    yield lambda: plan_of(folder, specs=[spec({**norm, "grad_allreduce": True})])
    plan_of(folder, specs=[spec(norm)])


@hint("unknown-to-preset", "decide it in a spec file: {")
def a_norm_that_the_preset_does_not_know(work: Path) -> Case:
    shapes = {**llama_shapes(), **{f"model.layers.{layer}.self_attn.q_norm.weight": (4,) for layer in range(2)}}
    folder = write_checkpoint(work / "llama", shapes, LLAMA_CONFIG)
    fault = yield lambda: plan_of(folder)
    proposed = {**json_in(fault.next), "patterns": [r".*q_norm\.weight$"]}
    for value in (True, False):
        plan = plan_of(folder, specs=[spec({**proposed, "grad_allreduce": value})])
        assert {one.partial_gradient for one in plan.parameters if "q_norm" in one.name} == {value}


@hint("replicated-among-sharded", "give the others the same kind of rule, or remove this one")
def one_weight_replicated_among_sharded_ones(work: Path) -> Case:
    folder = write_llama(work / "llama")
    yield lambda: plan_of(folder, specs=[spec(rule(".*up_proj.*", "skip"))])
    plan_of(folder, specs=[spec(rule(r".*\.mlp\..*weight$", "skip"))])
    plan_of(folder, specs=[spec()])


@hint("replicated-among-sharded", '"use_default_specs": true')
def one_weight_that_a_deepspeed_config_does_not_name(work: Path) -> Case:
    folder = write_llama(work / "llama")
    mlp = [rule(r".*gate_proj\.weight$"), rule(r".*down_proj\.weight$", "row")]

    def planned(rules: list[dict[str, Any]], use: bool = False) -> Plan:
        partition = {"use_default_specs": use, "layer_specs": rules}
        return plan_of(folder, deepspeed=parse_section({"partition_config": partition}))

    yield lambda: planned(mlp)
    planned(mlp, use=True)
    planned([*mlp, rule(r".*up_proj\.weight$")])


@hint("tied-names-differ", "vocab and column by vocabulary, or skip")
def two_names_of_a_parameter_that_differ(work: Path) -> Case:
    folder = write_checkpoint(work / "own", {"embed.weight": (8, 4)}, OWN)
    tied = {"tied": [{"name": "head.weight", "to": "embed.weight"}]}
    head = rule("head.*", gather_output=True)
    yield lambda: plan_of(folder, specs=[spec(rule("embed.*", "skip"), head, **tied)])
    plan_of(folder, specs=[spec(rule("embed.*", "vocab"), head, **tied)])
    plan_of(folder, specs=[spec(rule("embed.*", "skip"), rule("head.*", "skip"), **tied)])


@hint("undecidable-condition", "give the key a default")
def a_condition_that_cannot_be_decided(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, OWN)
    rules = [{**UP, "when": "is_gated"}, DOWN]
    yield lambda: plan_of(folder, specs=[spec(*rules)])
    plan_of(folder, specs=[spec(*rules, defaults={"is_gated": True})])
    plan_of(folder, specs=[spec({**UP, "when": "model_type"}, DOWN)])


@hint("unresolved-size", "correct the rule's shape and unit")
def a_size_that_is_not_known(work: Path) -> Case:
    folder = write_checkpoint(work / "own", PAIR, {**OWN, "width": 8})
    yield lambda: plan_of(folder, specs=[spec({**UP, "shape": [["inner"], -1]}, DOWN)])
    plan_of(folder, specs=[spec({**UP, "shape": [["width"], -1]}, DOWN)])


@hint("ignored-tensors-without-num-layers", '"num_layers": "num_hidden_layers"')
def ignored_tensors_of_each_layer(work: Path) -> Case:
    shapes = {**PAIR, "h.0.table": (8,)}
    folder = write_checkpoint(work / "own", shapes, {**OWN, "num_hidden_layers": 1})
    rest = {"ignored_tensors": ["h.*.table"]}
    fault = yield lambda: plan_of(folder, specs=[spec(UP, DOWN, **rest)])
    key, value = re.findall(r'"(\w+)"', fault.next)[:2]
    assert plan_of(folder, specs=[spec(UP, DOWN, **rest, **{key: value})]).ignored == ("h.{0..0}.table",)


@hint("disk-names", "write * for each number")
def a_star_for_a_part_of_a_number(work: Path) -> Case:
    names = {"a.0.w1.weight": (4, 4), "a.1.w1.weight": (4, 4)}
    folder = write_checkpoint(work / "own", names, OWN)
    yield lambda: spec(SKIP_ALL, renamed_tensors={"a.*.w*.weight": "b.*.w.weight"})
    plan = plan_of(folder, specs=[spec(SKIP_ALL, renamed_tensors={"a.*.w1.weight": "b.*.w.weight"})])
    assert [one.name for one in plan.parameters] == ["b.{0..1}.w.weight"]


@hint("no-preset", "fill in a spec file, give it with --spec")
def a_model_of_transformers_without_a_tp_plan(work: Path) -> Case:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("biogpt", hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                  intermediate_size=64, vocab_size=64, max_position_embeddings=32)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    fault = yield lambda: compile_plan(model, tp_size=2)
    skeleton = json_in(fault.next)
    for one in skeleton["layer_specs"]:
        if "|" in one["partition_type"]:
            (pattern,) = one["patterns"]
            row = re.search(r"out_proj|fc2", pattern)
            one["partition_type"] = "row" if row else "column" if re.search(r"[qkv]_proj|fc1", pattern) else "skip"
    plan = compile_plan(model, tp_size=2, specs=[SpecFile.from_dict(skeleton)])
    assert {"column", "row", "vocab"} <= {one.style for one in plan.parameters} and not check_plan(plan)


# sizes


@hint("indivisible", "--uneven")
def a_tp_size_that_does_not_divide(work: Path) -> Case:
    folder = write_llama(work / "llama")
    fault = yield lambda: plan_of(folder, 3)
    for size in re.findall(r"\d+", fault.next.split(";")[0]):
        plan_of(folder, int(size))
    run("compile", "--model", folder, "--tp", 3, "-o", work / "plan.json", "--uneven")


@hint("indivisible", "TP sizes that work for the whole model: 1, 2")
def a_tp_size_for_which_uneven_shards_are_no_way_out(work: Path) -> Case:
    folder = write_checkpoint(work / "own", {"h.0.up.weight": (4, 4), "h.0.down.weight": (4, 4)}, OWN)
    fault = yield lambda: plan_of(folder, 8, specs=[spec(UP, DOWN)])
    assert "--uneven" not in fault.next
    for size in re.findall(r"\d+", fault.next):
        plan_of(folder, int(size), specs=[spec(UP, DOWN)])


@hint("fewer-units-than-ranks", "TP sizes that work for the whole model: 1, 2, 3, 4")
def more_ranks_than_units(work: Path) -> Case:
    folder = write_checkpoint(work / "own", {"h.0.up.weight": (4, 4), "h.0.down.weight": (4, 4)}, OWN)
    rules = spec({**UP, "indivisible": "uneven"}, {**DOWN, "indivisible": "uneven"})
    fault = yield lambda: plan_of(folder, 8, specs=[rules])
    assert "--uneven" not in fault.next
    for size in re.findall(r"\d+", fault.next):
        plan_of(folder, int(size), specs=[rules])


@hint("two-tp-sizes", "leave out --tp")
def two_tp_sizes(work: Path) -> Case:
    folder, config = write_llama(work / "llama"), work / "ds.json"
    section = parse_section({"autotp_size": 2})
    yield lambda: plan_of(folder, 4, deepspeed=section)
    config.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}}))
    run("compile", "--model", folder, "--ds-config", config, "-o", work / "plan.json")


@hint("no-tp-size", "give --tp N, or autotp_size")
def no_tp_size(work: Path) -> Case:
    folder = write_llama(work / "llama")
    yield lambda: compile_plan(folder, deepspeed=parse_section({}))
    run("compile", "--model", folder, "--tp", 2, "-o", work / "plan.json")
    compile_plan(folder, deepspeed=parse_section({"autotp_size": 2}))


# presets


@hint("unknown-preset", "did you mean")
def a_misspelt_preset(work: Path) -> Case:
    folder = write_llama(work / "llama")
    fault = yield lambda: plan_of(folder, preset="lama")
    plan_of(folder, preset=re.findall('"(.*)"', fault.next)[0])


@hint("unknown-preset", "use --preset auto")
def a_preset_that_is_none(work: Path) -> Case:
    folder = write_llama(work / "llama")
    yield lambda: plan_of(folder, preset="xyzzy")
    run("compile", "--model", folder, "--tp", 2, "-o", work / "plan.json", "--preset", "auto")


@hint("unknown-preset", "autotp-plan presets list")
def a_preset_to_show_that_is_none(work: Path) -> Case:
    from autotp_plan.planner.rules.preset_files import preset_text

    fault = yield lambda: preset_text("xyzzy")
    words = re.findall("`autotp-plan (.*)`", fault.next)[0].split()
    assert "llama" in CliRunner().invoke(main, words).stdout


@hint("preset-of-another-model", "use --preset auto or --preset ")
def a_preset_of_another_model(work: Path) -> Case:
    folder = write_llama(work / "llama")
    fault = yield lambda: plan_of(folder, preset="qwen2")
    for name in re.findall("--preset (\\w+)", fault.next):
        plan_of(folder, preset=name)


@hint("deepspeed-config-value", "did you mean")
def a_misspelt_key_of_a_deepspeed_config(work: Path) -> Case:
    fault = yield lambda: parse_section({"autotp_sise": 2})
    assert parse_section({re.findall('"(.*)"', fault.next)[0]: 2}).tp_size == 2


@hint("unknown-key", "did you mean")
def a_misspelt_key_of_a_rule(work: Path) -> Case:
    fault = yield lambda: spec({"pattern": ["x"]})
    spec({re.findall('"(.*)"', fault.next)[0]: ["x"]})


@hint("unknown-key", "remove the key")
def a_key_that_deepspeed_ignores(work: Path) -> Case:
    partition = {"layer_specs": [UP, DOWN], "comment_of_ours": "MLP"}
    yield lambda: parse_section({"partition_config": partition})
    parse_section({"partition_config": {"layer_specs": [UP, DOWN]}})


@hint("missing-key", 'add "patterns"')
def a_rule_without_patterns(work: Path) -> Case:
    fault = yield lambda: spec({"partition_type": "row"})
    spec({"partition_type": "row", re.findall('"(.*)"', fault.next)[0]: ["x"]})


# checkpoints


@hint("two-tensors-one-parameter", "remove one of them from the checkpoint")
def two_tensors_for_one_parameter(work: Path) -> Case:
    rest = {"renamed_tensors": {"g.*.up.weight": "h.*.up.weight"}}
    folder = write_checkpoint(work / "own", {**PAIR, "g.0.up.weight": (8, 4)}, OWN)
    yield lambda: plan_of(folder, specs=[spec(UP, DOWN, **rest)])
    plan_of(write_checkpoint(work / "one", PAIR, OWN), specs=[spec(UP, DOWN)])


@hint("brace-in-name", "rename the tensor")
def a_name_with_a_brace(work: Path) -> Case:
    yield lambda: plan_of(write_checkpoint(work / "own", {"a{0}.weight": (4, 4)}, OWN), specs=[spec(SKIP_ALL)])
    plan_of(write_checkpoint(work / "one", {"a0.weight": (4, 4)}, OWN), specs=[spec(SKIP_ALL)])


@hint("no-checkpoint", "a state dict that torch.save wrote under another name must be called pytorch_model.bin")
def a_state_dict_of_another_name(work: Path) -> Case:
    import torch

    folder = work / "pt"
    folder.mkdir()
    torch.save({name: torch.zeros(shape) for name, shape in PAIR.items()}, folder / "weights.pt")
    yield lambda: plan_of(folder, specs=[spec(UP, DOWN)])
    (folder / "weights.pt").rename(folder / "pytorch_model.bin")
    plan_of(folder, specs=[spec(UP, DOWN)])


@hint("another-config", "compile a plan for this checkpoint")
def a_checkpoint_with_another_config(work: Path) -> Case:
    folder = write_llama(work / "llama")
    plan = plan_of(folder)
    with_config(folder, rope_theta=5.0)
    yield lambda: presplit(plan, folder, work / "shards")
    presplit(plan_of(folder), folder, work / "shards")


@hint("tensor-missing", "or compile a plan for this one")
def a_checkpoint_without_a_tensor(work: Path) -> Case:
    tied = write_llama(work / "tied", tie_word_embeddings=True)
    plan = plan_of(write_llama(work / "llama"))
    yield lambda: presplit(plan, tied, work / "shards")
    presplit(plan_of(tied), tied, work / "shards")


# plans and shards


def edited(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@hint("plan-fingerprint", "change the spec, not the plan, and compile again")
def a_plan_that_was_edited(work: Path) -> Case:
    folder, path = write_llama(work / "llama"), work / "plan.json"
    path.write_text(plan_of(folder).to_json())
    edited(path, notes=["mine"])
    yield lambda: Plan.read(path)
    path.write_text(plan_of(folder, specs=[spec(rule(r".*mlp.*weight$", "skip"))]).to_json())
    Plan.read(path)


@hint("plan-version", "compile the plan again with this version")
def a_plan_of_another_version(work: Path) -> Case:
    folder, path = write_llama(work / "llama"), work / "plan.json"
    path.write_text(plan_of(folder).to_json())
    edited(path, version="9.0")
    yield lambda: Plan.read(path)
    run("compile", "--model", folder, "--tp", 2, "-o", path)
    Plan.read(path)


@hint("bad-number", "give numbers of at least 1")
def no_workers(work: Path) -> Case:
    folder = write_llama(work / "llama")
    yield lambda: presplit(plan_of(folder), folder, work / "shards", workers=0)
    presplit(plan_of(folder), folder, work / "shards", workers=1)


@hint("bad-number", "and --workers of at most ")
def too_many_workers(work: Path) -> Case:
    folder = write_llama(work / "llama")
    fault = yield lambda: presplit(plan_of(folder), folder, work / "shards", workers=10**9)
    presplit(plan_of(folder), folder, work / "shards", workers=int(fault.next.split()[-1]))


@hint("folder-not-writable", "give another folder, or remove this one")
def a_folder_that_is_not_empty(work: Path) -> Case:
    folder = write_llama(work / "llama")
    (work / "shards").mkdir()
    (work / "shards" / "notes.txt").write_text("mine")
    yield lambda: presplit(plan_of(folder), folder, work / "shards")
    presplit(plan_of(folder), folder, work / "other")
    shutil.rmtree(work / "shards")
    presplit(plan_of(folder), folder, work / "shards")


@hint("shards-of-another-plan", "load the plan in the shards folder (autotp_plan.json), or pre-split with this one")
def shards_of_another_plan(work: Path) -> Case:
    folder, shards = write_llama(work / "llama"), work / "shards"
    presplit(plan_of(folder), folder, shards)
    yield lambda: read_shards(shards, plan_of(folder, 4))
    read_shards(shards, Plan.read(shards / "autotp_plan.json"))
    presplit(plan_of(folder, 4), folder, work / "other")
    read_shards(work / "other", plan_of(folder, 4))


@hint("shards-differ", "move it somewhere else")
def a_foreign_file_among_shards(work: Path) -> Case:
    folder, shards = write_llama(work / "llama"), work / "shards"
    presplit(plan_of(folder), folder, shards)
    (shards / "notes.txt").write_text("mine")
    yield lambda: check_shards(shards)
    (shards / "notes.txt").rename(work / "notes.txt")
    check_shards(shards)


@hint("shards-differ", "cp -rL")
def links_in_a_shards_folder(work: Path) -> Case:
    folder, shards = write_llama(work / "llama"), work / "shards"
    presplit(plan_of(folder), folder, shards)
    file = next(shards.glob("tp-*"))
    file.rename(work / "aside")
    file.symlink_to(work / "aside")
    yield lambda: check_shards(shards)
    shutil.copytree(shards, work / "copy", symlinks=False)
    check_shards(work / "copy")


@hint("shards-differ", "run presplit again with --part 2/2")
def shards_of_which_a_part_is_missing(work: Path) -> Case:
    folder, shards = write_llama(work / "llama"), work / "shards"
    presplit(plan_of(folder), folder, shards, part=(1, 2))
    yield lambda: check_shards(shards)
    presplit(plan_of(folder), folder, shards, part=(2, 2))
    check_shards(shards)


@hint("folder-not-writable", "finish it with --part 2/2, or remove the folder and start again")
def presplit_of_a_folder_that_was_begun_in_parts(work: Path) -> Case:
    folder, shards = write_llama(work / "llama"), work / "shards"
    presplit(plan_of(folder), folder, shards, part=(1, 2))
    yield lambda: presplit(plan_of(folder), folder, shards)
    presplit(plan_of(folder), folder, shards, part=(2, 2))
    check_shards(shards)


@hint("no-such-part", "give --part 1/8 to --part 8/8, each once")
def a_part_that_is_none(work: Path) -> Case:
    folder, shards = write_llama(work / "llama"), work / "shards"
    yield lambda: presplit(plan_of(folder), folder, shards, part=(0, 8))
    for number in range(1, 9):
        presplit(plan_of(folder), folder, shards, part=(number, 8))
    check_shards(shards)


@hint("tp-or-plan", "give --tp N for the plan of the same preset, or --plan FILE")
def reshard_for_nothing(work: Path) -> Case:
    folder, shards, file = write_llama(work / "llama"), work / "shards", work / "four.json"
    presplit(plan_of(folder), folder, shards)
    yield lambda: reshard(shards, work / "out")
    run("reshard", shards, "--tp", 4, "-o", work / "by-tp")
    file.write_text(plan_of(folder, 4).to_json())
    run("reshard", shards, "--plan", file, "-o", work / "by-plan")


@hint("plan-not-of-a-preset", "compile a plan with the same rules and --tp 4, and give it with --plan")
def reshard_of_a_plan_by_a_deepspeed_config(work: Path) -> Case:
    folder, shards = write_llama(work / "llama"), work / "shards"
    mlp = [rule(r".*(gate|up)_proj\.weight$"), rule(r".*down_proj\.weight$", "row")]
    section = parse_section({"partition_config": {"use_default_specs": False, "layer_specs": mlp}})
    presplit(replace(plan_of(folder, deepspeed=section), rules=None), folder, shards)  # as version 0.1.0 wrote it
    yield lambda: reshard(shards, work / "out", tp_size=4)
    reshard(shards, work / "out", plan=plan_of(folder, 4, deepspeed=section))
    check_shards(work / "out")


@hint("plan-not-of-a-preset", "give --module tests.helpers.own_models:Nano as for `compile`")
def reshard_of_a_model_of_a_function(work: Path) -> Case:
    folder, shards = write_checkpoint(work / "own", PAIR, OWN), work / "shards"
    factory = ModuleFactory(name="tests.helpers.own_models:Nano")
    plan = plan_of(folder, specs=[spec(UP, DOWN)])
    rules = Rules(preset="infer", module=factory.name)
    presplit(replace(plan, rules=rules), folder, shards)
    yield lambda: reshard(shards, work / "out", tp_size=4)
    with pytest.raises(AutoTPError, match="a plan without a preset needs proof"):  # the function is taken
        reshard(shards, work / "out", tp_size=4, factory=factory)


@hint("reshard-without-proof", "reshard(..., prove=autotp_plan.runtime.try_plan, infer=...)")
def reshard_of_inferred_rules(work: Path) -> Case:
    folder, shards = write_checkpoint(work / "own", PAIR, OWN), work / "shards"
    made: Any = {
        "infer": lambda _: spec(UP, DOWN),
        "prove": lambda _: SimpleNamespace(partial_gradients=(), problem=None),
    }
    factory = ModuleFactory(name="tests.helpers.own_models:Nano")
    presplit(plan_of(folder, preset="infer", factory=factory, **made), folder, shards)
    yield lambda: reshard(shards, work / "out", tp_size=4, factory=factory)
    reshard(shards, work / "out", tp_size=4, factory=factory, **made)


@hint("plan-of-other-parameters", "or `merge` the shards, and presplit the checkpoint")
def reshard_by_a_plan_with_other_names(work: Path) -> Case:
    folder, shards, merged = write_checkpoint(work / "own", PAIR, OWN), work / "shards", work / "merged"
    presplit(plan_of(folder, specs=[spec(UP, DOWN)]), folder, shards)
    other = spec(UP, DOWN, renamed_tensors={"h.*.up.weight": "b.*.up.weight", "h.*.down.weight": "b.*.down.weight"})
    plan = plan_of(folder, 4, specs=[other])
    yield lambda: reshard(shards, work / "out", plan=plan)
    merge(shards, merged)
    presplit(plan, merged, work / "out")
    reshard(shards, work / "same", plan=plan_of(folder, 4, specs=[spec(UP, DOWN)]))


@pytest.mark.parametrize(("code", "says", "case"), [pytest.param(*one, id=one[2].__name__) for one in CASES])
def test_what_next_proposes_works(tmp_path: Path, code: str, says: str, case: Callable[[Path], Case]) -> None:
    steps = case(tmp_path)
    provoke = next(steps)
    with pytest.raises(AutoTPError) as caught:
        provoke()
    fault = next((one for one in caught.value.faults if one.code == code and says in one.next), None)
    assert fault is not None, caught.value
    with pytest.raises(StopIteration):
        steps.send(fault)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40 and len({code for code, _, _ in CASES}) >= 35
