"""Whether the TP ranks of a group were given the same batches."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import Fault, MismatchError


def check_batches(model: nn.Module, ranks: Ranks) -> None:
    """Let `model` compare over the TP ranks the first batch it gets in training, and the first in evaluation.

    If the ranks of one group were given different samples it would compute numbers that belong to neither. Then its
    forward raises MismatchError, on every rank of the group.

    Args:
        model: a model from `load_model`.
        ranks: this process's place in the mesh.
    """
    unseen = {True, False}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training not in unseen:
            return
        unseen.remove(module.training)
        if not unseen:
            handle.remove()
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        mine = {name: _summary(value) for name, value in inputs.items() if isinstance(value, Tensor)}
        found: list[Any] = [None] * ranks.tp_size
        dist.all_gather_object(found, mine, group=ranks.tp_group)
        faults = [
            Fault(
                what="the TP ranks of a group were given different batches",
                where=f"{name} of the first forward in {'training' if module.training else 'evaluation'}",
                got="; ".join(f"TP rank {rank}: {batch.get(name, 'none')}" for rank, batch in enumerate(found)),
                expected="the same samples on all TP ranks of a data-parallel group",
                next="plan.initialize(training_data=...), or a sampler from plan.sampler(dataset); with Hugging Face's "
                "Trainer, plan.adapt_trainer(trainer)",
            )
            for name in dict.fromkeys(name for batch in found for name in batch)
            if len({batch.get(name) for batch in found}) > 1
        ]
        if faults:
            raise MismatchError(faults)

    handle = model.register_forward_pre_hook(compare, with_kwargs=True, prepend=True)


def _summary(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(content.tobytes()).hexdigest()[:12]
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digest}"
