"""Where this process stands: TP and DP ranks and groups, made by DeepSpeed, TP innermost."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from deepspeed import init_distributed, set_autotp_mode
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from autotp_plan.schemas.errors import Fault, MismatchError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Ranks, sizes and process groups of this process, and the device it computes on."""

    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: Any
    dp_group: Any
    device: torch.device


def check_world_size(tp_size: int) -> None:
    """Raise MismatchError when the world size is not a multiple of `tp_size`. No communication."""
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
                next=f"launch with torchrun --nproc-per-node {tp_size} (times the data-parallel size)",
            )
        )


def init_ranks(tp_size: int) -> Ranks:
    """Initialise torch.distributed and DeepSpeed's TP groups where the caller has not, and say where we stand.

    Raises MismatchError when the world size or groups that exist already do not fit `tp_size`.
    """
    check_world_size(tp_size)
    accelerator = get_accelerator()
    if not torch.distributed.is_initialized() and "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # on CPU DeepSpeed would compile an operator for inference: half a minute, and a compiler; nothing here calls it
    with patch.object(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None):
        init_distributed(dist_backend="gloo" if accelerator.device_name() == "cpu" else None, verbose=False)
    groups._init_tp_mesh_device(tensor_model_parallel_size=tp_size)
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
        device=torch.device(accelerator.current_device_name()),
    )
