"""Which LoRA configs are right for a tensor-parallel model, and which linear layers `all-linear` names."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from autotp_plan.schemas.errors import Fault, MismatchError

_RIGHT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "use_rslora", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "runtime_config", "fan_in_fan_out",
}  # fmt: skip
"""What a LoraConfig may say with any value; the rest must be as it is by default."""

_HEADS = ["score", "classifier"]
_ALSO: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (_HEADS, _HEADS[::-1]),  # PEFT's own, for classification
    "lora_dropout": (0, 0.0),
    "init_lora_weights": (True, False, "gaussian"),
}
"""Further values that are right: others need full weights, or random numbers that no rank draws by itself."""

_INSTEAD = {
    "target_parameters": "name linear layers outside of the experts in target_modules, such as q_proj, k_proj and "
    "v_proj: PEFT makes target_parameters of the names of experts, and of all-linear, where experts are one parameter"
}
"""What to do where an option comes from another one."""

_ALL_LINEAR = "all-linear"


def check_kind(config: Any) -> None:
    """Raise MismatchError for an adapter that is not LoRA."""
    from peft import LoraConfig, PeftType

    if isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA:
        return
    raise MismatchError(
        Fault(
            what="an adapter of this kind is not supported for a tensor-parallel model",
            where=type(config).__name__,
            got=str(getattr(config.peft_type, "value", config.peft_type)),
            expected="LORA",
            next="plan.add_lora(model, peft.LoraConfig(...)), or train this adapter on an unsharded model",
        )
    )


def check_config(config: Any) -> None:
    """Raise MismatchError for options that no tensor-parallel adapter is there for."""
    faults = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        allowed = (*_ALSO.get(field.name, ()), default)
        if field.name not in _RIGHT and value and value not in allowed:
            faults.append(
                Fault(
                    what="a LoRA option is not supported for a tensor-parallel model",
                    where=f"LoraConfig.{field.name}",
                    got=repr(value),
                    expected=" or ".join(dict.fromkeys(map(repr, allowed))),
                    next=_INSTEAD.get(field.name, "leave it out, or train this adapter on an unsharded model"),
                )
            )
    if faults:
        raise MismatchError(faults)


def name_all_linear(config: Any, model: nn.Module) -> None:
    """Replace `all-linear` by the names that PEFT finds in the unsharded model: linear layers without the head."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    if not isinstance(config.target_modules, str) or config.target_modules.lower() != _ALL_LINEAR:
        return
    linear = (nn.Linear, Conv1D, ColumnParallelLinear, RowParallelLinear)
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    head = _head(model, config)
    config.target_modules = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (*linear, BaseTunerLayer))
        and module is not head
        and not any(name.startswith(f"{adapter}.") for adapter in adapters)
    }


def _head(model: Any, config: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and config.task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in _HEADS if hasattr(model, name)), None)
    return head
