"""What `next:` of a fault of weights proposes works when it is done: each is provoked, and its way out taken.

A case is a generator, as in `tests/planner/test_hints.py`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import Plan, SpecFile, check_plan, compile_plan, convert, presplit
from autotp_plan.schemas.errors import AutoTPError, Fault
from tests.helpers.checkpoints import LLAMA_CONFIG, write_llama

Case = Generator[Callable[[], Any], Fault, None]
CASES: list[tuple[str, str, Callable[[Path], Case]]] = []

SHAPES = {"h.0.up.weight": (8, 4), "h.0.down.weight": (4, 8)}
RULES = SpecFile.from_dict(
    {
        "layer_specs": [
            {"patterns": ["h.*.up.weight"], "partition_type": "column"},
            {"patterns": ["h.*.down.weight"], "partition_type": "row"},
        ]
    }
)


def hint(code: str, says: str) -> Callable[[Callable[[Path], Case]], Callable[[Path], Case]]:
    """A case of the fault `code`, whose `next` has `says` in it."""

    def register(function: Callable[[Path], Case]) -> Callable[[Path], Case]:
        CASES.append((code, says, function))
        return function

    return register


def plan_of(folder: Path) -> Plan:
    """A plan that also passes all checks."""
    plan = compile_plan(folder, tp_size=2, specs=[] if (folder / "config.json").exists() else [RULES])
    assert not check_plan(plan)
    return plan


def pair() -> dict[str, Any]:
    import torch

    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def torch_save(path: Path, value: Any, **options: Any) -> Path:
    import torch

    torch.save(value, path, **options)
    return path


@hint("legacy-torch-file", "write it again in the format of today")
def a_legacy_torch_file(work: Path) -> Case:
    path = torch_save(work / "pytorch_model.bin", pair(), _use_new_zipfile_serialization=False)
    fault = yield lambda: plan_of(work)
    command = shlex.split(fault.next.partition(": ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert path.exists() and plan_of(work)


@hint("torch-file-needs-code", "torch.save its tensors as a dict by name")
def a_torch_file_with_an_object(work: Path) -> Case:
    import torch

    path = torch_save(work / "pytorch_model.bin", {**pair(), "settings": argparse.Namespace(lr=1)})
    yield lambda: plan_of(work)
    tensors = {
        name: value for name, value in torch.load(path, weights_only=False).items() if isinstance(value, torch.Tensor)
    }
    torch_save(path, tensors)
    plan_of(work)


@hint("torch-file-of-other-things", "torch.save the tensors in it as a dict by name")
def a_torch_file_with_a_nested_dict(work: Path) -> Case:
    import torch

    path = torch_save(work / "pytorch_model.bin", {"model": pair(), "step": 3})
    yield lambda: plan_of(work)
    torch_save(path, torch.load(path, weights_only=True)["model"])
    plan_of(work)


@hint("torch-tensor-kind", "make its tensors plain")
def a_sparse_tensor_in_a_torch_file(work: Path) -> Case:
    import torch

    tensors = pair()
    name = next(iter(tensors))
    path = torch_save(work / "pytorch_model.bin", {**tensors, name: tensors[name].to_sparse()})
    yield lambda: plan_of(work)
    loaded = torch.load(path, weights_only=True)
    torch_save(path, {**loaded, name: loaded[name].to_dense().to(torch.bfloat16)})
    plan_of(work)


@hint("torch-file-names", "rename one of the files, in the index too")
def two_torch_files_of_one_name(work: Path) -> Case:
    weight_map: dict[str, str] = {}
    for file, (name, value) in zip(("pytorch_model-1.bin", "model-1.bin"), pair().items()):
        torch_save(work / file, {name: value})
        weight_map[name] = file
    path = work / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield lambda: plan_of(work)
    (work / "model-1.bin").rename(work / "model-2.bin")
    path.write_text(path.read_text().replace('"model-1.bin', '"model-2.bin'))
    plan_of(work)


@hint("nothing-to-convert", "use it as it is")
def converting_safetensors(work: Path) -> Case:
    folder = write_llama(work / "llama")
    yield lambda: convert(folder, work / "out")
    presplit(plan_of(folder), folder, work / "shards")


@hint("explicit-weights", "a config.json without transformers_weights")
def weights_that_the_config_names(work: Path) -> Case:
    folder = write_llama(work / "llama")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "config.json").write_text(json.dumps({**LLAMA_CONFIG, "transformers_weights": "other.safetensors"}))
    yield lambda: plan_of(folder)
    made = write_llama(work / "made")
    (folder / "other.safetensors").rename(made / "model.safetensors")
    plan_of(made)


@hint("adapter-folder", "remove adapter_config.json")
def a_model_with_an_adapter(work: Path) -> Case:
    folder = write_llama(work / "llama")
    (folder / "adapter_config.json").write_text("{}")
    yield lambda: plan_of(folder)
    (folder / "adapter_config.json").unlink()
    plan_of(folder)


@hint("variant-weights", "the name without the variant")
def a_variant(work: Path) -> Case:
    folder = write_llama(work / "llama", num_files=2)
    (folder / "config.json").rename(work / "config.json")
    index = folder / "model.safetensors.index.json"
    names = {path.name: path.name.replace("model", "model.fp16") for path in folder.glob("*.safetensors")}
    text = index.read_text()
    for name, to in names.items():
        text = text.replace(name, to)
        (folder / name).rename(folder / to)
    index.unlink()
    variant = folder / "model.safetensors.index.fp16.json"
    variant.write_text(text)
    yield lambda: plan_of(folder)
    variant.rename(index)
    (work / "config.json").rename(folder / "config.json")
    plan_of(folder)


@hint("consolidated-weights", "fetch the model's files for transformers")
def weights_of_the_authors(work: Path) -> Case:
    folder = write_llama(work / "llama")
    (folder / "config.json").rename(work / "config.json")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    yield lambda: plan_of(folder)
    write_llama(folder)
    plan_of(folder)


@pytest.mark.parametrize(("code", "says", "case"), CASES, ids=[case.__name__ for _, _, case in CASES])
def test_what_next_proposes_works(tmp_path: Path, code: str, says: str, case: Callable[[Path], Case]) -> None:
    steps = case(tmp_path)
    provoke = next(steps)
    with pytest.raises(AutoTPError) as caught:
        provoke()
    (fault,) = caught.value.faults
    assert fault.code == code and says in fault.next, fault
    with pytest.raises(StopIteration):
        steps.send(fault)
