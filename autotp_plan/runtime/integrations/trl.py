"""TRL's trainers: what must hold before one trains a sharded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autotp_plan.runtime.calls.wrappers import is_sharded_by_a_plan
from autotp_plan.schemas.errors import Fault, MismatchError

_RIGHT = {"SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer"}
"""Those whose numbers were compared with the dense model's."""


def check_trl(trainer: Any, tp_size: int) -> None:
    """Raise MismatchError for a trainer of TRL that would count processes, or has another reference model.

    Args:
        trainer: a Trainer of any class.
        tp_size: the number of TP ranks.
    """
    base = next((cls for cls in type(trainer).__mro__ if _is_of_trl(cls)), None)
    faults = [] if base is None or tp_size == 1 else list(_faults(trainer, base, tp_size))
    if faults:
        raise MismatchError(faults)


def _is_of_trl(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "trl" and cls.__name__.endswith("Trainer")


def _faults(trainer: Any, base: type, tp_size: int) -> Iterator[Fault]:
    name = base.__name__
    if name not in _RIGHT or ".experimental." in base.__module__:
        yield Fault(
            what="this trainer of TRL is not known to be right on a sharded model",
            where=f"adapt_trainer({name})",
            got="rewards, samples and generated text that may be counted once for each process, not for each DP rank",
            expected=" or ".join(sorted(_RIGHT)),
            next=f"train with {name} on a model that is not sharded (tp_size 1)",
        )
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and not is_sharded_by_a_plan(reference):
        yield Fault(
            what="the reference model is not sharded",
            where=f"{name}(ref_model=...)",
            got="the full model on every rank",
            expected="a second model from plan.load_model, in a DeepSpeed config that says autotp_size",
            next=f"{name}(model, ref_model=plan.load_model(path), ...) with deepspeed={{..., "
            f'"tensor_parallel": {{"autotp_size": {tp_size}}}}}',
        )
