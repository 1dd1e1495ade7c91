"""What a script written for AutoTP may still say when it trains by a plan: it must agree, and changes nothing.

`set_autotp_mode`, `deepspeed.tp_model_init` and an `mpu` of one's own say what the plan says already. Where they say
something else the line to delete is named: DeepSpeed would take their word against the groups that the model is cut by.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.tensor_parallel import init_utils

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


def check_old_calls(mpu: Any, ranks: Ranks) -> None:
    """Raise MismatchError where `mpu` (or None), or what `tp_model_init` recorded, differs from the plan's `ranks`."""
    faults = [] if mpu is None else _faults_of_mpu(mpu, ranks)
    recorded = init_utils._TP_MODEL_INIT_ARGS or {}
    if recorded.get("tp_size", ranks.tp_size) != ranks.tp_size:
        faults.append(_of_recorded("tp_size", str(recorded["tp_size"]), f"{ranks.tp_size}, the plan's tp_size"))
    if recorded.get("tp_group") is not None:
        faults.append(_of_recorded("tp_group", "a group of its own", "the groups of the plan"))
    if faults:
        raise MismatchError(faults)


def _faults_of_mpu(mpu: Any, ranks: Ranks) -> list[Fault]:
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


def _of_recorded(key: str, got: str, expected: str) -> Fault:
    return Fault(
        what="deepspeed.tp_model_init was called for something else than the plan",
        where=f"tp_model_init({key}=...)",
        got=got,
        expected=expected,
        next="delete the call of deepspeed.tp_model_init: load_model has done it",
    )
