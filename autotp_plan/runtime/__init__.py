"""The runtime: loads one rank's part of a model by a plan and trains it under DeepSpeed.

from autotp_plan.runtime import load_plan

plan = load_plan("plan.json")
model = plan.load_model("shards/")
engine, optimizer, loader, scheduler = plan.initialize(model, config="ds_config.json", training_data=dataset)
"""

import importlib
from typing import TYPE_CHECKING, Any

from autotp_plan.schemas.errors import Fault, MissingDependencyError

if TYPE_CHECKING:
    from autotp_plan.runtime.loading.local_shard import local_shard
    from autotp_plan.runtime.losses.chunked_loss import deferred_logits
    from autotp_plan.runtime.losses.token_values import (
        logits_from_parts,
        token_entropies,
        token_kl_divergences,
        token_log_probs,
        token_log_probs_and_entropies,
    )
    from autotp_plan.runtime.parameters.state_dicts import shards_in_state_dict
    from autotp_plan.runtime.tensor_parallel.kept_results import selective_checkpointing
    from autotp_plan.runtime.training_plan import TrainingPlan, load_plan
    from autotp_plan.runtime.verify.run import try_plan, verify_plan

__all__ = [
    "TrainingPlan",
    "deferred_logits",
    "load_plan",
    "local_shard",
    "logits_from_parts",
    "selective_checkpointing",
    "shards_in_state_dict",
    "token_entropies",
    "token_kl_divergences",
    "token_log_probs",
    "token_log_probs_and_entropies",
    "try_plan",
    "verify_plan",
]

_HOMES = {
    "TrainingPlan": "training_plan",
    "deferred_logits": "losses.chunked_loss",
    "load_plan": "training_plan",
    "local_shard": "loading.local_shard",
    "logits_from_parts": "losses.token_values",
    "selective_checkpointing": "tensor_parallel.kept_results",
    "shards_in_state_dict": "parameters.state_dicts",
    "token_entropies": "losses.token_values",
    "token_kl_divergences": "losses.token_values",
    "token_log_probs": "losses.token_values",
    "token_log_probs_and_entropies": "losses.token_values",
    "try_plan": "verify.run",
    "verify_plan": "verify.run",
}
_NEEDED = ("torch", "deepspeed", "transformers", "accelerate", "safetensors")


def __getattr__(name: str) -> Any:
    # importing DeepSpeed takes seconds and speaks: not before it is needed, so that a program can prepare for it
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"autotp_plan.runtime.{home}")
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise MissingDependencyError(
            Fault(
                what="training by a plan needs packages that planning does not need",
                where=f"autotp_plan.runtime.{name}",
                got=f"no module named {error.name!r}",
                expected=", ".join(_NEEDED),
                next="pip install 'autotp-plan[train]'",
            )
        ) from None
    return getattr(module, name)
