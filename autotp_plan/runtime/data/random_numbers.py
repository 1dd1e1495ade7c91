"""Whether the TP ranks of a group draw the same random numbers, as a model that drops out needs.

With other seeds they would drop out different elements of activations that all of them hold, and train on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from autotp_plan.runtime.deepspeed.agreement import gathered
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import Fault, MismatchError

_SHOWN = 4
"""Data-parallel ranks whose TP ranks differ, and are named."""


def random_states() -> dict[str, Tensor]:
    """The states of this process's generators that dropout draws from, by the name of the device; uint8."""
    states = {"random numbers on cpu": torch.get_rng_state()}
    name = get_accelerator().device_name()
    if name != "cpu":
        states[f"random numbers on {name}"] = get_accelerator().get_rng_state()
    return states


def check_random_numbers(ranks: Ranks, where: str) -> None:
    """Compare the TP ranks' random states. Every rank of the job calls it.

    Args:
        ranks: this process's place in the mesh.
        where: in which call, for the message.

    Raises:
        MismatchError: they differ in some TP group. The same on every rank.
    """
    found = gathered(lambda: (ranks.dp_rank, _said(random_states())), "the random numbers could not be compared")
    groups: dict[int, dict[int, str]] = {}
    for rank, (dp_rank, said) in enumerate(found):
        groups.setdefault(dp_rank, {})[rank] = said
    _refuse(list(groups.values()), where)


def name_random_numbers(states: Mapping[str, Tensor], ranks: Ranks, where: str) -> None:
    """Compare the states of one TP group, whose ranks alone call it. Raises as `check_random_numbers`."""
    found: list[tuple[int, str]] = [(0, "")] * ranks.tp_size
    dist.all_gather_object(found, (dist.get_rank(), _said(states)), group=ranks.tp_group)
    _refuse([dict(found)], where)


def _refuse(groups: Sequence[Mapping[int, str]], where: str) -> None:
    different = [group for group in groups if len(set(group.values())) > 1]
    if different:
        got = "; ".join(f"rank {rank}: {said}" for group in different[:_SHOWN] for rank, said in group.items())
        more = f"; and {len(different) - _SHOWN} more TP groups" if len(different) > _SHOWN else ""
        raise MismatchError(
            Fault(
                code="random-numbers-differ",
                what="the ranks of a TP group draw different random numbers, and would drop out different elements of "
                "the same activations",
                where=where,
                got=got + more,
                expected="one seed on all TP ranks of a data-parallel rank, and as many numbers drawn since",
                next="after load_model, seed by plan.ranks.dp_rank, and not by the global rank: "
                "torch.manual_seed(seed + plan.ranks.dp_rank)",
            )
        )


def _said(states: Mapping[str, Tensor]) -> str:
    content = b"".join(state.cpu().numpy().tobytes() for state in states.values())
    return f"seed {torch.initial_seed()}, state {hashlib.sha256(content).hexdigest()[:8]}"
