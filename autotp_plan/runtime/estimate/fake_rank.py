"""One rank's part of a planned model, from the plan alone: sharded as in a job, and without data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.mesh import Ranks, make_ranks, start_distributed
from autotp_plan.runtime.estimate.fake_internals import join_fake_world, without_data
from autotp_plan.runtime.loading.check_model import check_model
from autotp_plan.runtime.loading.empty_model import empty_model
from autotp_plan.runtime.loading.shard_model import shard_model
from autotp_plan.runtime.loading.weights import DTYPES
from autotp_plan.runtime.losses.vocab_loss import keep_logits_sharded
from autotp_plan.schemas.documents import format_json
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.layout import parameter_shape
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME
from autotp_plan.sources.model_folder import model_folder


def fake_rank(
    plan: Plan, rank: int, dp_size: int, dtype: torch.dtype, loss_chunks: int | None = None
) -> tuple[Any, Ranks, Any]:
    """Make this process a rank of a world that is not there, with its part of the model.

    A process can do it once, and nothing else with torch.distributed.

    Args:
        plan: of a transformers model.
        rank: in the world of `plan.tp_size * dp_size` ranks; TP ranks are neighbours.
        dp_size: number of data-parallel ranks.
        dtype: of the weights that a checkpoint's dtype decides.
        loss_chunks: as for `load_model`.

    Returns:
        The model in training mode, whose tensors have no data; the ranks; and the mode in which it runs.

    Raises:
        MismatchError: the plan has no config, or its model is not the one that transformers builds, or its loss cannot
            be computed in chunks.
        CheckpointError: transformers cannot build the model.
    """
    if plan.model.config is None:
        raise MismatchError(
            Fault(
                code="no-config",
                what="the plan is of a model without a config, which cannot be built from the plan alone",
                where="model.config",
                got="none",
                expected="a plan of a transformers model",
                next="compile the plan from a folder with a config.json",
            )
        )
    world_size = plan.tp_size * dp_size
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    join_fake_world(rank, world_size)
    start_distributed()
    ranks = make_ranks(plan.tp_size)
    with tempfile.TemporaryDirectory(prefix="autotp-estimate-") as name:
        config = {**plan.model.config, "pad_token_id": 0}  # plans hold no token ids, and a default may be out of range
        (Path(name) / CONFIG_NAME).write_text(format_json(config), encoding="utf-8")
        model, dtypes = empty_model(model_folder(name), plan, None, dtype, {})
    check_model(model, plan)
    mode = without_data()
    shard_model(model, plan, _empty_shards(plan, ranks, dtypes, mode), ranks, loss_chunks=loss_chunks)
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, leaf, mode.from_tensor(buffer))
    if loss_chunks is None:
        keep_logits_sharded(model)
    return model.train(), ranks, mode


def _empty_shards(plan: Plan, ranks: Ranks, dtypes: dict[str, torch.dtype], mode: Any) -> Iterator[tuple[str, Tensor]]:
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        shape = parameter_shape(plan.shape_of(parameter), layout.shape, layout.rank_shape(ranks.tp_rank))
        with mode:
            made = torch.empty(shape, dtype=dtypes.get(parameter.name, DTYPES[parameter.dtype]), device=ranks.device)
        yield parameter.name, made


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """The bytes of a model's parameters, each once, and of its buffers."""
    parameters = sum(one.numel() * one.element_size() for one in model.parameters())
    return parameters, sum(one.numel() * one.element_size() for one in model.buffers())
