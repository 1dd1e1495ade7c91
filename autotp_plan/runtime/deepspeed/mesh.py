"""The TP x DP mesh as this process sees it: its ranks and process groups, made by DeepSpeed, TP innermost."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from deepspeed import init_distributed, set_autotp_mode
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from autotp_plan.runtime.deepspeed.agreement import are_several, check_same
from autotp_plan.runtime.deepspeed.internals import has_tp_groups, make_tp_groups, without_inference_operator
from autotp_plan.runtime.deepspeed.process_end import wait_for_gloo_at_exit
from autotp_plan.schemas.errors import Fault, MismatchError, OptionError

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)
"""What Open MPI, Intel MPI and MVAPICH call rank, world size and local rank."""

MAX_TIMEOUT = 30 * 24 * 3600
"""The longest time limit of a process group, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Ranks, sizes and process groups of this process, and the device it computes on.

    Attributes:
        tp_rank: this process's rank in its tensor-parallel group.
        tp_size: number of tensor-parallel ranks.
        dp_rank: this process's rank in its data-parallel group.
        dp_size: number of data-parallel ranks.
        tp_group: the process group of the ranks that hold the shards of one copy of the model.
        dp_group: the process group of the ranks that hold the same shards and see different batches.
        device: where this process computes.
    """

    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: Any
    dp_group: Any
    device: torch.device


def check_world_size(tp_size: int) -> None:
    """Check that the processes can be a mesh with `tp_size` TP ranks. No communication.

    Raises:
        MismatchError: the world size is not a multiple of `tp_size`.
    """
    _take_ranks_of_mpi()
    if torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
    else:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % tp_size:
        raise MismatchError(
            Fault(
                what="the number of processes does not fit the plan",
                where="world size",
                got=str(world_size),
                expected=f"a multiple of the plan's tp_size, {tp_size}",
                next=f"launch with torchrun --nproc-per-node {tp_size} (times the data-parallel size)" + _hint(),
            )
        )


def check_timeout(seconds: float) -> None:
    """Raise OptionError for seconds that nobody can wait."""
    if not 0 < seconds <= MAX_TIMEOUT:
        raise OptionError(
            Fault(
                code="timeout",
                what="process groups cannot wait so long",
                where="timeout",
                got=str(seconds),
                expected=f"seconds: more than 0, at most {MAX_TIMEOUT}",
                next="give the seconds after which a rank that waits for another is to end with an error",
            )
        )


def _hint() -> str:
    """What is to be said of a process that `accelerate launch` has started alone."""
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return ""
    return (
        "; `accelerate launch` with --cpu, or without a choice, starts one process: with accelerators "
        "`accelerate launch --use_deepspeed --num_processes N` starts N"
    )


def _take_ranks_of_mpi() -> None:
    """Take the rank that mpirun has given this process, where no launcher of torch has given one."""
    if "RANK" in os.environ or torch.distributed.is_initialized():
        return
    for rank, size, local_rank in _MPI:
        if int(os.environ.get(size, "1")) > 1 and {rank, local_rank} <= os.environ.keys():
            os.environ.update(RANK=os.environ[rank], WORLD_SIZE=os.environ[size], LOCAL_RANK=os.environ[local_rank])
            return


def start_distributed() -> None:
    """Initialise torch.distributed, where the caller has not, and choose this rank's device.

    A process without a launcher (no `RANK` in its environment) becomes a mesh of one.

    Raises:
        MismatchError: this machine has fewer devices than ranks.
    """
    _take_ranks_of_mpi()
    accelerator = get_accelerator()
    if not torch.distributed.is_initialized() and "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if accelerator.device_name() != "cpu":
        accelerator.set_device(_own_device(int(os.environ.get("LOCAL_RANK", "0")), accelerator.device_count()))
    with without_inference_operator():
        init_distributed(dist_backend="gloo" if accelerator.device_name() == "cpu" else None, verbose=False)
    wait_for_gloo_at_exit()


def init_ranks(tp_size: int) -> Ranks:
    """Initialise torch.distributed and the process groups, those that the caller has not made, and find this rank.

    A process without a launcher (no `RANK` in its environment) becomes a mesh of one.

    Args:
        tp_size: number of tensor-parallel ranks.

    Returns:
        This process's place in the mesh.

    Raises:
        MismatchError: the world size, or groups that exist already, do not fit `tp_size`; or this machine has fewer
            devices than ranks.
    """
    start_distributed()
    if are_several() and not has_tp_groups():
        check_same(
            {"tp_size": str(tp_size)},
            what="the ranks would make other process groups",
            where="the plan",
            next_step="give every rank the same plan",
        )
    check_world_size(tp_size)
    return make_ranks(tp_size)


def make_ranks(tp_size: int) -> Ranks:
    """As `init_ranks`, where torch.distributed is initialised and no other rank is asked."""
    make_tp_groups(tp_size)
    existing = groups.get_tensor_model_parallel_world_size()
    if existing != tp_size:
        raise MismatchError(
            Fault(
                what="this process already has TP groups of another size",
                where="deepspeed.utils.groups",
                got=str(existing),
                expected=str(tp_size),
                next="use one TP size per process, or start a new process for this plan",
            )
        )
    set_autotp_mode(training=True)
    return Ranks(
        tp_rank=groups.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        dp_rank=groups.get_data_parallel_rank(),
        dp_size=groups.get_data_parallel_world_size(),
        tp_group=groups.get_tensor_model_parallel_group(),
        dp_group=groups.get_data_parallel_group(),
        device=torch.device(get_accelerator().current_device_name()),
    )


def _own_device(local_rank: int, count: int) -> int:
    """The number of the device that a rank of this machine computes on."""
    if local_rank < count:
        return local_rank
    raise MismatchError(
        Fault(
            what="this machine has fewer devices than ranks",
            where=f"the environment variable LOCAL_RANK of rank {os.environ.get('RANK', '0')}",
            got=f"{local_rank}, with {count} visible device{'s' * (count != 1)}",
            expected=f"at most {count - 1}: a device for each rank",
            next=f"start {count} process{'es' * (count != 1)} on each machine, or run on CPU with DS_ACCELERATOR=cpu",
        )
    )
