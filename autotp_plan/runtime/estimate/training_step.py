"""What a forward and backward of one rank take: memory over time, floating-point operations, collectives."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.huggingface.internals import with_sequences_unpacked
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.estimate.fake_internals import Watch, count_operations
from autotp_plan.runtime.estimate.fake_rank import bytes_of, fake_rank
from autotp_plan.runtime.loading.activation_checkpointing import use_activation_checkpointing
from autotp_plan.runtime.tensor_parallel.gathered_weight import showing_shards
from autotp_plan.schemas.estimate.step import Collective, Step
from autotp_plan.schemas.plan.document import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What each data-parallel rank is given at a time: `sequences` of `length` tokens."""

    sequences: int
    length: int


def training_step(
    plan: Plan,
    rank: int,
    dp_size: int,
    batch: Batch,
    dtype: torch.dtype = torch.bfloat16,
    activation_checkpointing: str | None = None,
) -> Step:
    """Run a step of one rank of a world that is not there, on tensors without data. See `fake_rank` for the process.

    Args:
        plan: of a transformers model.
        rank: in the world of `plan.tp_size * dp_size` ranks.
        dp_size: number of data-parallel ranks.
        batch: what the rank is given.
        dtype: of the weights that a checkpoint's dtype decides.
        activation_checkpointing: `full`, `selective` or None, as for `load_model`.

    Raises:
        MismatchError, CheckpointError: as `fake_rank`.
    """
    model, ranks, mode = fake_rank(plan, rank, dp_size, dtype)
    return run_step(model, ranks, mode, batch, activation_checkpointing)


def run_step(
    model: Any, ranks: Ranks, mode: AbstractContextManager[Any], batch: Batch, activation_checkpointing: str | None
) -> Step:
    """As `training_step`, of a model in training mode that is there; its gradients are taken away.

    Args:
        model: of transformers, from `fake_rank`, or from `load_model`.
        ranks: this process's place in the mesh.
        mode: active while the model runs: what `fake_rank` returned, or nothing.
        batch: what the rank is given.
        activation_checkpointing: as for `training_step`.
    """
    if activation_checkpointing is not None:
        use_activation_checkpointing(model, activation_checkpointing)
    groups = {ranks.tp_group: "tensor", ranks.dp_group: "data"}
    found: Counter[tuple[str, str, int]] = Counter()
    watch = Watch(
        lambda operation, group, size: found.update([(operation, groups[group], size)]),
        held=[*model.parameters(), *model.buffers()],
    )
    backward = _take_gradients(model, watch, collect=activation_checkpointing is not None)
    gc.collect()
    gc.freeze()  # so that collecting what a layer left behind takes milliseconds
    with mode, watch, showing_shards(), with_sequences_unpacked():
        tokens = torch.zeros(batch.sequences, batch.length, dtype=torch.long, device=ranks.device)
        with count_operations() as flops:
            loss: Any = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        forward_operations, forward_peak, kept = flops.get_total_flops(), watch.restart_peak(), watch.live
        with count_operations() as flops:
            loss.backward()
    parameters, buffers = bytes_of(model)
    return Step(
        parameters=parameters,
        buffers=buffers,
        kept=kept,
        forward_peak=forward_peak,
        backward=tuple(backward),
        forward_operations=int(forward_operations),
        backward_operations=int(flops.get_total_flops()),
        collectives=tuple(
            sorted(
                Collective(operation=operation, group=group, tensor_bytes=size, count=count)
                for (operation, group, size), count in found.items()
            )
        ),
    )


def _take_gradients(model: nn.Module, watch: Watch, collect: bool) -> list[tuple[int, int]]:
    """Take each gradient away when it is made, as ZeRO does, and note what was alive before; the list grows with them.

    With `collect`, circles of references are freed each time, so that what layers computed again counts no longer than
    it is needed.
    """
    found: list[tuple[int, int]] = []

    def taken(parameter: Tensor) -> None:
        assert parameter.grad is not None
        size = parameter.grad.numel() * parameter.grad.element_size()
        parameter.grad = None
        if collect:
            gc.collect()
        found.append(((found[-1][0] if found else 0) + size, watch.restart_peak()))

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(taken)  # type: ignore[no-untyped-call]
    return found
