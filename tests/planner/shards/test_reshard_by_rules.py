"""A shards folder remembers the rules of its plan: `reshard --tp` makes the plan that `compile` makes, proven too."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.planner import compile_plan, merge, presplit, reshard
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.deepspeed.read_config import parse_section
from autotp_plan.planner.plan_table import describe
from autotp_plan.planner.rules.preset_files import preset_names, read_preset
from autotp_plan.schemas.errors import CompileError, DocumentError, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Repository
from autotp_plan.schemas.plan.rules import Rules
from autotp_plan.schemas.shards.manifest import PLAN_NAME
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint, write_llama
from tests.helpers.random_shards import files_of

HEAD = {"layer_specs": [{"patterns": [r".*lm_head\.weight$"], "partition_type": "skip"}]}
MLP = {
    "name": "mlp",
    "description": "A long text that says what this is for.",
    "symbols": {"wide": ["intermediate_size", "ffn"]},
    "layer_specs": [
        {
            "patterns": [r".*\.(gate|up)_proj\.weight$"],
            "partition_type": "COLUMN",
            "shape": [["wide"], -1],
            "model_types": [],
        }
    ],
}
NANO = {
    "layer_specs": [
        {"patterns": [r".*\.c_fc\.(weight|bias)$"], "partition_type": "column"},
        {"patterns": [r".*\.c_out\.weight$"], "partition_type": "row"},
        {"patterns": [r".*\.c_attn\.weight$", r".*\.c_proj\.weight$", r"w[tp]e\.weight$"], "partition_type": "skip"},
    ]
}
SECTION = {
    "autotp_size": 2,
    "dtype": "bf16",
    "tp_overlap_comm": True,
    "partition_config": {
        "use_default_specs": True,
        "layer_specs": [{"patterns": [r".*\.mlp\..*\.weight$"], "partition_type": "skip"}],
    },
}
WITH_RULES: dict[str, dict[str, Any]] = {
    "a spec file": {"specs": [HEAD]},
    "two spec files": {"specs": [HEAD, MLP]},
    "a spec file and a preset by name": {"specs": [MLP], "preset": "llama"},
    "a DeepSpeed config": {"deepspeed": SECTION},
    "a strict DeepSpeed config and a spec file": {"deepspeed": SECTION, "specs": [HEAD], "strict": True},
    "a preset of DeepSpeed": {"deepspeed": {"preset_model": "llama"}},
    "sequence parallelism": {"sequence_parallel": True},
}


def options_of(name: str) -> dict[str, Any]:
    """The arguments of `compile_plan`, without the TP size."""
    given = dict(WITH_RULES[name])
    if "specs" in given:
        given["specs"] = [SpecFile.from_dict(spec) for spec in given["specs"]]
    if "deepspeed" in given:
        given["deepspeed"] = dataclasses.replace(parse_section(given["deepspeed"]), tp_size=None)
    return given


class Proofs:
    """A prover that notes what it is asked, and finds a problem at some TP sizes."""

    def __init__(self, wrong: Sequence[int] = ()) -> None:
        self.asked: list[int] = []
        self.wrong = wrong

    def __call__(self, plan: Plan) -> Any:
        self.asked.append(plan.tp_size)
        return SimpleNamespace(partial_gradients=(), problem="numbers differ" if plan.tp_size in self.wrong else None)


def infer_llama(_: Any) -> SpecFile:
    """The rules of a model that has no preset."""
    return dataclasses.replace(read_preset("llama"), name=None, model_types=(), description="")


@pytest.mark.parametrize("name", WITH_RULES)
def test_any_rules_are_applied_again(tmp_path: Path, name: str) -> None:
    original, options = write_llama(tmp_path / "original", num_files=2), options_of(name)
    presplit(compile_plan(original, tp_size=2, **options), original, tmp_path / "old")
    reshard(tmp_path / "old", tmp_path / "new", tp_size=4)
    presplit(compile_plan(original, tp_size=4, **options), original, tmp_path / "fresh")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "fresh")
    reshard(tmp_path / "new", tmp_path / "back", tp_size=2)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "old")


@pytest.mark.parametrize("options", [{}, {"specs": [SpecFile.from_dict(HEAD)]}])
def test_the_repository_is_remembered_too(tmp_path: Path, options: Any) -> None:
    original = write_llama(tmp_path / "original")
    plan = compile_plan(original, tp_size=2, **options)
    model = dataclasses.replace(plan.model, repository=Repository(name="org/name", commit="a" * 40))
    presplit(dataclasses.replace(plan, model=model), original, tmp_path / "old")
    reshard(tmp_path / "old", tmp_path / "new", tp_size=4)
    assert Plan.read(tmp_path / "new" / PLAN_NAME).model == model


def test_uneven_shards_stay_uneven(tmp_path: Path) -> None:
    original, specs = write_llama(tmp_path / "original"), [SpecFile.from_dict(HEAD)]
    presplit(compile_plan(original, tp_size=3, specs=specs, uneven=True), original, tmp_path / "old")
    reshard(tmp_path / "old", tmp_path / "new", tp_size=2)
    plan = Plan.read(tmp_path / "new" / PLAN_NAME)
    assert plan.rules is not None and plan.rules.uneven
    presplit(compile_plan(original, tp_size=2, specs=specs), original, tmp_path / "even")
    reshard(tmp_path / "even", tmp_path / "three", tp_size=3, uneven=True)
    assert files_of(tmp_path / "three") == files_of(tmp_path / "old")


def test_the_plan_of_a_preset_is_as_it_was(tmp_path: Path) -> None:
    """Rules do not count: not in the fingerprint, and nowhere where a preset made the plan alone."""
    original = write_llama(tmp_path / "original")
    size = parse_section({"autotp_size": 2})
    for options in ({}, {"preset": "llama"}, {"uneven": True}, {"deepspeed": size}):
        assert "rules" not in compile_plan(original, tp_size=2, **options).to_dict()
    plan = compile_plan(original, tp_size=2, **options_of("two spec files"))
    data = plan.to_dict()
    without = Plan.from_dict({key: value for key, value in data.items() if key != "rules"})
    assert without.fingerprint == plan.fingerprint and without.rules is None
    again = Plan.from_dict(json.loads(plan.to_json()))
    assert (again, again.rules) == (plan, plan.rules) and without == plan
    assert list(data)[-2:] == ["fingerprint", "rules"]
    assert "A long text" not in plan.to_json()
    added = len(plan.to_json()) - len(without.to_json())
    assert added < 2 * len(json.dumps([HEAD, MLP])), "about as long as what the user wrote"


def test_rules_that_do_not_make_the_plan_are_not_used(tmp_path: Path) -> None:
    """A planted error: the rules in the folder are other ones than those of its plan."""
    original = write_llama(tmp_path / "original")
    plan = compile_plan(original, tp_size=2, **options_of("a spec file"))
    other = SpecFile.from_dict(MLP).to_dict()
    for rules in (Rules(specs=(other,)), Rules(), Rules(preset="none"), Rules(preset="qwen2")):
        folder = tmp_path / str(hash(str(rules)))
        presplit(dataclasses.replace(plan, rules=rules), original, folder)
        with pytest.raises(MismatchError, match="rules that make another plan") as caught:
            reshard(folder, tmp_path / "new", tp_size=4)
        assert "--plan" in str(caught.value) and not (tmp_path / "new").exists()
    presplit(dataclasses.replace(plan, rules=Rules(specs=({"layer_spec": []},))), original, tmp_path / "broken")
    with pytest.raises(DocumentError, match="layer_spec"):
        reshard(tmp_path / "broken", tmp_path / "new", tp_size=4)


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that has no preset."""
    config = {**LLAMA_CONFIG, "model_type": "helium", "architectures": ["HeliumForCausalLM"]}
    return write_checkpoint(tmp_path_factory.mktemp("unknown") / "original", llama_shapes(), config)


@pytest.mark.parametrize("preset", ["infer", "auto"])
def test_inferred_rules_are_proven_again(unknown: Path, tmp_path: Path, preset: str) -> None:
    """Inferred once, proven at the new TP size, and at the old one, whose plan must come out again."""
    calls = []

    def infer(given: Any) -> SpecFile:
        calls.append(given)
        return infer_llama(given)

    options: Any = {"preset": preset, "infer": infer_llama, "prove": Proofs()}
    presplit(compile_plan(unknown, tp_size=2, **options), unknown, tmp_path / "old")
    proofs = Proofs()
    reshard(tmp_path / "old", tmp_path / "new", tp_size=4, infer=infer, prove=proofs)
    assert len(calls) == 1 and set(proofs.asked) == {2, 4}
    presplit(compile_plan(unknown, tp_size=4, **options), unknown, tmp_path / "fresh")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("preset", ["infer", "auto"])
def test_what_is_not_proven_is_refused(unknown: Path, tmp_path: Path, preset: str) -> None:
    plan = compile_plan(unknown, tp_size=2, preset=preset, infer=infer_llama, prove=Proofs())
    presplit(plan, unknown, tmp_path / "old")
    with pytest.raises(CompileError, match="numbers differ"):
        reshard(tmp_path / "old", tmp_path / "new", tp_size=4, infer=infer_llama, prove=Proofs(wrong=[4]))
    with pytest.raises(CompileError, match="needs proof") as caught:
        reshard(tmp_path / "old", tmp_path / "new", tp_size=4, infer=infer_llama)
    assert "use `autotp-plan reshard`" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_model_of_a_function_takes_the_function_again(tmp_path: Path) -> None:
    """Nothing is imported because a plan says so."""
    from safetensors.torch import save_file

    factory = ModuleFactory(name="tests.helpers.own_models:Nano")
    original = tmp_path / "original"
    original.mkdir()
    tensors = {name: value.detach().clone() for name, value in factory.make().named_parameters()}
    save_file(tensors, original / "model.safetensors")
    options: Any = {
        "preset": "infer",
        "factory": factory,
        "infer": lambda _: SpecFile.from_dict(NANO),
        "prove": Proofs(),
    }
    presplit(compile_plan(original, tp_size=2, **options), original, tmp_path / "old")
    del options["preset"]
    with pytest.raises(MismatchError, match=r"a model that tests\.helpers\.own_models:Nano made") as caught:
        reshard(tmp_path / "old", tmp_path / "new", tp_size=4, **{**options, "factory": None})
    assert "give --module tests.helpers.own_models:Nano" in str(caught.value)
    reshard(tmp_path / "old", tmp_path / "new", tp_size=4, **options)
    presplit(compile_plan(original, tp_size=4, preset="infer", **options), original, tmp_path / "fresh")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "fresh")


def test_on_the_command_line(tmp_path: Path) -> None:
    original, run = write_llama(tmp_path / "original"), CliRunner()
    (tmp_path / "spec.json").write_text(json.dumps(HEAD))
    (tmp_path / "ds.json").write_text(json.dumps({"tensor_parallel": SECTION}))
    plan, shards, new = (str(tmp_path / name) for name in ("plan.json", "shards", "new"))
    options = ["--spec", str(tmp_path / "spec.json"), "--ds-config", str(tmp_path / "ds.json")]
    for command in (
        ["compile", "--model", str(original), *options, "-o", plan],
        ["presplit", plan, "--checkpoint", str(original), "-o", shards],
        ["reshard", shards, "--tp", "4", "-o", new],
        ["check", new, "--checkpoint", str(original)],
    ):
        done = run.invoke(main, command)
        assert done.exit_code == 0, done.output
    found = Plan.read(tmp_path / "new" / PLAN_NAME)
    assert {str(entry.rule) for entry in found.parameters} >= {"spec file #1", "ds-config #1"}
    merge(new, tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(original)


def test_a_plan_shows_what_it_remembers(tmp_path: Path) -> None:
    original = write_llama(tmp_path / "original")
    plan = compile_plan(original, tp_size=2, uneven=True, **options_of("a strict DeepSpeed config and a spec file"))
    assert "compiled by 1 spec file, a DeepSpeed config, --strict, --uneven, which `reshard` applies again" in describe(
        plan
    )
    assert not any("compiled by" in line for line in describe(compile_plan(original, tp_size=2)))
    assert str(Rules(specs=({}, {}), preset="none", module="a:b", cut_vision=True)) == (
        "2 spec files, preset none, --module a:b, --cut-vision"
    )


def test_every_option_of_compile_is_remembered() -> None:
    """A new one goes into `Rules`, unless it decides nothing or stands elsewhere in the plan, as `dtype` does."""
    options = set(inspect.signature(compile_plan).parameters) - {"model", "tp_size", "prove", "infer", "dtype"}
    assert options == {field.name for field in dataclasses.fields(Rules)} - {"module"} | {"factory"}


@pytest.mark.parametrize("name", preset_names())
def test_a_spec_file_is_written_as_it_was_read(name: str) -> None:
    spec = read_preset(name)
    assert SpecFile.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_collectives_are_written_as_they_were_read() -> None:
    inputs = {"x": "copy", "y": {"copy": [0, "n"]}, "z": {"split": "n", "dim": 1, "unit": 2}, "w": {"split": 4}}
    spec = SpecFile.from_dict({"modules": [{"patterns": ["a"], "inputs": inputs, "output": "reduce"}]})
    assert SpecFile.from_dict(spec.to_dict()) == spec
