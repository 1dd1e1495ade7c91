"""LoRA adapters of PEFT on a model from `load_model`, sharded like the layers they go with.

The layer computes `W x + s B (A x)`. Of a column-parallel layer, `B` is column-parallel and `A` replicated; of a
row-parallel layer, `A` is row-parallel and `B` replicated. The sharded factor becomes a tensor-parallel layer too.
Where the sum of `A` is a reduce-scatter along the sequence, `B` sees a part of the tokens, and its gradient is summed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import nn

from autotp_plan.huggingface.internals import register_lora_layers, replace_adapter_injection
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.internals import full_tensors
from autotp_plan.runtime.integrations.lora_config import check_config, check_kind, name_all_linear
from autotp_plan.runtime.integrations.peft_calls import guard_calls
from autotp_plan.runtime.loading.shard_model import sum_gradients
from autotp_plan.runtime.parameters.partly_replicated import SHARED
from autotp_plan.runtime.parameters.state_dicts import shards_in_state_dict
from autotp_plan.runtime.sequence_parallel.modules import GatherInput, GatherInputOfLayer, SplitOutput, become
from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear, PlannedLayer, RowParallelLinear
from autotp_plan.runtime.tensor_parallel.module_boundary import WithCollectives
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError
from autotp_plan.schemas.layout import Layout


def guard_peft() -> None:
    """Let PEFT's own calls (`get_peft_model`, `PeftModel.from_pretrained`, ...) shard adapters of a sharded model."""
    replace_adapter_injection(_check_kind_of_sharded, _inject, shards_in_state_dict)
    guard_calls()


def add_lora(model: nn.Module, config: Any) -> Any:
    """`peft.get_peft_model` for a model from `load_model`; every rank calls it.

    Args:
        model: the model.
        config: a `peft.LoraConfig`.

    Returns:
        The `PeftModel`.

    Raises:
        MismatchError: the config has options, or names modules, that no tensor-parallel adapter is there for.
    """
    from peft import get_peft_model

    guard_peft()
    check_kind(config)
    check_config(config)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def load_adapter(model: Any, folder: Path, name: str, is_trainable: bool) -> Any:
    """`PeftModel.from_pretrained` for a model from `load_model`, or `load_adapter` of a `PeftModel` of one.

    Args:
        model: the model, or the `PeftModel` that gets one adapter more, which is then the active one.
        folder: what PEFT or `save_adapter` wrote.
        name: the adapter's name.
        is_trainable: whether it is trained.

    Returns:
        The `PeftModel`.

    Raises:
        CheckpointError: there is no adapter in the folder.
        MismatchError: the adapter is of another model, or of a kind that no tensor-parallel adapter is there for.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    guard_peft()
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(
            Fault(
                what="there is no adapter to load",
                where=str(folder),
                got="no file adapter_config.json",
                expected="a folder that plan.save_adapter or PEFT's save_pretrained wrote",
                next="give the folder of the adapter itself, not the one of the checkpoints",
            )
        )
    options: dict[str, Any] = {"is_trainable": is_trainable, "autocast_adapter_dtype": False}
    if isinstance(model, PeftModel):
        adapted = model
        adapted.load_adapter(str(folder), name, **options)
        adapted.set_adapter(name)
    else:
        with warnings.catch_warnings():  # missing tensors are an error below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, **options)
    _check_tensors(adapted, name, set(load_peft_weights(str(folder), device="cpu")), folder)
    return adapted


def save_adapter(engine: Any, folder: Path) -> None:
    """Write the adapters of `engine`'s model as PEFT does for an unsharded model; every rank calls it."""
    check_all_call("plan.save_adapter")
    state: dict[str, Any] = {}
    for name, module in engine.module.named_modules():
        is_adapter = "lora_" in name or ".modules_to_save." in name  # trained or not
        held = [one for one in module.parameters(recurse=False) if is_adapter or one.requires_grad]
        if not held:
            continue
        with GatheredParameters(held), full_tensors(held, module):
            for leaf, parameter in module.named_parameters(recurse=False):
                state[f"{name}.{leaf}"] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        engine.module.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    dist.barrier()


def refuse_adapters(model: nn.Module, where: str) -> None:
    """Raise MismatchError for a model with adapters, where its weights alone would be written."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise MismatchError(
            Fault(
                what="a model with adapters is not the model of the plan",
                where=where,
                got=f"{len(adapted)} modules with adapters, such as {adapted[0]}",
                expected="the model without adapters",
                next="plan.save_adapter(engine, folder) writes the adapter; or merge it: "
                "plan.save_shards(engine.module.merge_and_unload(), folder), not under ZeRO 3",
            )
        )


def _check_kind_of_sharded(model: Any, config: Any) -> None:
    if hasattr(model, "autotp"):
        check_kind(config)


def _inject(original: Callable[..., None], tuner: Any, model: Any, name: str, *args: Any, **kwargs: Any) -> None:
    """Inject an adapter; into a sharded model, one that is sharded like its layers and the same on all ranks."""
    from peft.tuners import lora

    if not hasattr(model, "autotp"):
        original(tuner, model, name, *args, **kwargs)
        return
    config = tuner.peft_config[name]
    check_kind(config)
    check_config(config)
    name_all_linear(config, model)
    register_lora_layers(config, {ColumnParallelLinear: lora.Linear, RowParallelLinear: lora.Linear})
    partial = {parameter.name for parameter in model.autotp.plan.expanded() if parameter.partial_gradient}
    with _undone_if_refused(tuner, model, name):
        try:
            original(tuner, model, name, *args, **{**kwargs, "low_cpu_mem_usage": False})
        except ValueError as error:
            if "is not supported" not in str(error):
                raise
            raise MismatchError(_module_fault("LoraConfig.target_modules", str(error).splitlines()[0][:200])) from None
        check_config(config)  # once more: PEFT may have made parameters of experts of its names
        faults = list(_faults(model, partial))
        if faults:
            raise MismatchError(faults)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            dist.broadcast(parameter.data, src=0)
    for module in model.modules():
        if isinstance(module, lora.Linear) and name in module.lora_A:
            _shard(module, name)
            _follow_stream(module, name, model.autotp.ranks.tp_group)


@contextlib.contextmanager
def _undone_if_refused(tuner: Any, model: nn.Module, name: str) -> Iterator[None]:
    """While active, an error leaves the model as it was: without the adapter, and as trainable as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except MismatchError:
        if len(tuner.peft_config) > 1:
            tuner.delete_adapter(name)
        else:
            tuner.unload()
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise


def _check_tensors(adapted: Any, name: str, found: set[str], folder: Path) -> None:
    wanted = {
        key.replace(f".modules_to_save.{name}.", ".").replace(f".{name}.", ".")
        for key, _ in adapted.named_parameters()
        if f".{name}." in key
    }
    if wanted != found:
        raise MismatchError(
            Fault(
                what="the adapter is of another model",
                where=str(folder),
                got=f"{len(found - wanted)} tensors that the model has no place for, "
                f"{len(wanted - found)} missing: {', '.join(sorted(wanted ^ found)[:3])}",
                expected=f"{len(wanted)} tensors",
                next="load the model that the adapter was trained on",
            )
        )


def _shard(adapter: Any, name: str) -> None:
    """Replace the factor that is sharded like the adapter's layer by a tensor-parallel layer."""
    base = adapter.get_base_layer()
    if not isinstance(base, PlannedLayer) or not base.is_tp_parallel:
        return
    factors = adapter.lora_B if isinstance(base, ColumnParallelLinear) else adapter.lora_A
    dim = 0 if isinstance(base, ColumnParallelLinear) else 1
    planned = base.shards.layouts["weight"]
    full = factors[name]
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
    factors[name] = layer


def _follow_stream(adapter: Any, name: str, group: Any) -> None:
    """Let the factors see the tokens that the adapter's layer sees, where the sequence is sharded around it."""
    base, first, second = adapter.get_base_layer(), adapter.lora_A[name], adapter.lora_B[name]
    of_tokens = []
    if isinstance(base, RowParallelLinear):
        first.stream = base.stream
        of_tokens = [] if base.stream is None else [second]
    elif isinstance(base, GatherInputOfLayer):
        become(first, GatherInput, base.tp_stream, f"{base.name}_lora")
    elif isinstance(base, SplitOutput):
        of_tokens = [first, second]
    for factor in of_tokens:
        sum_gradients(factor, group)


def _faults(adapted: Any, partial: set[str]) -> Iterator[Fault]:
    """Adapters on modules that no tensor-parallel adapter is there for."""
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer):
            saved = isinstance(module, AuxiliaryTrainingWrapper)
            if saved and any(isinstance(one, PlannedLayer) for one in module.modules()):
                yield _module_fault(name, "a copy of a sharded module (modules_to_save)")
            continue
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
            elif isinstance(base, RowParallelLinear) and base.copy_output:
                got = "a row-parallel layer whose output goes into sharded weights, past which the adapter would add"
        elif isinstance(base, WithCollectives):
            got = "a module with an all-reduce at its input or output, which the adapter would not go through"
        elif f"{name}.weight" in partial:
            got = "a replicated weight of whose gradient each rank computes a part"
        if got:
            yield _module_fault(name, got)


def _module_fault(name: str, got: str) -> Fault:
    return Fault(
        what="a module cannot have a LoRA adapter under tensor parallelism",
        where=name,
        got=got,
        expected="a column-parallel, row-parallel or replicated linear layer",
        next="leave the module out of target_modules, or train this adapter on an unsharded model",
    )
