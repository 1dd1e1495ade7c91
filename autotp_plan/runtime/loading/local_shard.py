"""What this rank holds of a parameter of the plan, in a model from `load_model`."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.zero_internals import is_partitioned
from autotp_plan.runtime.parameters.state_dicts import HoldsShards
from autotp_plan.runtime.tensor_parallel.sharded_params import ShardedParams
from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_of
from autotp_plan.schemas.documents import did_you_mean
from autotp_plan.schemas.errors import Fault, MismatchError


def local_shard(model: nn.Module, name: str, *, gradient: bool = False) -> Tensor | None:
    """This rank's shard of a parameter, or the gradient of it.

    A shard of which other ranks hold a part, such as replicated KV heads in a fused weight, is held in two parameters
    (`weight` and `weight_shared`); they are put together here, in the order of the plan's intervals.

    Args:
        model: a model from `load_model`, or the engine that `initialize` made of it.
        name: a parameter or buffer of the plan, such as `model.layers.0.self_attn.q_proj.weight`.
        gradient: return the gradient in the place of the weights.

    Returns:
        A tensor of the model's dtype on this rank's device. Its shape is that of the full parameter with, at the
        sharded dim, the number of indices that this rank holds; a replicated parameter is complete. It is the model's
        parameter itself where one parameter holds the shard, else a new tensor. None for a gradient that is not there:
        before backward, or under ZeRO, which takes gradients away as they are made.

    Raises:
        MismatchError: the model has no such parameter, or ZeRO 3 has partitioned it over the DP ranks.
    """
    module = model.module if isinstance(model, DeepSpeedEngine) else model
    parent, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(parent)
    except AttributeError:
        raise MismatchError(_unknown(module, name)) from None
    if leaf not in _names(owner):
        raise MismatchError(_unknown(module, name))
    shards = shards_of(owner)
    held = [one.name for one in shards.held[leaf]] if shards is not None and leaf in shards.layouts else [leaf]
    if any(is_partitioned(tensor_of(owner, one)) for one in held):
        raise MismatchError(
            Fault(
                what="ZeRO 3 has partitioned the shard over the DP ranks",
                where=name,
                got="a parameter without elements",
                expected="the shard of this TP rank",
                next="with deepspeed.zero.GatheredParameters(list(engine.module.parameters())): local_shard(...)",
            )
        )
    if shards is not None and leaf in shards.layouts:
        return shards.gradient(owner, leaf) if gradient else shards.shard(owner, leaf)
    tensor: Tensor = tensor_of(owner, leaf)
    return tensor.grad if gradient else tensor


def shards_of(module: nn.Module) -> ShardedParams | None:
    """The sharded parameters of a module, None where it has none."""
    shards = module.held_shards() if isinstance(module, HoldsShards) else None
    assert shards is None or isinstance(shards, ShardedParams)
    return shards


def _names(owner: nn.Module) -> set[str]:
    """The parameters and buffers of a module as the plan names them."""
    found = {name for name, _ in owner.named_parameters(recurse=False, remove_duplicate=False)}
    found |= {name for name, _ in owner.named_buffers(recurse=False, remove_duplicate=False)}
    shards = shards_of(owner)
    if shards is not None:
        found -= {one.name for held in shards.held.values() for one in held}
        found |= {name for name in shards.held if tensor_of(owner, shards.held[name][0].name) is not None}
    return found


def _unknown(module: nn.Module, name: str) -> Fault:
    near = did_you_mean(name, _all_names(module))
    return Fault(
        what="the model has no such parameter",
        where="local_shard(model, name)",
        got=repr(name),
        expected=f"a parameter of the plan; {near}" if near else "a parameter of the plan",
        next="take the name from plan.document.expanded()",
    )


def _all_names(module: nn.Module) -> Iterator[str]:
    for prefix, inside in module.named_modules(remove_duplicate=False):
        for leaf in _names(inside):
            yield f"{prefix}.{leaf}" if prefix else leaf
