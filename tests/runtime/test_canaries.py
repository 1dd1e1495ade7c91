"""Every private name of DeepSpeed and torch that the runtime relies on is there, and as it was.

A new version of DeepSpeed fails here first, in a second, and says what would break.
"""

from __future__ import annotations

import importlib
import io
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.canaries import Canary, problem, takes, uses

LAYERS = "deepspeed.module_inject.layers"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
STAGES_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
KEYS = "deepspeed.checkpoint.constants"
MUON = "DeepSpeed's Muon on a sharded model"
RESUMING = "resuming a job on a different mesh"
FINITE = "naming gradients that are not finite"
AS_DATA = "reading a saved job without running code from it"
WITHOUT_DATA = "running a step on tensors without data"
FILES = "reading a saved job, to resume it on a different mesh"


def layer_has_what_layers_use(cls: Any) -> bool:
    class Layer(cls):  # type: ignore[misc]
        def forward(self, input: Any) -> Any: ...
        def gather_params(self, params_list: Any) -> None: ...
        def _tp_partition(self, params_list: Any) -> None: ...

    layer = Layer(None, name="here")
    asked = cls.__abstractmethods__ == {"forward", "gather_params", "_tp_partition"}
    return asked and (layer.mp_group, layer.tp_index, layer.tp_world_size, layer.is_tp_parallel, layer.name) == (
        None, 0, 1, False, "here",
    )  # fmt: skip


def threads_have_a_name(gloo: Any) -> bool:
    from autotp_plan.runtime.deepspeed.process_end import gloo_threads

    before = gloo_threads().keys()
    group = gloo(torch.distributed.HashStore(), 0, 1, timedelta(seconds=10))  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while not gloo_threads().keys() - before and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread takes its name when it first runs
    return group.size() == 1 and len(gloo_threads().keys() - before) > 0


def says_where_tensors_are(load: Any) -> bool:
    from autotp_plan.runtime.tensor_parallel.torch_internals import position_in_file, says_where_tensors_lie

    if torch.__version__.split(".")[:2] in (["2", "6"], ["2", "7"]):
        return True  # it need not be there yet
    file = io.BytesIO()
    torch.save({"one": torch.ones(3), "two": torch.arange(9)[4:]}, file)
    file.seek(0)
    start = position_in_file(load(file, map_location="meta", weights_only=True)["two"])
    return says_where_tensors_lie() and file.getvalue()[start : start + 8] == (4).to_bytes(8, "little")


def description_needs_the_world_size_alone(describe: Any) -> bool:
    from deepspeed.checkpoint.affine import replicated_map

    parameter = nn.Parameter(torch.zeros(2))
    describe(
        SimpleNamespace(tp_world_size=1), parameter, partition_type="column", partition_dim=None, logical_shape=(2,),
        output_shape=(2,), partition_sizes=None, target_partition_shape=(2,), original_shape=(2,), is_bias=False,
        replicated=True, affine_map=replicated_map((2,), 1),
    )  # fmt: skip
    return bool(vars(parameter))


def storages_are_counted(mode: Any) -> bool:
    """A view counts with what it is a view of, and what nothing refers to counts no more."""
    from autotp_plan.runtime.estimate.fake_internals import Watch

    watch = Watch(lambda *_: None)
    with mode(), watch:
        tensor = torch.empty(1000, dtype=torch.float32)
        view = tensor[10:]
        del tensor
        counted = watch.live
        del view
    return (counted, watch.live, watch.peak) == (4000, 0, 4000)


def mappings_say_where_parameters_lie(link: Any) -> bool:
    """Two parameters of 4 and 6 elements; the second of two partitions of 6 begins with element 2 of the second."""
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(6))]
    link(
        lp_param_list=parameters, flat_hp_partition=torch.zeros(6), gradient_dict={}, offload_gradient_dict={},
        use_offload=False, param_group_index=3, partition_start=6, partition_size=6, dp_group=None,
    )  # fmt: skip
    none, held = (getattr(parameter, "_hp_mapping") for parameter in parameters)  # noqa: B009 - a private name
    flat = held.get_hp_fragment_address()
    return none is None and (held.param_group_index, held.lp_fragment_address.start, flat.start, flat.numel) == (
        3, 2, 0, 4,
    )  # fmt: skip


def positions_are_group_offset_size(set_positions: Any) -> bool:
    sizes = [SimpleNamespace(key=key, partition_numel=lambda size=size: size) for key, size in (("a", 4), ("b", 6))]
    optimizer = SimpleNamespace(fp16_groups=[sizes], grad_position={}, get_param_id=lambda parameter: parameter.key)
    set_positions(optimizer)
    return bool(optimizer.grad_position == {"a": [0, 0, 4], "b": [0, 4, 6]})


def optimizer_files_are_called_so(name: Any) -> bool:
    from autotp_plan.runtime.deepspeed.zero_internals import optimizer_states_files

    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    stub = SimpleNamespace(
        _get_zero_ckpt_prefix=lambda *args, **kwargs: engine._get_zero_ckpt_prefix(None, *args, **kwargs)
    )
    found = tuple(name(stub, "folder", "tag", 1, 2, bf16_mode=bf16).rpartition("/")[2] for bf16 in (False, True))
    return found == optimizer_states_files(1, 2)


def model_files_are_called_so(name: Any) -> bool:
    from autotp_plan.runtime.deepspeed.zero_internals import model_states_file

    found = []
    for partitioned in (False, True):
        stub = SimpleNamespace(checkpoint_mp_rank=1, zero_optimization_partition_weights=lambda it=partitioned: it)
        found.append(name(stub, "folder", "tag", pp_placeholder="0").rpartition("/")[2])
    return found == [model_states_file(2, 1), model_states_file(3, 1)]


def hooks_are_of_deepspeed(cls: Any) -> bool:
    from autotp_plan.runtime.deepspeed.internals import are_all_of_deepspeed

    def ours() -> None: ...

    return (
        are_all_of_deepspeed([cls.setup_zero_stage3_hooks])
        and not are_all_of_deepspeed([cls.setup_zero_stage3_hooks, ours])
        and not are_all_of_deepspeed([])
    )


def holds_data_alone(cls: Any) -> bool:
    return "__reduce__" not in vars(cls) and "__setstate__" not in vars(cls)


def version_counts_changes(_: Any) -> bool:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    return tensor._version == before + 1


def base_is_what_a_view_is_of(_: Any) -> bool:
    weight = nn.Parameter(torch.zeros(2, 3, 4))
    return weight.transpose(1, 2)._base is weight and weight._base is None


def an_alias_shares_its_version(_: Any) -> bool:
    from torch.utils._python_dispatch import TorchDispatchMode

    from autotp_plan.runtime.tensor_parallel.torch_internals import alias_of

    found: list[Any] = []

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            found.append(alias_of(result))
            return result

    with Keep():
        made = torch.ones(2, requires_grad=True).exp()
    before = found[-1]._version
    made.mul_(2)
    return found[-1].grad_fn is None and found[-1]._version == before + 1


def saving_is_noticed(top_hooks: Any) -> bool:
    from autotp_plan.runtime.tensor_parallel.torch_internals import on_saving

    noticed: list[int] = []
    weight = torch.ones(2, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda it: it * 3, lambda it: it),
        on_saving(lambda: noticed.append(1)),
    ):
        result = weight.exp()
    (found,) = torch.autograd.grad(result.sum(), [weight])
    return top_hooks(True) is None and len(noticed) == 1 and torch.equal(found, 3 * result.detach())


def storage_is_that_of_views(_: Any) -> bool:
    from autotp_plan.runtime.tensor_parallel.torch_internals import storage_of

    tensor = torch.ones(2, 3)
    product = torch.ones(2, 2, 3) @ torch.ones(3, 3)  # whose version is not that of the product below
    return storage_of(tensor.t()) == storage_of(tensor) != storage_of(tensor.clone()) and product._base is None


def schemas_say_what_changes(_: Any) -> bool:
    from autotp_plan.runtime.tensor_parallel.torch_internals import changed_by

    one, other = torch.ones(2, 2), torch.ones(2, 2)
    aten = torch.ops.aten
    return (
        [id(found) for found in changed_by(aten.add_.Tensor, (one, other), {})] == [id(one)]
        and [id(found) for found in changed_by(aten.mm.out, (one, one), {"out": other})] == [id(other)]
        and changed_by(aten.mm.default, (one, other), None) == []
    )


def assertion_raises(assert_async: Any) -> bool:
    assert_async(torch.tensor(True), "said")
    try:
        assert_async(torch.tensor(False), "said")
    except RuntimeError as error:
        return "said" in str(error)
    return False


SAVING_ALL = "saving a sharded model as a model"
CANARIES = [
    # the mesh
    Canary("deepspeed.comm.torch:build_shm_op", "starting on CPU without compiling an operator for half a minute"),
    Canary("deepspeed.comm.torch:TorchBackend.__init__", "the same: it must call build_shm_op", uses("build_shm_op")),
    Canary("deepspeed.utils.groups:_init_tp_mesh_device", "making the TP and DP groups",
           takes("tensor_model_parallel_size")),
    Canary("deepspeed.utils.groups:_TENSOR_MODEL_PARALLEL_GROUP", "finding TP groups that are there"),
    Canary("deepspeed.utils.groups:get_tensor_model_parallel_group", "plan.ranks.tp_group"),
    Canary("deepspeed.utils.groups:get_tensor_model_parallel_rank", "plan.ranks.tp_rank"),
    Canary("deepspeed.utils.groups:get_tensor_model_parallel_world_size", "finding groups of another TP size"),
    Canary("deepspeed.utils.groups:get_data_parallel_group", "plan.ranks.dp_group"),
    Canary("deepspeed.utils.groups:get_data_parallel_rank", "plan.ranks.dp_rank"),
    Canary("deepspeed.utils.groups:get_data_parallel_world_size", "plan.ranks.dp_size"),
    Canary("deepspeed:set_autotp_mode", "layers that are built to train", takes("training")),
    Canary("deepspeed.runtime.tensor_parallel.init_utils:_TP_MODEL_INIT_ARGS",
           "comparing a script's deepspeed.tp_model_init with the plan"),
    Canary("deepspeed.runtime.tensor_parallel.init_utils:record_tp_model_init_args",
           "the same: it must record tp_size and tp_group", uses("tp_size", "tp_group")),
    # the engine
    Canary(ENGINE, "telling the engine that a model is sharded: AutoTP would shard it again",
           uses("ds_autotp_parsed")),
    Canary(f"{ENGINE}.allreduce_and_copy", "not copying gradients where there is one DP rank",
           takes("small_bucket", "dp_group", "dp_world_size")),
    Canary(f"{ENGINE}.allreduce_no_retain", "the same: it must call allreduce_and_copy", uses("allreduce_and_copy")),
    Canary(f"{ENGINE}.deepspeed_io", "the loader of initialize",
           takes("data_sampler", "collate_fn", "pin_memory", "num_local_io_workers")),
    Canary(f"{ENGINE}.__init__", "the counters that a job resumes with",
           uses("global_steps", "global_samples", "skipped_steps", "micro_steps")),
    Canary(f"{ENGINE}._load_checkpoint", "the files of a job: read by checkpoint_engine", uses("checkpoint_engine")),
    Canary(f"{ENGINE}._save_checkpoint", "the files of a job: written by checkpoint_engine", uses("checkpoint_engine")),
    Canary("deepspeed.runtime.checkpoint_engine.checkpoint_engine:CheckpointEngine.load",
           AS_DATA, takes("path", "map_location")),
    Canary("deepspeed.runtime.fp16.loss_scaler:LossScaler", AS_DATA, holds_data_alone),
    Canary("deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler", AS_DATA, holds_data_alone),
    Canary("deepspeed.runtime.zero.config:ZeroStageEnum", AS_DATA, lambda cls: cls(2).name == "gradients"),
    Canary("deepspeed.utils.tensor_fragment:fragment_address", AS_DATA, lambda cls: cls(numel=1, start=2).start == 2),
    Canary("deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload",
           "sharing input gradients between layers under ZeRO 3 (slower, in silence)", hooks_are_of_deepspeed),
    # tensor-parallel layers
    Canary(f"{LAYERS}:TensorParallel_Layer", "every tensor-parallel layer", layer_has_what_layers_use),
    Canary(f"{LAYERS}:TensorParallel_Layer._tp_partition", "every tensor-parallel layer", takes("params_list")),
    Canary(f"{LAYERS}:TensorParallel_Layer.gather_params", "every tensor-parallel layer", takes("params_list")),
    Canary(f"{LAYERS}:TensorParallel_Layer.tp_overlap_comm", "overlapping collectives with computation",
           lambda flag: flag is False),
    Canary(f"{LAYERS}:TensorParallel_Layer.config_tp_params", "marking parameters as shards, for the gradient norm",
           uses("gather_params", "_tp_partition", "DS_TENSOR_MODEL_PARALLEL", "DS_IS_REPLACED_MODULE")),
    Canary(f"{LAYERS}:TensorParallel_Layer._set_param_uc_meta", "universal checkpoints",
           description_needs_the_world_size_alone),
    Canary(f"{LAYERS}:TensorParallel_Layer._shape_before_zero3_partition", "universal checkpoints",
           lambda shape_of: shape_of(torch.zeros(2, 3)) == (2, 3)),
    Canary(f"{LAYERS}:DS_TENSOR_MODEL_PARALLEL", "counting shards in the gradient norm",
           lambda name: name == "tensor_model_parallel"),
    Canary("deepspeed.runtime.utils:is_model_parallel_parameter", "counting shards in the gradient norm",
           lambda asks: asks(SimpleNamespace(tensor_model_parallel=True))
           and not asks(SimpleNamespace(tensor_model_parallel=False))),
    Canary(f"{LAYERS}:DS_IS_REPLACED_MODULE", "gathering shards for consolidated checkpoints"),
    Canary(f"{LAYERS}:GatherReplacedLayerParams", "saving LoRA adapters",
           takes("params", "module", "enabled")),
    Canary(f"{LAYERS}:collect_autotp_universal_checkpoint_info", "universal checkpoints", takes("model")),
    Canary("deepspeed.checkpoint.affine:AffinePiece", "universal checkpoints",
           takes("shape", "source_offset", "source_strides", "dest_offset", "dest_strides", "locations")),
    Canary("deepspeed.checkpoint.affine:ParamAffineMap", "universal checkpoints",
           takes("logical_shape", "shard_shapes", "pieces_by_rank")),
    Canary("deepspeed.checkpoint.affine:replicated_map", "universal checkpoints"),
    # ZeRO, running
    Canary("deepspeed.utils.mixed_precision_linkage:link_hp_params", RESUMING + " (ZeRO 1 and 2)",
           mappings_say_where_parameters_lie),
    Canary(STAGES_1_2, RESUMING + " (ZeRO 1 and 2)", uses("single_partition_of_fp32_groups", "link_hp_params")),
    Canary(f"{STAGES_1_2}.update_lp_params", RESUMING + " (ZeRO 1 and 2)"),
    Canary(f"{STAGES_1_2}.load_state_dict", RESUMING + " (ZeRO 1 and 2)",
           takes("load_optimizer_states", "load_from_fp32_weights")),
    Canary(BF16, RESUMING + " (bf16)", uses("fp32_groups_flat_partition", "link_hp_params")),
    Canary(f"{BF16}.update_lp_params", RESUMING + " (bf16)"),
    Canary(f"{BF16}.load_state_dict", RESUMING + " (bf16)", takes("load_optimizer_states", "load_from_fp32_weights")),
    Canary(STAGE_3, RESUMING + " (ZeRO 3)",
           uses("fp32_partitioned_groups_flat", "grad_position", "get_param_id", "ds_numel", "swap_optimizer")),
    Canary(f"{STAGE_3}.set_grad_positions", RESUMING + " (ZeRO 3)", positions_are_group_offset_size),
    Canary(f"{STAGE_3}.get_param_id", RESUMING + " (ZeRO 3)"),
    Canary(f"{STAGE_3}._get_param_partition_rank", RESUMING + " (ZeRO 3)", takes("param")),
    Canary(f"{STAGE_3}.checkpoint_event_prologue", RESUMING + " (ZeRO 3)"),
    Canary(f"{STAGE_3}.checkpoint_event_epilogue", RESUMING + " (ZeRO 3)"),
    Canary(f"{STAGE_3}.load_state_dict", RESUMING + " (ZeRO 3)",
           takes("load_optimizer_states", "load_from_fp32_weights")),
    Canary("deepspeed.runtime.zero.partition_parameters:Init", "saving weights under ZeRO 3",
           uses("ds_tensor", "ds_numel", "ds_id", "ds_shape")),
    # what it would save of shards
    Canary(f"{ENGINE}._copy_recovery_script", SAVING_ALL, takes("save_path")),
    Canary(f"{ENGINE}._consolidated_16bit_state_dict", SAVING_ALL, takes("exclude_frozen_parameters")),
    Canary(f"{ENGINE}._zero3_consolidated_16bit_state_dict", SAVING_ALL, takes("exclude_frozen_parameters")),
    Canary(f"{ENGINE}._replace_module_consolidated_state_dict", SAVING_ALL),
    # what it saves
    Canary(f"{ENGINE}._get_rank_zero_ckpt_name", FILES, optimizer_files_are_called_so),
    Canary(f"{ENGINE}._get_ckpt_name", FILES, model_files_are_called_so),
    Canary(f"{KEYS}:OPTIMIZER_STATE_DICT", FILES, lambda key: key == "optimizer_state_dict"),
    Canary(f"{KEYS}:BASE_OPTIMIZER_STATE", FILES, lambda key: key == "base_optimizer_state"),
    Canary(f"{KEYS}:SINGLE_PARTITION_OF_FP32_GROUPS", FILES, lambda key: key == "single_partition_of_fp32_groups"),
    Canary(f"{KEYS}:FP32_FLAT_GROUPS", FILES, lambda key: key == "fp32_flat_groups"),
    Canary(f"{KEYS}:PARAM_SLICE_MAPPINGS", FILES, lambda key: key == "param_slice_mappings"),
    Canary(f"{KEYS}:PARAM_SHAPES", FILES, lambda key: key == "param_shapes"),
    Canary(f"{KEYS}:PARAM_GROUPS", FILES, lambda key: key == "param_groups"),
    Canary(f"{KEYS}:LOSS_SCALER", FILES, lambda key: key == "loss_scaler"),
    Canary(f"{KEYS}:UNIVERSAL_CHECKPOINT_INFO", "universal checkpoints"),
    Canary(f"{STAGES_1_2}.state_dict", FILES,
           uses("BASE_OPTIMIZER_STATE", "SINGLE_PARTITION_OF_FP32_GROUPS", "PARAM_SLICE_MAPPINGS",
                "dynamic_loss_scale", "overflow")),
    # optimizers
    Canary(f"{STAGES_1_2}.get_flat_partition", MUON,
           uses("deepspeed.runtime.zero.muon.original_muon", "muon_update", "all_grad_tensors",
                "_get_flat_partition_unpadded")),
    Canary(f"{STAGES_1_2}._get_flat_partition_unpadded", MUON,
           uses("deepspeed.runtime.zero.muon.original_muon", "muon_update", "all_grad_tensors")),
    Canary(f"{ENGINE}._configure_basic_optimizer", MUON,
           uses("deepspeed.runtime.zero.muon.muon_optimizer", "MuonWithAuxAdam")),
    Canary("deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer.__init__",
           "optimizers that look at whole tensors, in bf16", uses("fp16_groups", "fp32_groups")),
    Canary("deepspeed.runtime.fp16.fused_optimizer:FP16_Optimizer.__init__", "DeepSpeed's fused Adam in bf16",
           uses("fp32_groups_flat")),
    Canary(f"{ENGINE}._configure_optimizer", "optimizers on a sharded model",
           uses("basic_optimizer")),
    Canary(f"{ENGINE}.__init__", "refusing an engine for another TP size", takes("model", "config_class")),
    Canary("deepspeed.runtime.config:DeepSpeedConfig._initialize_params", "refusing an engine for another TP size",
           uses("tensor_parallel_config")),
    # torch
    Canary("torch.nn.utils.clip_grad:_get_total_norm", "clip_grad_norm_ on a sharded model",
           takes("tensors", "norm_type", "error_if_nonfinite", "foreach")),
    Canary("torch.nn.utils.clip_grad:clip_grad_norm_", "clip_grad_norm_ on a sharded model", uses("_get_total_norm")),
    Canary("torch.optim._muon:_zeropower_via_newtonschulz", "verify --optimizer muon",
           takes("grad", "ns_coefficients", "ns_steps", "eps")),
    Canary("torch.optim._muon:_single_tensor_muon", "verify --optimizer muon", uses("_zeropower_via_newtonschulz")),
    Canary("torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__",
           "finding that an optimizer communicates"),
    Canary("torch:load", "reading a saved job on another mesh by bytes (a disk error would be SIGBUS)",
           says_where_tensors_are),
    Canary(f"{STAGES_1_2}.step", FINITE, uses("averaged_gradients", "zero_grad", "overflow")),
    Canary(f"{STAGES_1_2}.scaled_global_norm", FINITE, uses("averaged_gradients", "params_in_partition")),
    Canary(f"{STAGE_3}._overflow_clean_up", FINITE, uses("zero_grad", "averaged_gradients")),
    Canary(STAGE_3, FINITE, uses("averaged_gradients", "fp16_groups", "sub_group_to_group_id")),
    Canary(f"{STAGES_1_2}.__init__", FINITE, uses("bit16_groups")),
    Canary(f"{BF16}.step", FINITE, uses("clear_hp_grads", "overflow", "_global_grad_norm")),
    Canary(f"{BF16}.clear_hp_grads", FINITE, uses("fp32_groups_gradients")),
    Canary(f"{BF16}.clear_lp_grads", FINITE, uses("bf16_groups")),
    Canary("deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer._skip_invalid_grad_norm", FINITE,
           uses("overflow", "zero_grad")),
    Canary("deepspeed.runtime.fp16.fused_optimizer:FP16_Optimizer._skip_invalid_grad_norm", FINITE,
           uses("overflow", "zero_grad")),
    Canary(f"{ENGINE}.get_global_grad_norm", FINITE),
    Canary("torch.distributed.distributed_c10d:_get_default_store", "finding ranks that do not make a call",
           uses("_get_default_group")),
    Canary("torch.distributed.distributed_c10d:_world.pg_map", "setting how long process groups wait"),
    Canary("torch.distributed.distributed_c10d:_set_pg_timeout", "setting how long process groups wait",
           takes("timeout", "group")),
    Canary("torch.distributed:ProcessGroupGloo", "waiting at the end of a process for gloo's threads",
           threads_have_a_name),
    Canary("torch:Tensor._version", "sharing input gradients, after a tensor was changed in place",
           version_counts_changes),
    Canary("torch:Tensor._base", "selective activation checkpointing of experts", base_is_what_a_view_is_of),
    Canary("torch:_C._SetExcludeDispatchKeyGuard", "selective activation checkpointing", an_alias_shares_its_version),
    Canary("torch:_C._autograd._top_saved_tensors_default_hooks", "selective activation checkpointing",
           saving_is_noticed),
    Canary("torch:UntypedStorage._cdata", "products that are changed in place, in selective activation checkpointing",
           storage_is_that_of_views),
    Canary("torch:_ops.OpOverload.__init__", "which tensors an operator changes: its `_schema`",
           schemas_say_what_changes),
    Canary("torch:_assert_async", "refusing labels that are not in the vocabulary", assertion_raises),
    Canary("torch:_C.DisableTorchFunctionSubclass", "logits that are gathered at first use"),
    Canary("torch.utils._pytree:tree_map_only", "logits that are gathered at first use",
           lambda apply: apply(int, lambda it: it + 1, ([1], {"a": 2.0})) == ([2], {"a": 2.0})),
    Canary("torch.utils._pytree:tree_leaves", "logits that are gathered at first use",
           lambda leaves: leaves(([1], {"a": 2.0})) == [1, 2.0]),
    Canary("torch.nn:Linear", "sharing input gradients between layers under ZeRO 3",
           lambda cls: len(cls(1, 1)._forward_pre_hooks.values()) == 0),
    Canary("torch.nn:Embedding", "refusing hooks on a head whose logits are computed in chunks",
           lambda cls: len(cls(1, 1)._forward_hooks.values()) == 0),
    Canary("torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.__init__",
           "refusing fully_shard of a model that is sharded", takes("params", "modules")),
    Canary("torch.testing._internal.distributed.fake_pg:FakeStore", WITHOUT_DATA),
    Canary("torch._subclasses.fake_tensor:FakeTensorMode", WITHOUT_DATA, storages_are_counted),
    Canary("torch.ops:aten._grouped_mm", WITHOUT_DATA),
    Canary("torch.ops:aten._local_scalar_dense", WITHOUT_DATA),
    Canary("torch.autograd.graph:_engine_run_backward", WITHOUT_DATA),
    Canary("deepspeed.runtime.zero.partitioned_param_coordinator:assert_ints_same_as_other_ranks", WITHOUT_DATA),
    Canary("deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator.reset_step",
           WITHOUT_DATA, uses("assert_ints_same_as_other_ranks")),
    Canary("deepspeed.runtime.zero.partition_parameters:Init", WITHOUT_DATA),
    Canary(f"{ENGINE}._configure_tensor_parallel_states", WITHOUT_DATA, uses("first_dataloader_check")),
    Canary("torch.ops:aten._scaled_dot_product_flash_attention_for_cpu", WITHOUT_DATA),
    Canary("torch.nn:BatchNorm1d", "finding the shard of a layer whose attribute shows the full weight",
           lambda cls: set(cls(1)._parameters) == {"weight", "bias"} and "running_mean" in cls(1)._buffers),
    Canary("torch.nn:Module.__getattr__", "zeroing biases that one rank alone may add (module_boundary)",
           lambda _: "weight" not in vars(nn.Linear(1, 1))),
]  # fmt: skip


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_private_names_are_as_they_were(canary: Canary) -> None:
    assert not problem(canary), problem(canary)


@pytest.mark.parametrize(
    "canary", [one for one in CANARIES if not one.name.startswith("torch")], ids=lambda canary: canary.name
)
def test_a_name_that_moved_is_found(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*canary.owner())
    assert f"This breaks: {canary.breaks}." in problem(canary)


def test_another_meaning_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures and behaviour, of one canary of each sort."""

    class Renamed:
        def __init__(self) -> None:
            self.gradient_position: dict[str, int] = {}

    planted: dict[str, Any] = {
        f"{ENGINE}.allreduce_and_copy": lambda self, bucket, group: None,
        f"{ENGINE}._get_ckpt_name": lambda self, *args, **kwargs: "elsewhere/model.pt",
        f"{STAGE_3}.set_grad_positions": lambda self: None,
        STAGE_3: Renamed,
        f"{KEYS}:PARAM_SHAPES": "parameter_shapes",
        "deepspeed.utils.mixed_precision_linkage:link_hp_params": lambda **_: None,
    }
    for name, value in planted.items():
        canary = next(one for one in CANARIES if one.name == name)
        with monkeypatch.context() as patched:
            patched.setattr(*canary.owner(), value)
            assert f"This breaks: {canary.breaks}." in problem(canary), name
