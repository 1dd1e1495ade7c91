"""A model without weights, from its config: the one place where the planner needs transformers and torch.

Both are imported when it is called, never before: planning from a checkpoint does without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autotp_plan.schemas.errors import CheckpointError, Fault, MissingDependencyError
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, read_config


def model_on_meta(folder: Path) -> Any:
    """The transformers model of the config.json in `folder`, its parameters and buffers on meta.

    Raises MissingDependencyError, or CheckpointError when transformers cannot build it.
    """
    config = read_config(folder) or {}
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            Fault(
                what="shapes from a bare config.json need transformers",
                where=str(folder / CONFIG_NAME),
                got=f"no module named {error.name!r}",
                expected="transformers, accelerate and torch, or a folder with safetensors files",
                next="pip install 'autotp-plan[train]', or give the checkpoint folder: its headers are enough",
            )
        ) from None
    try:
        model_config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        dtype = getattr(model_config, "dtype", None) or torch.float32
        architecture = getattr(transformers, (config.get("architectures") or [""])[0], None)
        with torch.device("meta"):
            if architecture is not None and hasattr(architecture, "_from_config"):
                model = architecture._from_config(model_config, dtype=dtype)
            else:
                model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        model.tie_weights()
        _keep_in_fp32(model, dtype)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        ImportError,
        OSError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            Fault(
                what="transformers cannot build a model from this config",
                where=str(folder / CONFIG_NAME),
                got=f"{type(error).__name__}: {error}",
                expected="the config.json of a causal language model that transformers knows",
                next="correct the config, or give a folder with safetensors files",
            )
        ) from None
    return model


def _keep_in_fp32(model: Any, dtype: Any) -> None:
    """What transformers loads in float32 whatever the model's dtype, and checkpoints hold so."""
    import torch

    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if dtype not in (torch.float16, torch.bfloat16):
        return
    for name, tensor in parameters_and_buffers(model):
        if tensor.dtype == dtype and any(part in name for part in kept):
            tensor.data = tensor.data.to(torch.float32)


def parameters_and_buffers(module: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter under every name it has, and every buffer that checkpoints hold."""
    yield from module.named_parameters(remove_duplicate=False)
    for prefix, inside in module.named_modules():
        for name, buffer in inside.named_buffers(recurse=False):
            if name not in inside._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
