"""The proof of a plan for a model that is not from transformers: its twin is what the user's function makes.

The twin has the widths of the model divided by a number, and as many heads; or the sizes that the user gives; or it is
the model itself, where that is small. It is run as `factories.example_batch` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from autotp_plan.factories.example_batch import Batch, batches_for, run, settle, without_dropout
from autotp_plan.factories.example_batch import Batches as TokenBatches
from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.factories.small_sizes import Changes, roles_of
from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.runtime.loading.check_model import check_model
from autotp_plan.runtime.tensor_parallel.torch_internals import muon_orthogonalises_with
from autotp_plan.runtime.tensor_parallel.weight_reads import watch_reads
from autotp_plan.runtime.training_plan import load_plan
from autotp_plan.runtime.verify.compare import errors, partial_gradients
from autotp_plan.runtime.verify.compute_share import forward_operations
from autotp_plan.runtime.verify.dense import ABOUT_NAME, MOST_PARAMETERS, PLAN_NAME, tensors_on_disk
from autotp_plan.runtime.verify.float64_passes import (
    Numbers,
    PromoteToFloat64,
    dense_reader,
    run_passes_and_steps,
    shard_reader,
)
from autotp_plan.runtime.verify.optimizer_steps import (
    ADAMW,
    Training,
    dense_steps,
    engine_steps,
    optimizer_class,
    orthogonalised,
    relative_errors,
)
from autotp_plan.runtime.verify.random_inputs import randomise
from autotp_plan.runtime.verify.report import OUTPUTS, Pass
from autotp_plan.runtime.verify.scale_plan import TwinError, twin_plan
from autotp_plan.runtime.verify.sharded import write_errors
from autotp_plan.schemas.errors import AutoTPError, Fault, MismatchError, OptionError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import SINGLE_NAME

KIND = "own"
"""What stands in the place of an attention implementation: the model has its own."""
_LENGTH = 12
_BATCHES = "batches.pt"


def write_own_twin(plan: Plan, folder: Path, factory: ModuleFactory, optimizer: str) -> None:
    """As `dense.write_twin`, for the model that `factory` makes.

    Raises:
        OptionError: there is no such optimizer, or the function cannot be called.
        MismatchError: the model is not the plan's, or no twin can be made and run.
    """
    if optimizer != ADAMW:
        optimizer_class(optimizer)
    original = factory.on_meta()
    try:
        check_model(original, plan)
    except MismatchError as error:
        raise MismatchError([replace(fault, next=_SAME_ARGUMENTS) for fault in error.faults]) from None
    reasons: list[str] = []
    refused: list[Fault] = []
    for divisor, changes in _candidates(factory):
        try:
            _write(plan, original, folder, factory, divisor, changes, optimizer)
            return
        except AutoTPError as error:
            refused += [fault for fault in error.faults if fault.code not in (None, "factory-raised")]
            reasons.append(f"{_shown(changes)}: {error.faults[0].got}")
        except Exception as error:  # the user's code, for sizes that do not go together
            reasons.append(f"{_shown(changes)}: {type(error).__name__}: {str(error)[:500]}")
    raise MismatchError(refused[-1] if refused else _no_twin(factory, reasons))


def run_own_rank(folder: Path, factory: ModuleFactory) -> None:
    """As `sharded.run_rank`, for a twin that `write_own_twin` wrote."""
    about = json.loads((folder / ABOUT_NAME).read_text())
    factory = replace(factory, small=(about["arguments"],))
    batches: dict[int, Batch] = torch.load(folder / _BATCHES, weights_only=False)  # written by this program just now
    plan = load_plan(folder / "float64" / PLAN_NAME)
    rank = plan.init_mesh().tp_rank
    dense = torch.load(folder / f"{KIND}.pt", mmap=True)

    def model_in(dtype: str) -> Any:
        torch.manual_seed(0)
        model = plan.load_model(folder / dtype, model=factory.build)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(getattr(torch, dtype)))
        without_dropout(model)
        return model.train(about["training"])

    model = model_in("float64")
    evaluation = _evaluated(model, batches[Pass.FIRST.seed])
    with watch_reads() as reads:
        found = run_passes_and_steps(model, shard_reader(model), list(dense["stepped"]), batches.__getitem__, run)
    _add(found, evaluation)
    write_errors(folder / f"{KIND}.reads-{rank}.json", reads)
    write_errors(folder / f"{KIND}.rank-{rank}.json", errors(dense, found, plan.document, rank))
    operations = forward_operations(model, batches.__getitem__, run)
    write_errors(folder / f"compute.rank-{rank}.json", {"operations": operations})
    partial = partial_gradients(dense, found, plan.document, plan.ranks.tp_group)
    write_errors(folder / f"{KIND}.partial-{rank}.json", {"names": partial})
    plan = load_plan(folder / "float32" / PLAN_NAME)
    training = Training(batches=batches.__getitem__, optimizer=about["optimizer"])
    with muon_orthogonalises_with(orthogonalised):
        steps = engine_steps(plan, model_in("float32"), training, forward=run)
    write_errors(
        folder / f"engine.rank-{rank}.json", relative_errors(json.loads((folder / "engine.json").read_text()), steps)
    )


def _candidates(factory: ModuleFactory) -> Iterator[tuple[int, Changes]]:
    """The arguments of the twins to try, with the number that widths are divided by."""
    if factory.small:
        yield 1, dict(factory.small[0])
        return
    try:
        yield from roles_of(factory, {}).divided()
    except OptionError:  # a model of one size
        yield 1, {}


def _write(
    plan: Plan, original: Any, folder: Path, factory: ModuleFactory, divisor: int, changes: Changes, optimizer: str
) -> None:
    """Make the twin of these arguments, run it, and write all of its files."""
    meta = factory.on_meta(changes)
    num_parameters = sum(parameter.numel() for parameter in meta.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise TwinError(f"a model of {num_parameters} parameters is too large; give a small one's sizes with --small")
    scaled = twin_plan(plan, original, meta, divisor)
    check_model(meta, scaled)
    torch.manual_seed(0)
    model = factory.make(changes).double()
    randomise(model)
    batches = batches_for(model, _LENGTH)
    training = settle(model, batches)
    if plan.sequence_parallel is not None and isinstance(batches, TokenBatches):
        batches = replace(batches, uneven=True)
    steps = Training(batches=batches, optimizer=optimizer)
    seeds = [one.seed for one in Pass] + [steps.seed(step, 0, 0) for step in range(steps.num_steps)]
    torch.save({seed: batches(seed) for seed in seeds}, folder / _BATCHES)
    weights = {name: tensor.detach().clone() for name, tensor in parameters_and_buffers(model)}
    _save(model, scaled, folder / "float64")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [parameter.name for parameter in scaled.expanded() if parameter.name in parameters]
    evaluation = _evaluated(model, batches(Pass.FIRST.seed))
    numbers = run_passes_and_steps(model, dense_reader(model), names, batches, run)
    _add(numbers, evaluation)
    torch.save(numbers, folder / f"{KIND}.pt")
    operations = forward_operations(model, batches, run)
    model = model.float()
    with torch.no_grad():
        for name, tensor in parameters_and_buffers(model):
            tensor.copy_(weights[name])
    model.zero_grad()
    _save(model, twin_plan(plan, original, meta, divisor, "F32"), folder / "float32")
    with muon_orthogonalises_with(orthogonalised):
        (folder / "engine.json").write_text(json.dumps(dense_steps(model, steps, run)))
    about = {
        "name": factory.name,
        "arguments": changes,
        "training": training,
        "optimizer": optimizer,
        "num_parameters": num_parameters,
        "operations": operations,
        "attention": [KIND],
        "ungraded": sorted(set(names) - numbers["accumulated"].keys()),
        "refused": {},
    }
    (folder / ABOUT_NAME).write_text(json.dumps(about))


def _evaluated(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and logits in evaluation and without gradients: where torch's own layers take another way."""
    training = model.training
    with torch.no_grad(), PromoteToFloat64():
        found = run(model.eval(), batch)
    model.train(training)
    return found


def _add(numbers: Numbers, evaluation: tuple[Tensor, Tensor]) -> None:
    for kind, found in zip(OUTPUTS, evaluation):
        numbers[kind]["evaluation"] = found.detach()


def _save(model: Any, scaled: Plan, folder: Path) -> None:
    """Write the checkpoint, its tensors under the names that the plan was compiled from, and its plan."""
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors_on_disk(model, scaled)), folder / SINGLE_NAME)
    (folder / PLAN_NAME).write_text(replace(scaled, model=replace(scaled.model, config=None)).to_json())


def _shown(changes: Changes) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in changes.items()) or "the sizes as they are"


_SAME_ARGUMENTS = "give the function the arguments that the plan was compiled with: --module-args"


def _no_twin(factory: ModuleFactory, reasons: list[str]) -> Fault:
    return Fault(
        code="no-module-twin",
        what="no small model could be made and run, so nothing can be proven",
        where=f"--module {factory.name}",
        got="; ".join(dict.fromkeys((reasons[0], reasons[-1]))) if reasons else "no sizes to try",
        expected="a model that its function makes smaller when it is given smaller sizes, with as many heads",
        next="give the sizes of a small model with --small '{...}'",
    )
