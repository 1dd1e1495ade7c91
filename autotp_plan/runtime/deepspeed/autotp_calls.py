"""Calls of AutoTP that a script may still make when it trains by a plan: they must agree with it, and change nothing.

`set_autotp_mode`, `deepspeed.tp_model_init` and an `mpu` say what the plan says already. Where one differs, the error
names the line to delete: DeepSpeed would follow it, against the groups over which the model is sharded.
"""

from __future__ import annotations

from typing import Any

from autotp_plan.runtime.deepspeed.internals import recorded_tp_model_init
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import Fault, MismatchError

_ASKED = {
    "get_model_parallel_world_size": "tp_size",
    "get_tensor_model_parallel_world_size": "tp_size",
    "get_model_parallel_rank": "tp_rank",
    "get_tensor_model_parallel_rank": "tp_rank",
    "get_data_parallel_world_size": "dp_size",
    "get_data_parallel_rank": "dp_rank",
}


def check_autotp_calls(mpu: Any, ranks: Ranks) -> None:
    """Compare an `mpu` of the script, and its call of `deepspeed.tp_model_init`, with the plan.

    Args:
        mpu: an object with Megatron's `get_model_parallel_rank` and the like, or None.
        ranks: this process's place in the plan's mesh.

    Raises:
        MismatchError: one of them is of another mesh.
    """
    faults = [] if mpu is None else _mpu_faults(mpu, ranks)
    recorded = recorded_tp_model_init()
    if recorded.get("tp_size", ranks.tp_size) != ranks.tp_size:
        faults.append(_recorded_fault("tp_size", str(recorded["tp_size"]), f"{ranks.tp_size}, the plan's tp_size"))
    if recorded.get("tp_group") is not None:
        faults.append(_recorded_fault("tp_group", "another process group", "the groups of the plan"))
    if faults:
        raise MismatchError(faults)


def _mpu_faults(mpu: Any, ranks: Ranks) -> list[Fault]:
    return [
        Fault(
            what="the mpu that the script passes is of another mesh than the plan",
            where=f"initialize(mpu=...): {name}()",
            got=str(getattr(mpu, name)()),
            expected=f"{getattr(ranks, field)}, the plan's {field} (TP ranks are next to each other)",
            next="delete mpu=... and the lines that build it: the plan makes the groups",
        )
        for name, field in _ASKED.items()
        if hasattr(mpu, name) and getattr(mpu, name)() != getattr(ranks, field)
    ]


def _recorded_fault(key: str, got: str, expected: str) -> Fault:
    return Fault(
        what="deepspeed.tp_model_init was called for something else than the plan",
        where=f"tp_model_init({key}=...)",
        got=got,
        expected=expected,
        next="delete the call of deepspeed.tp_model_init: load_model has done it",
    )
