"""`compile --sequence-parallel`: which places a plan gets, when they are proven first, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.deepspeed.export import export_to_deepspeed
from autotp_plan.planner.deepspeed.read_config import parse_section
from autotp_plan.planner.diff.compare import compare_plans
from autotp_plan.planner.diff.text import groups, lines
from autotp_plan.planner.estimate.from_plan import estimate_from_plan
from autotp_plan.planner.pictures.facts import picture
from autotp_plan.planner.pictures.page import page
from autotp_plan.planner.plan_table import as_json, describe
from autotp_plan.planner.rules.preset_files import read_preset
from autotp_plan.planner.sequence_parallel import with_sequence_parallel
from autotp_plan.planner.shards.recompile import Helpers, recompiled
from autotp_plan.planner.stream_words import stream_words
from autotp_plan.schemas.errors import CompileError, Fault, MismatchError, MissingDependencyError
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan, SequenceParallel
from autotp_plan.schemas.plan.rules import Rules
from autotp_plan.schemas.plan.without_stream import without_stream
from tests.helpers.checkpoints import write_llama
from tests.helpers.paths import PLANS
from tests.helpers.wrappers import save_wrapper
from tests.planner.fallback.test_vision_tower import Seen

REPLICATED_HEAD = SpecFile.from_dict({"layer_specs": [{"patterns": [r".*lm_head\.weight$"], "partition_type": "skip"}]})
STREAM = SequenceParallel(
    layers=("model.layers.{0..1}",),
    gather=("model.layers.{0..1}.mlp", "model.layers.{0..1}.self_attn"),
    scatter=("model.layers.{0..1}.mlp.down_proj", "model.layers.{0..1}.self_attn.o_proj"),
    end="model.norm",
)


WORDS = (
    "the stream of 2 layers is sharded; all-gather before mlp, self_attn; "
    "reduce-scatter behind mlp.down_proj, self_attn.o_proj; all-gather behind model.norm"
)
NOTHING_WRONG = Seen()


class Tried:
    """A prover that keeps the plans that it is asked about, and finds what it is told where the stream is sharded."""

    def __init__(self, found: Seen | Exception = NOTHING_WRONG) -> None:
        self.plans: list[Plan] = []
        self.found = found

    def __call__(self, plan: Plan) -> Seen:
        self.plans.append(plan)
        if plan.sequence_parallel is None:
            return Seen()
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def infer_llama(_: Any) -> SpecFile:
    return dataclasses.replace(read_preset("llama"), name=None, model_types=(), description="")


def never(_: Plan) -> Any:
    raise AssertionError("a preset's plan is taken as it is")


def test_the_plan_of_a_preset(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    before, plan = (compile_plan(folder, tp_size=2, sequence_parallel=on, prove=never) for on in (False, True))
    assert plan.sequence_parallel == STREAM
    assert plan.rules == Rules(sequence_parallel=True)
    marked = {entry.name for entry in plan.parameters if entry.partial_gradient}
    assert marked == {
        "model.layers.{0..1}.input_layernorm.weight",
        "model.layers.{0..1}.post_attention_layernorm.weight",
        "model.norm.weight",
    }
    unmarked = tuple(dataclasses.replace(entry, partial_gradient=False) for entry in plan.parameters)
    assert dataclasses.replace(plan, parameters=unmarked, sequence_parallel=None, rules=None) == before
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


@pytest.mark.parametrize("section", [{"autotp_size": 2}, None])
def test_what_decides_nothing_needs_no_proof(tmp_path: Path, section: dict[str, Any] | None) -> None:
    folder = write_llama(tmp_path / "model")
    given = None if section is None else parse_section(section)
    assert compile_plan(folder, tp_size=2, sequence_parallel=True, prove=never, deepspeed=given, uneven=True)


def llama(folder: Path) -> dict[str, Any]:
    return {"model": write_llama(folder)}


OTHERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a spec file": lambda folder: {**llama(folder), "specs": [REPLICATED_HEAD]},
    "a DeepSpeed config": lambda folder: {
        **llama(folder), "deepspeed": parse_section({"preset_model": "llama", "vocab_parallel_lm_head": False})
    },
    "inference": lambda folder: {**llama(folder), "preset": "infer", "infer": infer_llama},
    "a wrapper": lambda folder: {"model": save_wrapper(folder, "llava")},
    "a wrapper whose tower is sharded": lambda folder: {"model": save_wrapper(folder, "llava"), "cut_vision": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_plan_is_proven_with_the_stream_sharded(tmp_path: Path, name: str) -> None:
    options = OTHERS[name](tmp_path)
    tried = Tried()
    plan = compile_plan(**options, tp_size=2, sequence_parallel=True, prove=tried)
    assert plan.sequence_parallel is not None
    assert tried.plans[-1].parameters == plan.parameters
    assert tried.plans[-1].sequence_parallel == plan.sequence_parallel
    assert plan.rules is not None and plan.rules.sequence_parallel


@pytest.mark.parametrize("name", OTHERS)
def test_one_that_turns_out_wrong_is_refused(tmp_path: Path, name: str) -> None:
    options = OTHERS[name](tmp_path)
    with pytest.raises(
        CompileError, match=r"(?s)with --sequence-parallel, a twin.*logits differ.*compile without"
    ) as e:
        compile_plan(**options, tp_size=2, sequence_parallel=True, prove=Tried(Seen(problem="logits differ")))
    assert [fault.code for fault in e.value.faults] == ["wrong-sequence-parallel"]
    assert compile_plan(**options, tp_size=2, prove=Tried()).sequence_parallel is None


def test_a_live_module_is_proven(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96))
    tried = Tried()
    assert compile_plan(model, tp_size=2, sequence_parallel=True, prove=tried).sequence_parallel == STREAM
    assert len(tried.plans) == 1


def test_without_a_way_to_prove_it(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    with pytest.raises(CompileError, match=r"autotp_plan\.runtime\.try_plan") as e:
        compile_plan(folder, tp_size=2, sequence_parallel=True, specs=[REPLICATED_HEAD])
    assert [fault.code for fault in e.value.faults] == ["unproven-sequence-parallel"]


def test_what_a_proof_may_find(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tp_size": 2, "sequence_parallel": True, "specs": [REPLICATED_HEAD]}
    folder = write_llama(tmp_path / "model")
    partial = Tried(Seen(partial_gradients=("a.b",)))
    with pytest.raises(CompileError, match=r"gradients that stay partial: a\.b"):
        compile_plan(folder, **options, prove=partial)
    cannot = Tried(MismatchError(Fault(what="there is no twin", where="x", got="a class of one's own")))
    with pytest.raises(CompileError, match="it cannot be tried: there is no twin"):
        compile_plan(folder, **options, prove=cannot)
    missing = Tried(MissingDependencyError(Fault(what="no torch", where="x")))
    with pytest.raises(MissingDependencyError):
        compile_plan(folder, **options, prove=missing)


def test_a_model_without_layers_to_shard(tmp_path: Path) -> None:
    nothing = SpecFile.from_dict({"layer_specs": [{"patterns": [".*"], "partition_type": "skip"}]})
    folder = write_llama(tmp_path / "model")
    with pytest.raises(CompileError, match="compile without --sequence-parallel") as e:
        compile_plan(folder, tp_size=2, sequence_parallel=True, specs=[nothing], prove=Tried(), preset="none")
    assert [fault.code for fault in e.value.faults] == ["no-sequence-parallel"]
    assert compile_plan(folder, tp_size=2, specs=[nothing], preset="none")


def test_one_rank_holds_all_tokens_and_the_option_is_remembered(tmp_path: Path) -> None:
    """The plan is the one without the option; for another number of ranks it is compiled with it again."""
    folder = write_llama(tmp_path / "model")
    plan = compile_plan(folder, tp_size=1, sequence_parallel=True)
    assert plan.sequence_parallel is None
    assert plan.fingerprint == compile_plan(folder, tp_size=1).fingerprint
    two = recompiled(plan, folder, 2, False, Helpers())
    assert two == compile_plan(folder, tp_size=2, sequence_parallel=True)
    assert recompiled(two, folder, 1, False, Helpers()).to_json() == plan.to_json()


def test_resharding_proves_what_compile_proves(tmp_path: Path) -> None:
    folder, options = write_llama(tmp_path / "model"), {"specs": [REPLICATED_HEAD], "sequence_parallel": True}
    plan = compile_plan(folder, tp_size=2, prove=Tried(), **options)  # type: ignore[arg-type]
    with pytest.raises(CompileError, match="a plan without a preset needs proof, for each number of ranks"):
        recompiled(plan, folder, 4, False, Helpers())
    tried = Tried()
    four = recompiled(plan, folder, 4, False, Helpers(prove=tried))
    assert [one.tp_size for one in tried.plans] == [2, 4]
    assert four == compile_plan(folder, tp_size=4, prove=Tried(), **options)  # type: ignore[arg-type]


def test_a_plan_whose_rules_were_removed_keeps_its_stream(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    plan = dataclasses.replace(compile_plan(folder, tp_size=2, sequence_parallel=True), rules=None)
    assert recompiled(plan, folder, 4, False, Helpers()) == compile_plan(folder, tp_size=4, sequence_parallel=True)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_command(tmp_path: Path, tp_size: int) -> None:
    folder, output = write_llama(tmp_path / "model"), tmp_path / "plan.json"
    command = ["compile", "--model", str(folder), "--tp", str(tp_size), "--sequence-parallel", "-o", str(output)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert ("sequence parallel: not at TP=1" if tp_size == 1 else f"sequence parallel: {WORDS}") in done.output
    assert Plan.read(output) == compile_plan(folder, tp_size=tp_size, sequence_parallel=True)
    assert Plan.read(output).rules == Rules(sequence_parallel=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Plan]:
    """Two plans of a model: without sequence parallelism, and with it."""
    folder = write_llama(tmp_path_factory.mktemp("llama"))
    without, plan = (compile_plan(folder, tp_size=2, sequence_parallel=on) for on in (False, True))
    return without, plan


def test_it_is_shown(both: tuple[Plan, Plan], tmp_path: Path) -> None:
    without, plan = both
    assert f"sequence parallel: {WORDS}" in describe(plan)
    assert not any("sequence parallel" in line for line in describe(without))
    assert as_json(plan)["sequence_parallel"] == {
        "layers": ["model.layers.0", "model.layers.1"],
        "gather": [f"model.layers.{at}.{name}" for name in ("mlp", "self_attn") for at in (0, 1)],
        "scatter": [f"model.layers.{at}.{name}" for name in ("mlp.down_proj", "self_attn.o_proj") for at in (0, 1)],
        "end": "model.norm",
    }
    assert "sequence_parallel" not in as_json(without)
    one = compile_plan(write_llama(tmp_path / "model"), tp_size=1, sequence_parallel=True)
    assert "sequence parallel: not at TP=1, where the one rank holds every token" in describe(one)
    assert f"Sequence parallel: {WORDS}." in page(plan)
    assert "equence parallel" not in page(without)
    experts = with_sequence_parallel(Plan.read(PLANS / "mixtral_8x7b" / "tp2.json"))
    assert "; each rank takes its tokens behind mlp; " in str(stream_words(experts))


def test_what_is_exchanged_is_drawn(both: tuple[Plan, Plan]) -> None:
    def collectives(plan: Plan, name: str) -> list[list[tuple[str, bool]]]:
        (block,) = (block for section in picture(plan).sections for block in section.blocks if block.name == name)
        return [[(one.what, one.backward) for one in found] for found in (block.before, block.after)]

    for name in ("self_attn", "mlp"):
        around = [[("all-gather", False), ("reduce-scatter", True)], [("reduce-scatter", False)]]
        assert collectives(both[1], name) == around
        assert collectives(both[0], name) == [[("all-reduce", True)], [("all-reduce", False)]]
    ends = [picture(both[1]).sections[at].blocks[0] for at in (0, -1)]
    (embedding, head) = ([[one.what for one in found] for found in (end.before, end.after)] for end in ends)
    assert embedding == [[], ["reduce-scatter"]]
    assert head == [["all-gather", "reduce-scatter"], ["all-gather"]]
    without = Plan.read(PLANS / "mixtral_8x7b" / "tp2.json")
    experts = with_sequence_parallel(without)
    router = [[("all-gather", False), ("reduce-scatter", True)], [("all-gather", True)]]
    assert collectives(experts, "mlp") == router
    assert collectives(experts, "mlp.experts") == collectives(without, "mlp.experts")


def test_turning_it_on_and_off_is_said(both: tuple[Plan, Plan]) -> None:
    without, plan = both
    for old, new, sign in ((without, plan, "added"), (plan, without, "removed")):
        differences = compare_plans(old, new)
        (line,) = (line for line in lines(differences) if line.text.startswith("sequence parallel"))
        assert (line.text, line.kind) == (f"sequence parallel: {WORDS}", sign)
        assert not differences.computes_the_same
        (found,) = (one for one in differences.to_dict()["differences"] if one["of"] == "sequence parallel")
        side = "new" if sign == "added" else "old"
        (field,) = found["fields"]
        assert field[side]["end"] == "model.norm"


def test_other_places_are_said_of_their_modules(both: tuple[Plan, Plan]) -> None:
    _, plan = both
    assert plan.sequence_parallel is not None
    scatter = ("model.layers.{0..1}.mlp", "model.layers.{0..1}.self_attn.o_proj")
    moved = dataclasses.replace(plan, sequence_parallel=dataclasses.replace(plan.sequence_parallel, scatter=scatter))
    differences = compare_plans(plan, moved)
    said = {
        f"{prefix}{row.name} {row.what}: {row.old} -> {row.new}" for prefix, rows in groups(differences) for row in rows
    }
    behind = "each rank has its tokens behind it"
    assert said == {
        f"model.layers.{{0..1}}.mlp sequence parallel: - -> {behind}",
        f"model.layers.{{0..1}}.mlp.down_proj sequence parallel removed: {behind} -> -",
    }
    assert not differences.computes_the_same
    unfolded = tuple(name for pattern in plan.sequence_parallel.gather for name in reversed(expand(pattern)))
    same = dataclasses.replace(plan, sequence_parallel=dataclasses.replace(plan.sequence_parallel, gather=unfolded))
    assert compare_plans(plan, same).equal


def test_it_can_be_taken_out_again(both: tuple[Plan, Plan]) -> None:
    without, plan = both
    assert dataclasses.replace(without_stream(plan), rules=None) == without
    assert without_stream(without) is without
    for path in sorted(PLANS.glob("*/tp2.json")):
        one = Plan.read(path)
        assert without_stream(with_sequence_parallel(one)) == one, path


def test_plain_deepspeed_cannot_do_it_and_trains_rightly_without(both: tuple[Plan, Plan]) -> None:
    exported, plain = export_to_deepspeed(both[1]), export_to_deepspeed(both[0])
    assert [one.where for one in exported.obstacles] == ["sequence_parallel"]
    assert exported.trains_rightly
    assert plain.obstacles == ()
    assert exported.partition_config == plain.partition_config
    assert exported.share == plain.share


def test_an_estimate_from_the_plan_alone_says_what_it_does_not_count(both: tuple[Plan, Plan]) -> None:
    without, plan = (estimate_from_plan(one, Settings()) for one in both)
    assert any("all-gathers and reduce-scatters of activations" in one for one in plan.missing)
    assert any("all-reduces of activations" in one for one in without.missing)
    assert without.ranks == plan.ranks
