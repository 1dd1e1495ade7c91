"""Loading a rank's part of a model: all ranks must find the same first, and whoever fails tells the others."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autotp_plan.runtime.calls.loaded import Loaded
from autotp_plan.runtime.calls.sharded_model import become_sharded
from autotp_plan.runtime.data.batch_check import batch_comparison, check_interval
from autotp_plan.runtime.deepspeed.agreement import are_several, check_same, is_first_rank, together
from autotp_plan.runtime.deepspeed.attendance import SECONDS_FOR_FIRST, check_all_call
from autotp_plan.runtime.deepspeed.mesh import Ranks, check_world_size, start_distributed
from autotp_plan.runtime.loading.activation_checkpointing import (
    check_activation_checkpointing,
    use_activation_checkpointing,
)
from autotp_plan.runtime.loading.check_model import check_model
from autotp_plan.runtime.loading.empty_model import empty_model
from autotp_plan.runtime.loading.read_weights import read_weights
from autotp_plan.runtime.loading.shard_model import shard_model
from autotp_plan.runtime.loading.weights import WeightSource, open_weights
from autotp_plan.runtime.losses.chunked_loss import check_loss_chunks
from autotp_plan.runtime.optimizers.choose import (
    check_every_optimizer,
)
from autotp_plan.runtime.optimizers.grad_norm import use_global_norm
from autotp_plan.runtime.parameters.compared import (
    config_of,
    flat,
    lenient_versions,
    versions,
)
from autotp_plan.runtime.tensor_parallel.dropout_rng import has_dropout, use_sharded_regions
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.sources.model_folder import ModelFolder, model_folder

_NO_MESH = "the process groups could not be made"
_NOT_READ = "the weights could not be read"


def load_model(
    plan: Plan,
    init_mesh: Callable[[], Ranks],
    path: str | os.PathLike[str],
    *,
    model: nn.Module | Callable[[], nn.Module] | None,
    dtype: torch.dtype | None,
    verify_checksums: bool,
    map_shards: bool,
    share_input_gradients: bool,
    vocab_parallel_loss: bool,
    check_batches_every: int | None,
    loss_chunks: int | None,
    activation_checkpointing: str | None,
    options: Mapping[str, Any],
) -> nn.Module:
    """As `TrainingPlan.load_model`, for the plan `plan`; `init_mesh` makes the process groups, or gives them."""
    if are_several():  # first the means to tell the others what was found
        start_distributed()
        check_all_call("plan.load_model", seconds=SECONDS_FOR_FIRST)
        together(init_mesh, _NO_MESH, "correct what is wrong")
    check_world_size(plan.tp_size)

    def found() -> tuple[ModelFolder, WeightSource, nn.Module, dict[str, torch.dtype], str]:
        check_interval(check_batches_every)
        check_loss_chunks(loss_chunks, vocab_parallel_loss)
        place = model_folder(path)
        source = open_weights(
            place,
            plan,
            verify_checksums=verify_checksums,
            map_shards=map_shards,
            keep_open=is_first_rank(),
        )
        built, dtypes = empty_model(place, plan, model, dtype, options)
        check_model(built, plan)
        check_activation_checkpointing(activation_checkpointing, built)
        return place, source, built, dtypes, source.fingerprint() if are_several() else ""

    place, source, built, dtypes, fingerprint = together(found, _NOT_READ, "correct what is wrong")
    ranks = init_mesh()
    check_same(
        {
            "plan": plan.fingerprint,
            "checkpoint": fingerprint,
            "config": config_of(built),
            "dtypes": {name: str(dtype) for name, dtype in dtypes.items()},
            "options": flat(
                [share_input_gradients, vocab_parallel_loss, check_batches_every, loss_chunks, activation_checkpointing]
            ),
            "versions": versions(),
        },
        what="the ranks would load parts of different models",
        where=f"load_model({str(path)!r})",
        next_step="give every rank the same plan, arguments, and shards or a checkpoint of the same weights; "
        "install the same versions on all hosts",
        warn_of={"other versions": lenient_versions()},
    )
    shards = source.of_rank(ranks.tp_rank)

    def load() -> None:
        read = read_weights(shards, ranks.device, dtypes, once=ranks.dp_size == 1)
        shard_model(
            built,
            plan,
            ((weight.name, tensor) for weight, tensor in read),
            ranks,
            share_input_gradients=share_input_gradients,
            vocab_parallel_loss=vocab_parallel_loss,
            loss_chunks=loss_chunks,
        )

    together(
        load,
        _NOT_READ,
        "free memory or correct what is wrong on that rank, and load the model again",
    )
    if activation_checkpointing is not None:
        use_activation_checkpointing(built, activation_checkpointing)
    if plan.tp_size > 1 and has_dropout(built):
        use_sharded_regions(ranks.tp_group)
    if plan.tp_size > 1:
        use_global_norm()
        _guard_peft()
        check_every_optimizer()
    become_sharded(
        built,
        Loaded(
            plan=plan,
            ranks=ranks,
            place=dataclasses.replace(place, folder=place.folder.absolute()),
            original=source.original,
            compare_batch=batch_comparison(ranks, check_batches_every, has_dropout(built)),
        ),
    )
    return built


def _guard_peft() -> None:
    if importlib.util.find_spec("peft") is not None:
        from autotp_plan.runtime.integrations.lora import guard_peft

        guard_peft()
