"""The files in `plans/`: what compiling gives today, and what the real checkpoints hold.

Run as a program it writes every plan that `plans/models.json` lists, from the configs beside it:

    python -m tests.plans.test_golden_plans

Here the plans of models without a preset of their own are taken for right; `tests/runtime/verify` proves them all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotp_plan.planner import Plan, SpecFile, check_checkpoint, check_plan, compile_plan
from tests.helpers.paths import PLANS
from tests.helpers.sparse import Tensors, llama_tensors, neox_tensors, write_sparse_checkpoint

pytestmark = pytest.mark.sweep

MODELS: dict[str, dict[str, Any]] = json.loads((PLANS / "models.json").read_text())
CHECKPOINTS = {  # of these the tensors on the hub are written out here, and the number of their files
    "llama_3_1_8b": (llama_tensors, 4),
    "pythia_6_9b": (neox_tensors, 2),
}


@dataclass(frozen=True)
class Golden:
    """A plan that `models.json` lists."""

    model: str
    tp_size: int
    uneven: bool

    @property
    def file(self) -> Path:
        return PLANS / self.model / f"tp{self.tp_size}.json"

    @property
    def inferred(self) -> Path:
        """What `autotp-plan infer` wrote for a model without a preset."""
        return self.file.with_name("spec.json")

    @cache  # noqa: B019  (frozen, and a few kilobytes each)
    def plan(self) -> Plan:
        return Plan.read(self.file)

    def compiled(self, model: Path | None = None) -> Plan:
        """What the config (or the checkpoint `model`) compiles to.

        On meta throughout: Llama 4 asks torch for zeros of gigabytes, a layer at a time.
        """
        infer = (lambda _: SpecFile.read(self.inferred)) if self.inferred.exists() else None
        with torch.device("meta"):
            return compile_plan(
                model or self.file.parent, tp_size=self.tp_size, uneven=self.uneven, infer=infer, prove=right
            )

    def __str__(self) -> str:
        return f"{self.model}/tp{self.tp_size}"


GOLDEN = [
    Golden(name, tp_size, key == "uneven_tp_sizes")
    for name, model in MODELS.items()
    for key in ("tp_sizes", "uneven_tp_sizes")
    for tp_size in model.get(key, ())
]

MANY_TENSORS = {"deepseek_v2", "kimi_k2", "minimax_m2_5", "qwen3_next_80b_a3b"}  # above 29 000
UNUSED = {  # tensors of multi-token prediction, which the checkpoint on the hub has and the model does not
    "glm_4_5_air": ("model.layers.46.enorm.weight", "model.layers.46.mlp.experts.0.up_proj.weight"),
}
PUBLISHED = json.loads((Path(__file__).parent / "published_names.json").read_text())
INFERRED = [name for name, model in MODELS.items() if model.get("rules") == "inferred"]
NOTES = {"inferred": "The rules were inferred from the model itself", "wrapper": "its language model, "}

every_plan = pytest.mark.parametrize("golden", GOLDEN, ids=str)


def right(plan: Plan) -> Any:
    """A proof that finds nothing wrong."""
    return SimpleNamespace(partial_gradients=(), problem=None)


def config_and_tensors(model: str) -> tuple[dict[str, Any], Tensors]:
    config = json.loads((PLANS / model / "config.json").read_text())
    return config, CHECKPOINTS[model][0](config)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint of one of the models, in a folder of the model's name."""
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    folder.mkdir()
    write_sparse_checkpoint(folder, *config_and_tensors(request.param), num_files=CHECKPOINTS[request.param][1])
    return folder


def test_the_folders_hold_what_is_listed() -> None:
    assert list(MODELS) == sorted(MODELS)
    found = {file.relative_to(PLANS).as_posix() for file in PLANS.glob("*/*.json")}
    configs = {f"{name}/config.json" for name in MODELS} | {f"{name}/spec.json" for name in INFERRED}
    assert found == configs | {golden.file.relative_to(PLANS).as_posix() for golden in GOLDEN}


@pytest.mark.parametrize("name", MODELS)
def test_the_readme_lists_every_model(name: str) -> None:
    model = MODELS[name]
    sizes = [(size, "") for size in model["tp_sizes"]] + [(size, "u") for size in model.get("uneven_tp_sizes", ())]
    listed = ", ".join(f"{size}{mark}" for size, mark in sorted(sizes))
    row = f"| `{name}` | [{model['hub']}](https://huggingface.co/{model['hub']}) | {listed} |"
    assert row in (PLANS / "README.md").read_text()


@every_plan
def test_compiling_the_config_again_gives_the_same_bytes(golden: Golden) -> None:
    assert golden.compiled().to_json().encode() == golden.file.read_bytes()


@every_plan
def test_nothing_is_wrong_with_a_plan(golden: Golden) -> None:
    plan = golden.plan()
    assert check_plan(plan) == []
    assert plan.to_json().encode() == golden.file.read_bytes()
    rules = MODELS[golden.model].get("rules")
    notes = [text for text in plan.notes if not any(name in text for name in plan.ignored)]
    assert len(notes) == (0 if rules is None else 1)
    assert all(NOTES[str(rules)] in text for text in notes)
    assert sum(math.prod(plan.shape_of(entry)) for entry in plan.expanded()) == MODELS[golden.model]["parameters"]


def tensors_of(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors on disk that a plan speaks of: one expert at a time, where a parameter holds all of them."""
    found = {}
    for entry in plan.expanded():
        shape, names = plan.shape_of(entry), entry.names_on_disk()
        if entry.sources is not None:
            shape = shape[1:] if entry.sources.stacked else shape
            shape = (shape[0] // len(entry.sources.names), *shape[1:])
        if entry.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        found.update(dict.fromkeys(names, (entry.dtype, shape)))
    return found


@pytest.mark.parametrize("name", sorted(MODELS.keys() - MANY_TENSORS))
def test_a_checkpoint_of_the_tensors_of_a_plan_compiles_to_its_bytes(name: str, tmp_path: Path) -> None:
    golden = next(golden for golden in GOLDEN if golden.model == name)
    config = json.loads((PLANS / name / "config.json").read_text())
    tensors = tensors_of(golden.plan())
    write_sparse_checkpoint(tmp_path, config, tensors, num_files=3)
    assert golden.compiled(tmp_path).to_json().encode() == golden.file.read_bytes()
    if name in UNUSED:
        unused = dict.fromkeys(UNUSED[name], ("BF16", (1, 1)))
        write_sparse_checkpoint(tmp_path, config, {**tensors, **unused}, num_files=3)
    assert check_checkpoint(golden.plan(), tmp_path) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_has_the_names_of_the_published_checkpoint(name: str) -> None:
    """Names (and shapes, where they are told) that public repositories quote from the checkpoint on the hub."""
    tensors = tensors_of(next(golden for golden in GOLDEN if golden.model == name).plan())
    for tensor, shape in PUBLISHED[name]["tensors"].items():
        assert tensor in tensors
        assert shape is None or tensors[tensor][1] == tuple(shape)


def test_the_checkpoint_compiles_to_the_bytes_that_its_config_compiles_to(checkpoint: Path) -> None:
    for golden in GOLDEN:
        if golden.model == checkpoint.name:
            assert golden.compiled(checkpoint).to_json().encode() == golden.file.read_bytes()


def test_plans_fit_the_names_on_disk(checkpoint: Path) -> None:
    for golden in GOLDEN:
        if golden.model == checkpoint.name:
            assert check_checkpoint(golden.plan(), checkpoint) == []


def test_a_plan_does_not_fit_a_checkpoint_that_lacks_its_head(tmp_path: Path) -> None:
    config, tensors = config_and_tensors("pythia_6_9b")
    renamed = {name.replace("embed_out", "head"): entry for name, entry in tensors.items()}
    write_sparse_checkpoint(tmp_path, config, renamed, num_files=2)
    found = [
        (fault.what, fault.where) for fault in check_checkpoint(Plan.read(PLANS / "pythia_6_9b/tp4.json"), tmp_path)
    ]
    assert found == [
        ("a tensor of the plan is missing", "embed_out.weight"),
        ("the checkpoint has a tensor that the plan does not know", "head.weight"),
    ]


@pytest.mark.parametrize("golden", [g for g in GOLDEN if g.model in CHECKPOINTS], ids=str)
def test_a_plan_holds_every_parameter_of_the_model_once(golden: Golden) -> None:
    plan = golden.plan()
    _, tensors = config_and_tensors(golden.model)
    planned = {entry.source or entry.name: (entry.dtype, plan.shape_of(entry)) for entry in plan.expanded()}
    tables = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    assert planned == {name: entry for name, entry in tensors.items() if not name.endswith(tables)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", INFERRED)
def test_a_spec_file_is_what_is_inferred(name: str) -> None:
    """Apart from layers of multi-token prediction, which only the checkpoint has: those are added by hand."""
    from autotp_plan.inference.infer import infer_rules

    kept = SpecFile.read(PLANS / name / "spec.json")
    assert infer_rules(PLANS / name) == dataclasses.replace(kept, ignored_layers={}, ignored_tensors=())


def write_plans() -> None:
    """Compile every plan again; say which changed."""
    for golden in GOLDEN:
        text = golden.compiled().to_json().encode()
        if not golden.file.exists() or golden.file.read_bytes() != text:
            golden.file.write_bytes(text)
            sys.stdout.write(f"{golden.file.relative_to(PLANS.parent)}: {len(text):,} bytes\n")


if __name__ == "__main__":
    write_plans()
