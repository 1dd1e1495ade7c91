"""LoRA adapters of PEFT on a model from `load_model`, sharded like the layers they go with.

The layer computes `W x + s B (A x)`. Of a column-parallel layer, `B` is column-parallel and `A` replicated; of a
row-parallel layer, `A` is row-parallel and `B` replicated. The sharded factor becomes a tensor-parallel layer too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import nn

from autotp_plan.huggingface.internals import register_lora_layers
from autotp_plan.runtime.deepspeed.internals import full_tensors
from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear, PlannedLayer, RowParallelLinear
from autotp_plan.runtime.tensor_parallel.partly_replicated import SHARED
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.plan.document import Plan

_WITHOUT: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (0, 0.0), "use_dora": (False,), "lora_bias": (False,), "modules_to_save": (None, []),
    "target_parameters": (None, []), "trainable_token_indices": (None,), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"), "layer_replication": (None,), "megatron_config": (None,),
}  # fmt: skip
"""What a LoraConfig may say: the rest needs full weights, or random numbers that no rank draws by itself."""


def add_lora(model: nn.Module, config: Any, plan: Plan) -> Any:
    """`peft.get_peft_model` for a model from `load_model`; every rank calls it.

    Args:
        model: the model.
        config: a `peft.LoraConfig`.
        plan: the plan that the model is sharded by.

    Returns:
        The `PeftModel`.

    Raises:
        MismatchError: the config has options, or names modules, that no tensor-parallel adapter is there for.
    """
    from peft import get_peft_model
    from peft.tuners import lora

    _check_config(config)
    register_lora_layers(config, {ColumnParallelLinear: lora.Linear, RowParallelLinear: lora.Linear})
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    partial = {parameter.name for parameter in plan.expanded() if parameter.partial_gradient}
    faults = list(_faults(adapted, partial))
    if faults:
        raise MismatchError(faults)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, src=0)
    for module in adapted.modules():
        if isinstance(module, lora.Linear):
            _shard(module)
    return adapted


def save_adapter(engine: Any, folder: Path) -> None:
    """Write the adapter of `engine`'s model as PEFT does for an unsharded model; every rank calls it."""
    state: dict[str, Any] = {}
    for name, module in engine.module.named_modules():
        held = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if not held:
            continue
        with GatheredParameters(held), full_tensors(held, module):
            for leaf, parameter in module.named_parameters(recurse=False):
                state[f"{name}.{leaf}"] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        engine.module.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    dist.barrier()


def _shard(adapter: Any) -> None:
    """Replace the factor that is sharded like the adapter's layer by a tensor-parallel layer."""
    base = adapter.get_base_layer()
    if not isinstance(base, PlannedLayer) or not base.is_tp_parallel:
        return
    factors = adapter.lora_B if isinstance(base, ColumnParallelLinear) else adapter.lora_A
    dim = 0 if isinstance(base, ColumnParallelLinear) else 1
    planned = base.shards.layouts["weight"]
    for key, full in factors.items():
        shape = tuple(full.weight.shape)
        layout = Layout(shape=shape, dim=dim, sub_parameters=planned.sub_parameters, intervals=planned.intervals)
        options: dict[str, Any] = {
            "name": base.name + "_lora",  # next to the layer, in the same sharded region of dropout
            "layouts": {"weight": layout},
            "shapes": {"weight": shape},
            "group": base.shards.group,
        }
        layer: PlannedLayer
        if isinstance(base, ColumnParallelLinear):
            layer = ColumnParallelLinear(full, gather_output=base.gather_output, **options)
        else:
            assert isinstance(base, RowParallelLinear)
            layer = RowParallelLinear(full, split_input=base.split_input, **options)
        with torch.no_grad():
            layer.shards.assign(layer, "weight", take(full.weight, layout.intervals[base.tp_index], dim).clone())
        layer.shards.finish(layer)
        layer.train(full.training)
        factors[key] = layer


def _check_config(config: Any) -> None:
    faults = [
        Fault(
            what="a LoRA option is not supported for a tensor-parallel model",
            where=f"LoraConfig.{key}",
            got=repr(getattr(config, key)),
            expected=" or ".join(map(repr, allowed)),
            next="leave it out, or train this adapter on an unsharded model",
        )
        for key, allowed in _WITHOUT.items()
        if getattr(config, key, allowed[0]) not in allowed
    ]
    if config.target_modules == "all-linear":
        faults.append(
            Fault(
                what="PEFT does not find tensor-parallel layers by their class",
                where="LoraConfig.target_modules",
                got="'all-linear'",
                expected="names of modules",
                next='name them: target_modules=["q_proj", "v_proj", ...]',
            )
        )
    if faults:
        raise MismatchError(faults)


def _faults(adapted: Any, partial: set[str]) -> Iterator[Fault]:
    """Adapters on modules that no tensor-parallel adapter is there for."""
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        name = name.removeprefix("base_model.model.")
        base = module.get_base_layer()
        got = ""
        if not isinstance(module, lora.Linear):
            got = f"{type(base).__name__}, which is neither a linear layer nor sharded like one"
        elif isinstance(base, PlannedLayer):
            layout = base.shards.layouts["weight"]
            if any(leaf.endswith(SHARED) for leaf, _ in base.named_parameters()):
                got = "a partly replicated weight"
            elif base.transposed or layout.shape != base.shards.shapes["weight"]:
                got = "a weight that is transposed, or sharded in another shape than it has"
        elif f"{name}.weight" in partial:
            got = "a replicated weight of whose gradient each rank computes a part"
        if got:
            yield Fault(
                what="a module cannot have a LoRA adapter under tensor parallelism",
                where=name,
                got=got,
                expected="a column-parallel, row-parallel or replicated linear layer",
                next="leave the module out of target_modules, or train this adapter on an unsharded model",
            )
