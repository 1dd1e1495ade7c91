"""DeepSpeed's Muon (`"optimizer": {"type": "Muon"}`) under ZeRO 1 and 2, which orthogonalise gradients themselves.

ZeRO's optimizer calls `muon_update` on the gradient and the momentum of each parameter, in the order of a list that it
is given. While it goes through such a list, that function gathers both over the TP ranks, and keeps this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from autotp_plan.runtime.deepspeed.zero_internals import muon_updates, wrap_flat_partition
from autotp_plan.runtime.optimizers.sharded_weights import ShardedWeight
from autotp_plan.runtime.tensor_parallel.collectives import gather_shards
from autotp_plan.schemas.errors import Fault, MismatchError

_ANY_SIZE = "train without ZeRO, where Muon steps every weight in full"


def check_deepspeed_muon(settings: Mapping[str, Any], stage: int, weights: Sequence[ShardedWeight]) -> None:
    """Refuse what DeepSpeed's Muon cannot do on a sharded model.

    Args:
        settings: the DeepSpeed config.
        stage: its ZeRO stage.
        weights: the sharded parameters.

    Raises:
        MismatchError: an option, a stage or a layout that it is not right with.
    """
    zero = settings.get("zero_optimization") or {}
    options = (settings.get("optimizer") or {}).get("params") or {}
    faults = []
    if options.get("per_head_muon"):
        faults.append(_fault("optimizer.params.per_head_muon", "true", "heads of the full weight", "leave it out"))
    if stage == 3:
        faults.append(_fault("zero_optimization.stage", "3", "0, 1 or 2", 'set "stage": 2'))
    if stage > 0 and (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        faults.append(_fault("zero_optimization.offload_optimizer", "on", "no offload", "leave it out"))
    if stage > 0:
        faults += [
            _fault(
                weight.name,
                f"a weight of which rank {weight.tp_rank} holds {weight.shard_numel(weight.tp_rank)} elements, "
                f"and other ranks hold more or less, or partly the same",
                "shards of one size under ZeRO",
                _ANY_SIZE,
            )
            for weight in weights
            if len(weight.tensors[0].shape) > 1 and not _has_equal_shards(weight)
        ]
    if faults:
        raise MismatchError(faults)


def _has_equal_shards(weight: ShardedWeight) -> bool:
    sizes = {weight.shard_numel(rank) for rank in range(len(weight.layout.intervals))}
    return len(sizes) == 1 and len(weight.tensors) == 1


def orthogonalize_full_matrices(optimizer: Any, weights: Sequence[ShardedWeight], split_fused: bool = False) -> None:
    """Let ZeRO's optimizer (stage 1 or 2, with Muon inside) orthogonalise full matrices, not one rank's shard of them.

    Args:
        optimizer: the engine's optimizer.
        weights: the sharded parameters of its model.
        split_fused: orthogonalise each sub-parameter of a fused weight by itself.
    """
    by_tensor = {id(weight.tensors[0]): weight for weight in weights}

    def over_tp_ranks(call: Callable[[], Any], tensors: Sequence[Tensor]) -> Any:
        in_order = iter([by_tensor.get(id(tensor)) for tensor in tensors if getattr(tensor, "use_muon", False)])
        with muon_updates(lambda update: _on_full_matrix(update, in_order, split_fused)):
            result = call()
        assert next(in_order, None) is None, "every tensor of the list was updated"
        return result

    wrap_flat_partition(optimizer, over_tp_ranks)


def _on_full_matrix(
    update: Callable[..., Tensor], in_order: Iterator[ShardedWeight | None], split_fused: bool
) -> Callable[..., Tensor]:
    """`muon_update` that is called with shards, of one weight after the other."""

    def of_shard(grad: Tensor, momentum: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = next(in_order)
        if weight is None:
            return update(grad, momentum, *args, **kwargs)
        full = _gathered(grad, weight), _gathered(momentum, weight)
        gradients, momenta = (weight.sub_parameters(one) if split_fused else [one] for one in full)
        results = [update(*both, *args, **kwargs) for both in zip(gradients, momenta)]
        join = weight.joined_sub_parameters if split_fused else lambda parts: parts[0]
        momentum.copy_(weight.shard_of(join(momenta), weight.tp_rank).view_as(momentum))
        return weight.shard_of(join(results), weight.tp_rank).view_as(grad)

    return of_shard


def _gathered(shard: Tensor, weight: ShardedWeight) -> Tensor:
    layout = weight.layout
    assert layout.dim is not None
    local = shard.reshape(layout.rank_shape(weight.tp_rank))
    if len(layout.intervals) == 1:
        return local.view(weight.shape)
    return gather_shards(local, weight.group, layout.intervals, layout.dim).view(weight.shape)


def _fault(where: str, got: str, expected: str, next_step: str) -> Fault:
    return Fault(
        code="muon-not-sharded-so",
        what="DeepSpeed's Muon does not have this on a sharded model",
        where=where,
        got=got,
        expected=expected,
        next=next_step,
    )
