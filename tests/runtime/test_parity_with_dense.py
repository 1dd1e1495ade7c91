"""The sharded model equals the dense one: logits, loss, every gradient, losses and gradient norms of the engine.

Each fixture starts its ranks once and runs every model that a selected test needs; the tests look at one number each.
So `pytest -k tp2-llama` runs one family on one mesh, in seconds.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch
from tests.helpers.models import PRESET_VARIANTS, eager_experts
from tests.helpers.paths import EXAMPLES, PRESETS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

OWN = "own_gpt"
VARIANTS = [*PRESET_VARIANTS, OWN]
IN_FULL = [
    "llama_bias_tied", "qwen3", "phi3", "gpt_neox", "gemma2", "falcon_multi_query", "gpt2", "olmo2", "mixtral",
    "deepseek_v2", "gpt_oss", OWN,
]  # fmt: skip
"""One of each kind of layer; these run under every ZeRO stage, the others under one, without DP."""
RUNS = ["zero0", "zero1", "zero2", "zero3", "accumulation", "overlap"]
MESHES = {"tp2": (2, 1), "tp2 x dp2": (2, 2), "tp4": (4, 1)}
FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5


@cache
def own_gpt() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("own_gpt", EXAMPLES / "own_model" / "gpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT


def forward_of(variant: str) -> Any:
    from tests.helpers.parity import causal_lm

    return (lambda model, tokens: model(tokens, tokens)) if variant == OWN else causal_lm


def builder_of(variant: str) -> Any:
    return own_gpt() if variant == OWN else None


def dense_model(folder: Path, variant: str, dtype: Any) -> Any:
    from safetensors.torch import load_file

    from tests.helpers.models import load_dense

    if variant != OWN:
        return load_dense(folder, dtype, **eager_experts(dtype))
    model = own_gpt()().to(dtype)
    model.load_state_dict(
        {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}, strict=False
    )
    return model


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> set[str]:
    """The variants and planted errors that the selected tests look at."""
    found: set[str] = set()
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function):
            parameters = item.callspec.params if hasattr(item, "callspec") else {"name": FORGOTTEN}
            found.add(str(parameters.get("variant", parameters["name"])))
    return found | (set(PLANTED.values()) if found & PLANTED.keys() else set())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, selected: set[str]) -> Path:
    """Checkpoints, plans, shards and the dense model's numbers of every selected variant."""
    import torch
    from safetensors.torch import save_file

    from autotp_plan.planner import SpecFile, compile_plan, presplit
    from autotp_plan.runtime.verify.random_inputs import randomise
    from tests.helpers import parity
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("parity")
    for variant in [variant for variant in VARIANTS if variant in selected]:
        checkpoint = work / variant
        specs = []
        if variant == OWN:
            checkpoint.mkdir()
            own = own_gpt()()
            randomise(own)
            tensors = {name: value.detach().clone() for name, value in own.named_parameters()}
            save_file(tensors, checkpoint / "model.safetensors")
            specs = [SpecFile.read(Path(__file__).parent.parent / "helpers" / "own_gpt_spec.json")]
        else:
            save_checkpoint(checkpoint, variant)
        for tp_size in (2, 4):
            plan = compile_plan(checkpoint, tp_size=tp_size, specs=specs)
            (work / f"{variant}.tp{tp_size}.json").write_text(plan.to_json())
            presplit(plan, checkpoint, work / f"{variant}.tp{tp_size}")
        forward = forward_of(variant)
        torch.save(
            parity.gradients(dense_model(checkpoint, variant, torch.float64), forward), work / f"{variant}.dense"
        )
        for dp_size in (1, 2) if variant in IN_FULL else (1,):
            for accumulation in (1, 2) if variant in IN_FULL else (1,):
                steps = parity.dense_steps(
                    dense_model(checkpoint, variant, torch.float32), dp_size, forward, accumulation
                )
                (work / f"{variant}.dp{dp_size}.ga{accumulation}.json").write_text(json.dumps(steps))
    if selected & PLANTED.keys():
        plant_errors(work)
    return work


def plant_errors(work: Path) -> None:
    """Plans that are wrong on purpose, each sound by its own arithmetic."""
    from autotp_plan.planner import Plan, SpecFile, compile_plan

    neox = json.loads((work / "gpt_neox.tp2.json").read_text())
    rules = json.loads((PRESETS / "gpt_neox.json").read_text())
    rules["layer_specs"][0] |= {"shape": [3, -1], "unit": "head_dim"}
    wrong = compile_plan(work / "gpt_neox", tp_size=2, preset="none", specs=[SpecFile.from_dict(rules)])
    assert wrong.fingerprint != neox["fingerprint"]
    (work / "qkv concatenated.json").write_text(wrong.to_json())
    qwen3 = Plan.read(work / "qwen3.tp2.json")
    without = [dataclasses.replace(entry, partial_gradient=False) for entry in qwen3.parameters]
    (work / f"{FORGOTTEN}.json").write_text(dataclasses.replace(qwen3, parameters=tuple(without)).to_json())
    phi3 = Plan.read(work / "phi3.tp2.json")
    (work / "head counts forgotten.json").write_text(dataclasses.replace(phi3, module_attributes=()).to_json())
    swapped = {
        name: dataclasses.replace(layout, intervals=layout.intervals[::-1]) if name == "64x96 dim 1" else layout
        for name, layout in Plan.read(work / "llama.tp2.json").layouts.items()
    }
    llama = dataclasses.replace(Plan.read(work / "llama.tp2.json"), layouts=swapped)
    (work / "down_proj of the other rank.json").write_text(llama.to_json())
    glm = Plan.read(work / "glm.tp2.json")
    fused = next(entry.layout for entry in glm.parameters if entry.name.endswith("gate_up_proj.weight"))
    halves = dataclasses.replace(glm.layouts[fused], intervals=(((0, 96),), ((96, 192),)))
    glm = dataclasses.replace(glm, layouts={**glm.layouts, fused: halves})
    (work / "gate to one rank and up to the other.json").write_text(glm.to_json())
    phi = Plan.read(work / "phi_qk_layernorm.tp2.json")
    without = [dataclasses.replace(entry, partial_gradient=False) for entry in phi.parameters]
    phi = dataclasses.replace(phi, parameters=tuple(without))
    (work / "partial gradient of a bias forgotten.json").write_text(phi.to_json())


FORGOTTEN = "partial gradient forgotten"
PLANTED = {
    "qkv concatenated": "gpt_neox",
    FORGOTTEN: "qwen3",
    "head counts forgotten": "phi3",
    "down_proj of the other rank": "llama",
    "gate to one rank and up to the other": "glm",
    "partial gradient of a bias forgotten": "phi_qk_layernorm",
}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> dict[str, dict[str, list[str]]]:
    """By mesh and variant the runs of the engine that the selected tests look at."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in MESHES}
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            parameters = item.callspec.params
            if "run" in parameters:
                variants = found[str(parameters["name"])]
                variants.setdefault(str(parameters["variant"]), []).append(str(parameters["run"]))
    return found


def variants_on(tp_size: int, dp_size: int) -> list[str]:
    """The variants that a mesh runs."""
    return VARIANTS if dp_size == 1 else IN_FULL


def in_ranks(
    work: Path, tp_size: int, variants: list[str], runs: dict[str, list[str]], planted: dict[str, str]
) -> dict[str, Any]:
    """Everything that one mesh is asked for, by variant."""
    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    settings: dict[str, dict[str, Any]] = {
        "accumulation": {"zero_stage": 2, "accumulation": 2},
        "overlap": {"zero_stage": 3, "tensor_parallel": {"autotp_size": tp_size, "tp_overlap_comm": True}},
    }
    found: dict[str, Any] = {}
    for variant in variants:
        forward, build = forward_of(variant), builder_of(variant)
        plan_file, shards = work / f"{variant}.tp{tp_size}.json", work / f"{variant}.tp{tp_size}"
        plan = load_plan(plan_file)
        numbers: dict[str, Any] = {}
        dense = work / f"{variant}.dense"
        numbers["shards"] = parity.compare_sharded(plan_file, shards, dense, build, forward)
        numbers["checkpoint"] = parity.compare_sharded(plan_file, work / variant, dense, build, forward)
        for run in runs.get(variant, []):
            model = plan.load_model(shards, model=build).train()
            options = settings.get(run) or {"zero_stage": int(run.removeprefix("zero"))}
            numbers[run] = parity.engine_steps(plan, model, forward=forward, **options)
        found[variant] = numbers
    for name, variant in planted.items():
        plan_file = work / f"{name}.json"
        try:
            errors = parity.compare_sharded(plan_file, work / variant, work / f"{variant}.dense")
            found[name] = max(errors, key=lambda key: errors[key]), max(errors.values())
        except RuntimeError as error:
            found[name] = str(error), float("inf")
    return found


def on_mesh(
    name: str, work: Path, selected: set[str], runs: dict[str, dict[str, list[str]]], planted: dict[str, str]
) -> dict[str, Any]:
    tp_size, dp_size = MESHES[name]
    variants = [variant for variant in variants_on(tp_size, dp_size) if variant in selected]
    ranks = launch(in_ranks, tp_size * dp_size, work, tp_size, variants, runs[name], planted, timeout=800)
    found: dict[str, Any] = ranks[0]
    return found


@pytest.fixture(scope="module")
def tp2(work: Path, selected: set[str], runs: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    planted = PLANTED if selected & PLANTED.keys() else {}
    return on_mesh("tp2", work, selected, runs, planted)


@pytest.fixture(scope="module")
def tp2_dp2(work: Path, selected: set[str], runs: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    return on_mesh("tp2 x dp2", work, selected, runs, {})


@pytest.fixture(scope="module")
def tp4(work: Path, selected: set[str], runs: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    return on_mesh("tp4", work, selected, runs, {})


@pytest.fixture
def mesh(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    """What the ranks of one mesh found."""
    found: dict[str, Any] = request.getfixturevalue({"tp2": "tp2", "tp2 x dp2": "tp2_dp2", "tp4": "tp4"}[name])
    return found


def upstream(name: str) -> Any:
    """Every family, on one mesh: transformers 5.24 computed CodeGen's heads in a new way, and no name had moved."""
    return [pytest.mark.upstream] if name == "tp2" else []


ON_MESHES = [(name, variant) for name, mesh in MESHES.items() for variant in variants_on(*mesh)]


@pytest.mark.parametrize("source", ["shards", "checkpoint"])
@pytest.mark.parametrize(("name", "variant"), [pytest.param(n, v, marks=upstream(n)) for n, v in ON_MESHES])
def test_logits_loss_and_gradients_equal_the_dense_models(
    mesh: dict[str, Any], name: str, variant: str, source: str
) -> None:
    errors = mesh[variant][source]
    assert len(errors) > 10
    assert max(errors.values()) < FLOAT64_TOLERANCE, {n: e for n, e in errors.items() if e >= FLOAT64_TOLERANCE}


def slow(name: str, variant: str, run: str) -> list[Any]:
    """Without data parallelism each variant has two runs, each run in turn; on `tp2 x dp2` it has every one."""
    at = 2 * IN_FULL.index(variant)
    return (
        [] if name == "tp2 x dp2" or run in [RUNS[(at + more) % len(RUNS)] for more in (0, 1)] else [pytest.mark.slow]
    )


@pytest.mark.parametrize(
    ("name", "variant", "run"),
    [
        *(pytest.param(n, v, "zero2", marks=upstream(n)) for n, v in ON_MESHES if v not in IN_FULL),
        *(
            pytest.param(n, v, run, marks=[*upstream(n), *slow(n, v, run)])
            for n, v in ON_MESHES
            if v in IN_FULL
            for run in RUNS
        ),
    ],
)
def test_losses_and_gradient_norms_of_the_engine_equal_the_dense_models(
    mesh: dict[str, Any], work: Path, name: str, variant: str, run: str
) -> None:
    accumulation, dp_size = 2 if run == "accumulation" else 1, MESHES[name][1]
    dense = json.loads((work / f"{variant}.dp{dp_size}.ga{accumulation}.json").read_text())
    for (loss, norm), (dense_loss, dense_norm) in zip(mesh[variant][run], dense, strict=True):
        assert loss == pytest.approx(dense_loss, rel=FLOAT32_TOLERANCE)
        assert norm == pytest.approx(dense_norm, rel=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_wrong_plan_is_caught(tp2: dict[str, Any], name: str) -> None:
    worst, error = tp2[name]
    assert error > 1e-3, f"{name} went unnoticed: the largest error is {error} in {worst}"


def test_forgotten_partial_gradient_shows_in_gradients_only(tp2: dict[str, Any]) -> None:
    assert "norm" in tp2[FORGOTTEN][0]
