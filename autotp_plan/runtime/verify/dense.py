"""The dense side of the proof: find a twin that runs, give it random weights, write its checkpoint and its numbers.

A twin is a small model of the same architecture. Which sizes an architecture accepts is not known beforehand. They are
tried from small to large, and the first twin that runs, gives every parameter a gradient and can be compared in float32
is taken.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from autotp_plan.huggingface import scale_config
from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.runtime.loading.check_model import check_model
from autotp_plan.runtime.loading.empty_model import build_planned
from autotp_plan.runtime.tensor_parallel.torch_internals import muon_orthogonalises_with
from autotp_plan.runtime.verify.compute_share import forward_operations
from autotp_plan.runtime.verify.float64_passes import EXPERTS, PromoteToFloat64, dense_reader, run_passes_and_steps
from autotp_plan.runtime.verify.optimizer_steps import (
    ADAMW,
    Training,
    dense_steps,
    optimizer_class,
    orthogonalised,
    relative_errors,
)
from autotp_plan.runtime.verify.random_inputs import Batches, Images, images_for, randomise
from autotp_plan.runtime.verify.report import MOST_ROUNDING, ROUNDINGS
from autotp_plan.runtime.verify.scale_plan import TwinError, num_layers_needed, twin_plan
from autotp_plan.schemas.errors import AutoTPError, Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import (
    CONFIG_NAME,
    SINGLE_NAME,
    planned_config,
    read_checkpoint,
    read_config,
)

PLAN_NAME = "plan.json"
ABOUT_NAME = "about.json"
MOST_PARAMETERS = 100_000_000
_LENGTH = 12
_ENOUGH = 3
"""So many twins are run in search of one in which every parameter has a gradient and rounding stays small."""
_MOST_ROUNDING = MOST_ROUNDING / ROUNDINGS
"""Steps that rounding to float32 changes by more than this cannot be compared with an engine's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a twin is.

    Attributes:
        divisor: of the model's widths.
        layers: number of layers, None for a model without any.
        experts: number of routed experts, None for a model without any.
        num_parameters: number of elements.
        batches: the tokens that it is run on.
        attention: the attention implementations that were run.
        refused: why the others were not.
        ungraded: parameters without a gradient: the loss does not depend on them.
        no_images: why a model that takes images was run without; None where it takes none, or was run with some.
        operations: floating-point operations of a forward of the dense twin.
        rounding: the largest relative difference between its steps in float32 and in float64.
    """

    divisor: int
    layers: int | None
    experts: int | None
    num_parameters: int
    batches: Batches
    attention: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)
    ungraded: tuple[str, ...] = ()
    optimizer: str = ADAMW
    no_images: str | None = None
    operations: int = 0
    rounding: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> About:
        data = json.loads((folder / ABOUT_NAME).read_text())
        return cls(
            **{
                **data,
                "batches": Batches.from_dict(data["batches"]),
                "attention": tuple(data["attention"]),
                "ungraded": tuple(data["ungraded"]),
            }
        )

    def write(self, folder: Path) -> None:
        (folder / ABOUT_NAME).write_text(json.dumps(asdict(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The divisor of a twin's widths, and its numbers of layers and experts."""

    divisor: int
    layers: int | None
    experts: int | None


def options(attention: str) -> dict[str, Any]:
    """The arguments by which transformers builds the model."""
    return {"attn_implementation": attention, **EXPERTS}


def write_twin(plan: Plan, folder: Path, attention: tuple[str, ...], optimizer: str = ADAMW) -> None:
    """Make a twin of the plan's model and write what the ranks need to compare with it.

    Args:
        plan: the plan to prove.
        folder: is given `float64/` and `float32/`, checkpoints with a `plan.json`; `eager.pt` and `sdpa.pt`, the dense
            numbers; `engine.json`, losses and gradient norms; and `about.json`, which describes the twin.
        attention: the attention implementations to run.
        optimizer: the optimizer of the engine's steps, as `optimizer_class` takes it.

    Raises:
        OptionError: there is no such optimizer.
        MismatchError: no twin can be made.
    """
    if optimizer != ADAMW:
        optimizer_class(optimizer)
    reasons: list[str] = []
    try:
        original = _original(plan, folder / "original")
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise MismatchError(_no_twin([f"{type(error).__name__}: {error}"])) from None
    runs, refused = _attention(folder / "original", plan, attention)
    ran: list[tuple[Sizes, About]] = []
    tried = None
    for sizes in _candidates(plan, original):
        tried = sizes
        try:
            about = _try(plan, original, folder, sizes, runs)
        except Exception as error:  # transformers raises anything for sizes that do not go together
            reasons.append(f"widths by {sizes.divisor}: {type(error).__name__}: {str(error)[:500]}")
            continue
        ran.append((sizes, about))
        if (not about.ungraded and about.rounding <= _MOST_ROUNDING) or len(ran) == _ENOUGH:
            break
    if not ran:
        raise MismatchError(_no_twin(reasons))
    sizes, about = min(ran, key=lambda one: (len(one[1].ungraded), max(one[1].rounding, _MOST_ROUNDING)))
    if sizes != tried:  # the folders hold what was tried last, or what an error left of it
        _try(plan, original, folder, sizes, runs)
    about = replace(about, refused=refused, optimizer=optimizer)
    about.write(folder)
    if optimizer != ADAMW:
        _write_steps_of_another(folder, plan, about)


def _original(plan: Plan, folder: Path) -> Any:
    """The plan's model at its full size, on meta. Raises MismatchError when it is not what the plan says."""
    if plan.model.config is None:
        raise MismatchError(
            Fault(
                what="only a model of transformers can be verified without the function that makes it",
                where="model.config",
                got="a plan of a model without config.json",
                expected="a plan compiled from a checkpoint or config.json of transformers, or --module",
                next="name the function: --module package.module:function",
            )
        )
    folder.mkdir()
    config = {**plan.model.config, "pad_token_id": 0}  # plans hold no token ids, and a default may be out of range
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with torch.device("meta"):  # its buffers too: nothing of it is ever run
        model = build_planned(folder, plan)
    check_model(model, plan)
    return model


def _candidates(plan: Plan, original: Any) -> Iterator[Sizes]:
    """The sizes to try, small ones first."""
    config = _as_json(original.config)
    layers, experts = num_layers_needed(plan, config), scale_config.fewest_experts(config)
    dims = {size for _, tensor in parameters_and_buffers(original) for size in tensor.shape}
    for divisor in scale_config.divisors(config, dims):
        for count in dict.fromkeys((experts, scale_config.num_experts(config))):
            yield Sizes(divisor=divisor, layers=layers, experts=count)


def _try(plan: Plan, original: Any, folder: Path, sizes: Sizes, attention: tuple[str, ...]) -> About:
    """Make the twin of these sizes, run it, and write all of its files but `about.json`."""
    config = scale_config.with_mild_norms(
        scale_config.shrink(
            _as_json(original.config),
            divisor=sizes.divisor,
            layers=sizes.layers,
            experts=sizes.experts,
            tp_size=plan.tp_size,
        )
    )
    for dtype in ("float64", "float32"):
        shutil.rmtree(folder / dtype, ignore_errors=True)
        (folder / dtype).mkdir()
        (folder / dtype / CONFIG_NAME).write_text(json.dumps(_in_dtype(config, dtype)))
    twin: Any = build_planned(folder / "float64", plan)
    num_parameters = sum(parameter.numel() for parameter in twin.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise TwinError(f"a small model of {num_parameters} parameters is too large")
    scaled = twin_plan(plan, original, twin, sizes.divisor)
    check_model(twin, scaled)
    head = twin.get_output_embeddings()
    tables = [twin.get_input_embeddings(), *([head] if hasattr(head, "weight") else [])]
    words = min(table.weight.shape[0] for table in tables)
    images, no_images = _images(folder / "float64", plan)
    padding = getattr(twin.config, "pad_token_id", None)
    uneven = plan.sequence_parallel is not None
    batches = Batches(vocab_size=words, length=_LENGTH, padding=padding, images=images, uneven=uneven)
    weights, ungraded, operations = _write_float64(folder, plan, scaled, attention, batches)
    scaled = twin_plan(plan, original, twin, sizes.divisor, "F32")
    rounding = _write_float32(folder, plan, scaled, attention[0], batches, weights)
    return About(
        divisor=sizes.divisor,
        layers=sizes.layers,
        experts=sizes.experts,
        num_parameters=num_parameters,
        batches=batches,
        attention=attention,
        ungraded=ungraded,
        no_images=no_images,
        rounding=rounding,
        operations=operations,
    )


def _images(folder: Path, plan: Plan) -> tuple[Images | None, str | None]:
    """Images for the twin in `folder`, and why there are none where it takes some."""
    try:
        if "vision_config" not in (plan.model.config or {}):
            return None, None
        return images_for(build_planned(folder, plan, on_meta="nothing", **EXPERTS)), None
    except Exception as error:  # a model's own code raises anything for inputs that it does not take
        return None, f"{type(error).__name__}: {str(error)[:300]}"


def _in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose models, those inside it too, are of one dtype."""
    inner = {
        key: _in_dtype(value, dtype)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping) and key != "per_layer_config"
    }
    return {**config, **inner, "dtype": dtype}


def _attention(folder: Path, plan: Plan, wanted: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The attention implementations that the architecture has, and why the others cannot be run."""
    runs, refused = [], {}
    for kind in wanted:
        try:
            build_planned(folder, plan, **options(kind))
            runs.append(kind)
        except AutoTPError as error:
            refused[kind] = error.faults[0].got
    if not runs:
        raise MismatchError(
            Fault(
                what="the model has none of the attention implementations asked for",
                where="--attention",
                got="; ".join(refused.values()),
                expected="one that transformers has for this model",
                next="leave the option out, or give the other one",
            )
        )
    return tuple(runs), refused


def _write_float64(
    folder: Path, plan: Plan, scaled: Plan, attention: tuple[str, ...], batches: Batches
) -> tuple[dict[str, Tensor], tuple[str, ...], int]:
    """Write the checkpoint, and the numbers by attention. The weights, the parameters without a gradient, the work."""
    weights: dict[str, Tensor] = {}
    operations = 0
    ungraded: set[str] = set()
    for kind in attention:
        model: Any = build_planned(folder / "float64", plan, on_meta="nothing", **options(kind)).train().double()
        randomise(model)
        if not weights:
            weights = {name: tensor.detach().clone() for name, tensor in parameters_and_buffers(model)}
            _save(model, scaled, folder / "float64")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = [parameter.name for parameter in scaled.expanded() if parameter.name in parameters]
        numbers = run_passes_and_steps(model, dense_reader(model), names, batches)
        ungraded.update(name for name in names if name not in numbers["accumulated"])
        operations = operations or forward_operations(model, batches)
        torch.save(numbers, folder / f"{kind}.pt")
    return weights, tuple(sorted(ungraded)), operations


def _write_float32(
    folder: Path, plan: Plan, scaled: Plan, attention: str, batches: Batches, weights: dict[str, Tensor]
) -> float:
    """Write the checkpoint, and the engine's steps; by how much rounding to float32 changes these."""
    model: Any = build_planned(folder / "float32", plan, on_meta="nothing", **options(attention)).train().float()
    with torch.no_grad():
        for name, tensor in parameters_and_buffers(model):
            tensor.copy_(weights[name])
    _save(model, scaled, folder / "float32")
    exact = copy.deepcopy(model).double()
    with PromoteToFloat64():
        unrounded = dense_steps(exact, Training(batches=batches))
    steps = dense_steps(model, Training(batches=batches))
    (folder / "engine.json").write_text(json.dumps(steps))
    return max(relative_errors(unrounded, steps).values())


def _write_steps_of_another(folder: Path, plan: Plan, about: About) -> None:
    """In the place of AdamW's, the losses and gradient norms of another optimizer on the float32 checkpoint."""
    cls = getattr(transformers, plan.model.architecture or "", transformers.AutoModelForCausalLM)
    model = cls.from_pretrained(folder / "float32", dtype=torch.float32, **options(about.attention[0])).train()
    training = Training(batches=about.batches, optimizer=about.optimizer)
    with muon_orthogonalises_with(orthogonalised):
        (folder / "engine.json").write_text(json.dumps(dense_steps(model, training)))


def _save(model: Any, scaled: Plan, folder: Path) -> None:
    """Write the checkpoint, its tensors under the names that the plan was compiled from, and its plan."""
    model.save_pretrained(folder)
    tensors = read_checkpoint(folder).tensors
    if any(entry.transposed or name not in tensors for entry in scaled.expanded() for name in entry.names_on_disk()):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(dict(tensors_on_disk(model, scaled)), folder / SINGLE_NAME)
    identity = replace(scaled.model, config=planned_config(read_config(folder)))
    (folder / PLAN_NAME).write_text(replace(scaled, model=identity).to_json())


def tensors_on_disk(model: Any, scaled: Plan) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model under the names on disk that a plan has."""
    tensors = dict(parameters_and_buffers(model))
    for parameter in scaled.expanded():
        tensor = tensors[parameter.name].detach()
        sources = parameter.sources
        if sources is None:
            on_disk = tensor.transpose(-2, -1) if parameter.transposed else tensor
            yield parameter.names_on_disk()[0], on_disk.contiguous().clone()
            continue
        parts = tensor if sources.stacked else tensor.unsqueeze(0)
        names = iter(parameter.names_on_disk())
        for part in parts:
            for piece in part.chunk(len(sources.names)) if len(sources.names) > 1 else (part,):
                yield next(names), piece.clone()


def _as_json(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def _no_twin(reasons: list[str]) -> Fault:
    return Fault(
        what="no small model of this architecture could be made to run",
        where="model.config",
        got="; ".join(dict.fromkeys((reasons[0], reasons[-1]))) if reasons else "no sizes to try",
        expected="a transformers causal language model whose widths have a common divisor",
        next="compare the sharded model with the unsharded one in a test of your own, as "
        "tests/runtime/test_parity_with_dense.py does",
    )
