"""What the ranks of a job must have the same of, as text that `agreement.check_same` compares.

Versions, the model's config, its dtypes, the DeepSpeed config and the optimizer. What each rank may have of its own
(where it logs, where it swaps to) is left out.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp_plan.huggingface.internals import attention_of

MUST_BE_EQUAL = ("torch", "deepspeed", "transformers", "autotp-plan")
"""Packages of which every rank has the same version: they decide what a step computes, and what is sent."""

MAY_DIFFER = ("numpy", "safetensors", "accelerate", "peft")
"""Packages of which other versions are only said."""

OF_ONE_RANK = frozenset(
    ("tensorboard", "wandb", "csv_monitor", "comet", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
     "dump_state", "flops_profiler", "nvme_path", "local_rank", "comms_logger")
)  # fmt: skip
"""Keys of a DeepSpeed config that a rank may have of its own: what it shows, and where its own disk is."""

_OF_THE_PLACE = frozenset(("_name_or_path", "name_or_path", "transformers_version"))
"""Keys of a model's config that say where it was read from, and by what it was written."""

_SCALARS = (str, int, float, bool, type(None), torch.dtype, torch.device)


def versions() -> dict[str, str]:
    """The versions that must be equal, by package, without what follows a plus sign (`2.5.1+cu124`)."""
    return {package: version.partition("+")[0] for package, version in _installed(MUST_BE_EQUAL)}


def lenient_versions() -> dict[str, str]:
    """The versions that may differ: of Python, of other packages, and of builds of one version."""
    found = dict(_installed(MAY_DIFFER))
    found.update({f"build of {package}": version for package, version in _installed(MUST_BE_EQUAL)})
    return {"python": platform.python_version(), **found}


def _installed(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        yield package, _version(package)


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def config_of(model: nn.Module) -> dict[str, str]:
    """The config of a transformers model by dotted names; of another module its class."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    found = flat(to_dict()) if callable(to_dict) else {}
    found = {name: text for name, text in found.items() if _OF_THE_PLACE.isdisjoint(name.split("."))}
    return {**found, "class": type(model).__name__, "attention": str(attention_of(config))}


def dtypes_of(model: nn.Module) -> dict[str, str]:
    """The dtype of each parameter and buffer, and which parameters are trained, by name.

    A rank may hold a parameter in two tensors, of which it shares one (`weight_shared`) with other ranks.
    """
    trained = {
        name.removesuffix("_shared"): f"{one.dtype}{'' if one.requires_grad else ', frozen'}"
        for name, one in model.named_parameters()
    }
    return {**trained, **{name: str(one.dtype) for name, one in model.named_buffers()}}


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """A DeepSpeed config by dotted names, without what a rank may have of its own."""
    return {name: text for name, text in flat(config).items() if OF_ONE_RANK.isdisjoint(name.split("."))}


def optimizer_of(optimizer: Any) -> dict[str, str]:
    """The class of an optimizer, and the sizes and numbers of its groups; of a function that makes one its name."""
    if optimizer is None or not hasattr(optimizer, "param_groups"):
        return {"class": getattr(optimizer, "__qualname__", type(optimizer).__name__)}
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, **flat({"groups": groups})}


def flat(document: Any, name: str = "") -> dict[str, str]:
    """The numbers and texts of nested dicts and lists by dotted names; of any other object its class."""
    if isinstance(document, Mapping):
        inside = [(str(key), value) for key, value in document.items()]
    elif isinstance(document, (list, tuple)):
        inside = [(str(place), value) for place, value in enumerate(document)]
    else:
        return {name: repr(document) if isinstance(document, _SCALARS) else type(document).__name__}
    found = {name: f"{len(inside)} entries"} if name else {}
    for key, value in inside:
        found.update(flat(value, f"{name}.{key}" if name else key))
    return found
