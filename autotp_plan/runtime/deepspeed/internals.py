"""The private names of DeepSpeed: mesh, engine and tensor-parallel layers. ZeRO's are in `zero_internals`.

No other file says them. Each function states what it relies on and raises MissingDependencyError when it is gone;
`tests/runtime/test_canaries.py` asserts all of it in a second.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.module_inject.layers import (
    DS_IS_REPLACED_MODULE,
    DS_TENSOR_MODEL_PARALLEL,
    GatherReplacedLayerParams,
    TensorParallel_Layer,
    collect_autotp_universal_checkpoint_info,
)
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.utils import groups
from torch import Tensor, nn

from autotp_plan.schemas.upstream import moved, private, replaced

_PARSED = "ds_autotp_parsed"
_PACKAGE = "deepspeed"


# the mesh


@contextmanager
def without_inference_operator() -> Iterator[None]:
    """While active, `deepspeed.init_distributed` on CPU does not compile its shared-memory operator.

    That takes half a minute and a compiler, and only inference calls it. Relies on `TorchBackend` calling
    `deepspeed.comm.torch.build_shm_op()`, which may return None.
    """
    backend = importlib.import_module("deepspeed.comm.torch")
    private(backend, "build_shm_op", _PACKAGE, "starting on CPU without a compiler")
    with replaced(backend, "build_shm_op", lambda: None):
        yield


def make_tp_groups(tp_size: int) -> None:
    """Make DeepSpeed's TP and DP process groups, TP ranks next to each other; none are made where there are some.

    Relies on `groups._init_tp_mesh_device(tensor_model_parallel_size=...)`, which `deepspeed.tp_model_init` calls.
    """
    private(groups, "_init_tp_mesh_device", _PACKAGE, "making the TP and DP groups")(tensor_model_parallel_size=tp_size)


def has_tp_groups() -> bool:
    """Whether this process has TP groups. Relies on `groups._TENSOR_MODEL_PARALLEL_GROUP`, None before."""
    return private(groups, "_TENSOR_MODEL_PARALLEL_GROUP", _PACKAGE, "finding TP groups that are there") is not None


def recorded_tp_model_init() -> dict[str, Any]:
    """What `deepspeed.tp_model_init` was called with: `tp_size`, `tp_group`, `dtype`; empty when it was not.

    Relies on `init_utils._TP_MODEL_INIT_ARGS`.
    """
    found = private(init_utils, "_TP_MODEL_INIT_ARGS", _PACKAGE, "comparing tp_model_init with the plan")
    return dict(found or {})


# the engine


def mark_as_sharded(model: nn.Module) -> None:
    """Tell the engine that `model` is sharded, so that AutoTP does not shard it again, and how to convert its shards.

    Relies on `DeepSpeedEngine` skipping AutoTP for a model whose `ds_autotp_parsed` is true, and on the attribute that
    `collect_autotp_universal_checkpoint_info` fills.
    """
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, collect_autotp_universal_checkpoint_info(model))
    setattr(model, _PARSED, True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `mark_as_sharded` was called for `model`."""
    return bool(getattr(model, _PARSED, False))


def skip_sums_over_one_rank(engine: Any) -> None:
    """Without ZeRO the engine sums gradients through a flat copy of them; skip that where there is one DP rank.

    What else it does stays: parameters without a gradient get zeros, experts are divided by their number of ranks.
    Relies on `engine.allreduce_and_copy(small_bucket, dp_group, dp_world_size=None)`.
    """
    through_copy = private(engine, "allreduce_and_copy", _PACKAGE, "not copying gradients for one DP rank")

    def allreduce_and_copy(small_bucket: Any, dp_group: Any, dp_world_size: int | None = None) -> None:
        if torch.distributed.get_world_size(dp_group) > 1 or dp_world_size not in (None, 1):
            through_copy(small_bucket, dp_group, dp_world_size)

    engine.allreduce_and_copy = allreduce_and_copy


def tp_size_of_engine(given: Mapping[str, Any]) -> int:
    """The TP size of the engine that `DeepSpeedEngine.__init__` makes of the arguments `given`, by name.

    Relies on its argument `config_class` having `tensor_parallel_config.autotp_size`; 0 and 1 are without.
    """
    settings = given.get("config_class")
    section = private(settings, "tensor_parallel_config", _PACKAGE, "refusing an engine for another TP size")
    return max(1, int(section.autotp_size))


def are_all_of_deepspeed(hooks: Iterable[Callable[..., Any]]) -> bool:
    """Whether there are `hooks` and DeepSpeed registered every one, as ZeRO 3 does on each module.

    Relies on its hooks being functions of modules called `deepspeed.*`.
    """
    found = list(hooks)
    return bool(found) and all(getattr(hook, "__module__", "").startswith("deepspeed.") for hook in found)


# tensor-parallel layers


class ShardedLayer(TensorParallel_Layer):  # type: ignore[misc]
    """DeepSpeed's base class of tensor-parallel layers, for layers that say themselves how they are sharded.

    Relies on `mp_group`, `tp_index`, `tp_world_size`, `is_tp_parallel` and `name`, which its `__init__` sets, on
    `support_training`, and on `gather_params(params_list)` and `_tp_partition(params_list)` being all that it calls.
    """

    mp_group: Any
    tp_index: int
    tp_world_size: int
    is_tp_parallel: bool
    name: str

    def __init__(self, group: Any, name: str) -> None:
        super().__init__(group, name=name)
        self.support_training = True
        for attribute in ("mp_group", "tp_index", "tp_world_size", "is_tp_parallel", "name", "tp_overlap_comm"):
            private(self, attribute, _PACKAGE, "tensor-parallel layers")

    @abstractmethod
    def gather_params(self, params_list: list[Any]) -> None:
        """Replace the data of sharded parameters by the full parameters. DeepSpeed calls it when it saves."""

    @abstractmethod
    def shard_params(self, params_list: list[Any]) -> None:
        """Replace the data of full parameters by this rank's shards. The reverse of `gather_params`."""

    def _tp_partition(self, params_list: list[Any]) -> None:
        self.shard_params(params_list)

    @property
    def overlaps_communication(self) -> bool:
        """Whether the engine's config has `tp_overlap_comm`."""
        return overlaps_communication()


def overlaps_communication() -> bool:
    """Whether the engine's config has `tp_overlap_comm`. Relies on the flag being set on the class of its layers."""
    return bool(TensorParallel_Layer.tp_overlap_comm)


def mark_as_shard(parameter: Any, gather: Callable[[list[Any]], None], shard: Callable[[list[Any]], None]) -> None:
    """Mark a parameter as one rank's shard, as `TensorParallel_Layer.config_tp_params` does.

    `gather` and `shard` replace the data of parameters by the full ones, and back. Relies on the attributes
    `gather_params`, `_tp_partition`, `tensor_model_parallel` and `ds_is_replaced_module` of parameters.
    """
    parameter.gather_params = gather
    parameter._tp_partition = shard
    setattr(parameter, DS_TENSOR_MODEL_PARALLEL, True)
    setattr(parameter, DS_IS_REPLACED_MODULE, True)


def full_tensors(parameters: list[nn.Parameter], module: nn.Module) -> AbstractContextManager[None]:
    """While active, the data of a module's shards are the full tensors, gathered over the TP ranks.

    Relies on `GatherReplacedLayerParams(params, module, enabled)`, which calls what `mark_as_shard` was given.
    """
    gathered: AbstractContextManager[None] = GatherReplacedLayerParams(parameters, module, enabled=True)
    return gathered


def count_on_first_rank_only(parameter: Tensor) -> None:
    """Leave a shard that a rank before this one holds too out of this rank's part of the gradient norm.

    Relies on the norm taking parameters that are not marked `tensor_model_parallel` on TP rank 0 only.
    """
    setattr(parameter, DS_TENSOR_MODEL_PARALLEL, False)


def count_gradient_on_every_rank(parameter: Tensor) -> None:
    """Mark the gradient of a shard as one; a hook for parameters.

    DeepSpeed's optimizer wrapper for bf16 and fp16 without ZeRO (`FP16_UnfusedOptimizer`) takes the norm of gradients
    without their parameters, and would count those of TP rank 0 alone.
    """
    if parameter.grad is not None:
        setattr(parameter.grad, DS_TENSOR_MODEL_PARALLEL, True)


class _Described:
    """What `TensorParallel_Layer._set_param_uc_meta` reads of the layer it is called on."""

    def __init__(self, tp_world_size: int) -> None:
        self.tp_world_size = tp_world_size


def describe_for_universal_checkpoint(
    parameter: nn.Parameter,
    *,
    tp_size: int,
    partition_type: str,
    dim: int | None,
    logical_shape: Sequence[int],
    output_shape: Sequence[int],
    shape: Sequence[int],
    sizes: Sequence[int] | None,
    is_bias: bool,
    affine_map: Any,
) -> None:
    """Attach to a parameter what DeepSpeed's universal checkpoint must know of it.

    Relies on `TensorParallel_Layer._set_param_uc_meta`, which reads no more of its layer than `tp_world_size`, and on
    `_shape_before_zero3_partition(parameter)`.

    Args:
        parameter: this rank's shard.
        tp_size: number of TP ranks.
        partition_type: `column` or `row`.
        dim: the sharded dimension of `logical_shape`, None when replicated.
        logical_shape: the shape in which it is sharded.
        output_shape: `(out_features,)` of the layer.
        shape: the shape of the full parameter.
        sizes: the length of each rank's shard along `dim`.
        is_bias: whether it is a bias.
        affine_map: where each rank's elements lie, a `ParamAffineMap`.
    """
    describe = private(TensorParallel_Layer, "_set_param_uc_meta", _PACKAGE, "universal checkpoints")
    shape_of = private(TensorParallel_Layer, "_shape_before_zero3_partition", _PACKAGE, "universal checkpoints")
    try:
        describe(
            _Described(tp_size),
            parameter,
            partition_type=partition_type,
            partition_dim=dim,
            logical_shape=logical_shape,
            output_shape=output_shape,
            partition_sizes=sizes,
            target_partition_shape=shape_of(parameter),
            original_shape=shape,
            is_bias=is_bias,
            replicated=dim is None,
            affine_map=affine_map,
        )
    except (AttributeError, TypeError) as error:
        where = "deepspeed.module_inject.layers.TensorParallel_Layer._set_param_uc_meta"
        raise moved(
            _PACKAGE, where, str(error), "the arguments of DeepSpeed 0.19.8, for universal checkpoints"
        ) from None


# optimizers


def is_deepspeed_muon(optimizer: Any) -> bool:
    """Whether an optimizer is the one that DeepSpeed makes for `"type": "Muon"`.

    Relies on its class being `MuonWithAuxAdam` of `deepspeed.runtime.zero.muon.muon_optimizer`, which is not imported
    here: that takes seconds.
    """
    kind = type(optimizer)
    return (kind.__module__, kind.__name__) == ("deepspeed.runtime.zero.muon.muon_optimizer", "MuonWithAuxAdam")


def stepped_tensors(engine: Any) -> dict[int, Tensor] | None:
    """Without ZeRO: the tensor that the optimizer steps for each parameter, by its `id`; None where they are one.

    In fp32 they are the parameters. In fp16 and bf16 relies on `FP16_UnfusedOptimizer.fp16_groups` and `fp32_groups`,
    and on `FP16_Optimizer` (of FusedAdam) having `fp32_groups_flat`.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if wrapper is optimizer:
        return {id(one): one for group in optimizer.param_groups for one in group["params"]}
    if hasattr(wrapper, "fp32_groups_flat"):
        return None
    pairs = zip(
        private(wrapper, "fp16_groups", _PACKAGE, "optimizers in bf16"),
        private(wrapper, "fp32_groups", _PACKAGE, "optimizers in bf16"),
        strict=True,
    )
    return {id(parameter): master for group in pairs for parameter, master in zip(*group, strict=True)}
