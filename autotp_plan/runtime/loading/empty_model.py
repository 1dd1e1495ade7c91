"""The model on meta that is filled with a rank's weights, and the dtype that each of its tensors gets.

A transformers model gets the dtypes that `from_pretrained` gives it, which keeps some tensors in float32. A model that
the user built keeps those of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from autotp_plan.huggingface.internals import stays_float32
from autotp_plan.huggingface.meta_model import build_model, parameters_and_buffers
from autotp_plan.runtime.loading.weights import DTYPES
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME
from autotp_plan.sources.model_folder import ModelFolder, Place, model_folder


def empty_model(
    place: Place,
    plan: Plan,
    given: nn.Module | Callable[[], nn.Module] | None,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """The model that a plan is for, without weights.

    Args:
        place: the checkpoint or shards folder, with its config.json.
        plan: the plan.
        given: the user's model on meta, or a function that builds it; None builds the transformers model.
        dtype: the dtype of floating-point tensors; None for that of the plan, else what `from_pretrained` with
            `dtype="auto"` takes, and for a given model those of the files.
        options: for transformers.

    Returns:
        The model, its parameters on meta, and by name the dtypes of its floating-point parameters and of the buffers
        that checkpoints hold. What it does not name keeps its dtype on disk.

    Raises:
        CheckpointError: transformers cannot build the model.
        MismatchError: neither the config nor the weights say which dtype it has.
    """
    if dtype is None and plan.runtime.dtype is not None:
        dtype = getattr(torch, plan.runtime.dtype)
    if given is None:
        found = model_folder(place)
        dtype = dtype or _auto_dtype(found, plan)
        model = build_planned(found.folder, plan, dtype=dtype, **options)
        return model, {name: tensor.dtype for name, tensor in parameters_and_buffers(model)}
    if isinstance(given, nn.Module):
        model = given
    else:
        with init_empty_weights(include_buffers=False):
            model = given()
    if dtype is None:
        return model, {}
    stays: Callable[[str], bool] = (
        stays_float32(model, dtype) if isinstance(model, PreTrainedModel) else lambda name: False
    )
    return model, {
        name: torch.float32 if stays(name) else dtype
        for name, tensor in parameters_and_buffers(model)
        if tensor.is_floating_point()
    }


def build_planned(folder: Path, plan: Plan, **options: Any) -> Any:
    """The transformers model of a plan, from the config.json in `folder`.

    What the config ties and the plan does not, because its values differ on disk, is not tied.

    Args:
        folder: a folder with a config.json.
        plan: the plan.
        options: for `build_model`.

    Raises:
        CheckpointError: transformers cannot build the model.
    """
    model = build_model(folder, plan.model.architecture, **options)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for parameter in plan.expanded():
        tensor = tensors.get(parameter.name)
        if tensor is not None and first.setdefault(id(tensor), parameter.name) != parameter.name:
            owner, _, leaf = parameter.name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor.detach().clone()))
            for tie in (first[id(tensor)], parameter.name):
                model.all_tied_weights_keys.pop(tie, None)
    return model


def _auto_dtype(place: ModelFolder, plan: Plan) -> torch.dtype:
    """What the config says, else the one dtype of the weights."""
    config = place.config() or {}
    named = config.get("dtype") or config.get("torch_dtype")
    said = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(said, torch.dtype):
        return said
    stored = {entry.dtype for entry in plan.parameters if DTYPES[entry.dtype].is_floating_point}
    if len(stored) > 1:
        raise MismatchError(
            Fault(
                code="several-dtypes",
                what="the weights are of several dtypes, and the config names none",
                where=f"{place}/{CONFIG_NAME}: dtype",
                got=", ".join(sorted(stored)),
                expected="a dtype in the config, or weights of one dtype",
                next="say which: plan.load_model(path, dtype=torch.bfloat16)",
            )
        )
    return DTYPES[stored.pop()] if stored else torch.get_default_dtype()
