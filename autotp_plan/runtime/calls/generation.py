"""`generate` of a sharded model: the ranks of a TP group sample the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from autotp_plan.runtime.deepspeed.attendance import check_all_call

_ON_ALL_TP_RANKS = "call it on every rank of a TP group with the same inputs, and print or write the result on one"


class GenerationCalls(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Methods of `PreTrainedModel` that draw random numbers, which must be the same on the ranks of a TP group."""

    autotp: Any

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`. Every rank of the TP group calls it with the same inputs.

        Each rank has all logits and picks the next token itself. So every rank takes the random state of the group's
        first rank before it draws, and keeps it afterwards; DP ranks draw different numbers.

        Raises:
            MismatchError: not every rank of the TP group calls it, or with other inputs.
        """
        check_all_call("model.generate", _ON_ALL_TP_RANKS, self.autotp.ranks.tp_group)
        share_rng_state(self.autotp.ranks.tp_group)
        return super().generate(*args, **kwargs)


def share_rng_state(group: Any) -> None:
    """Give torch's random number generators, on CPU and accelerator, the state of the group's first rank.

    Args:
        group: a process group; every rank of it calls this.
    """
    device = torch.device(get_accelerator().current_device_name())
    first = dist.get_global_rank(group, 0)
    torch.set_rng_state(_of_first(torch.get_rng_state(), first, device, group))
    if device.type != "cpu":
        get_accelerator().set_rng_state(_of_first(get_accelerator().get_rng_state(), first, device, group))


def _of_first(state: torch.Tensor, first: int, device: torch.device, group: Any) -> torch.Tensor:
    shared = state.to(device)
    dist.broadcast(shared, first, group=group)
    return shared.cpu()
