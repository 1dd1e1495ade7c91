"""The DeepSpeed config that the engine gets: the user's, with the plan's TP size and without what the plan decides."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan

_DECIDED = ("preset_model", "partition_config", "vocab_parallel_lm_head")
"""Keys of `tensor_parallel` that the plan has decided already; the engine must not act on them again."""


def engine_config(config: str | os.PathLike[str] | dict[str, Any], plan: Plan) -> dict[str, Any]:
    """A copy of `config` with its `tensor_parallel` section set for a model that is sharded already.

    Args:
        config: a DeepSpeed config, or a JSON file with one.
        plan: the plan that the model is sharded by.

    Returns:
        The config for `deepspeed.initialize`.

    Raises:
        MismatchError: it is no object, its `tensor_parallel` section is of another TP size, or it asks for DeepCompile
            of a sharded stream.
        DocumentError: the file cannot be read.
    """
    if isinstance(config, dict):
        settings = copy.deepcopy(config)
    else:
        settings = documents.read_json(Path(config), "DeepSpeed config")
    if not isinstance(settings, dict):
        got = type(settings).__name__
        raise MismatchError(_fault("the DeepSpeed config is not a JSON object", str(config), got, "an object"))
    if plan.sequence_parallel is not None:
        _refuse_deep_compile(settings.get("compile"))
    found = settings.get("tensor_parallel") or {}
    if not isinstance(found, dict):
        raise MismatchError(_wrong_value("tensor_parallel", found, "an object"))
    section = dict(found)
    size = section.get("autotp_size", plan.tp_size)
    if type(size) is not int:
        raise MismatchError(_wrong_value("tensor_parallel.autotp_size", size, f"the number {plan.tp_size}"))
    if size != plan.tp_size:
        raise MismatchError(
            _fault(
                "the DeepSpeed config is for another TP size",
                "tensor_parallel.autotp_size",
                str(size),
                str(plan.tp_size),
            )
        )
    for key in _DECIDED:
        section.pop(key, None)
    section["autotp_size"] = plan.tp_size
    section.setdefault("tp_overlap_comm", plan.runtime.tp_overlap_comm)
    settings["tensor_parallel"] = section
    return settings


def _refuse_deep_compile(section: Any) -> None:
    if isinstance(section, dict) and section.get("deepcompile"):
        raise MismatchError(
            Fault(
                code="deepcompile-of-stream",
                what="DeepCompile plans by a graph of the step, which the collectives along the sequence are not in",
                where="compile.deepcompile",
                got="true, and a plan with sequence parallelism",
                expected="a config without it",
                next="leave the key out and call engine.compile(), which is torch.compile; or compile the plan without "
                "--sequence-parallel",
            )
        )


def check_settings(settings: dict[str, Any], groups: Any) -> None:
    """Ask DeepSpeed whether a config is one, before anything is built.

    Args:
        settings: of `engine_config`.
        groups: `deepspeed.utils.groups`, or another `mpu`, with the job's mesh.

    Raises:
        MismatchError: a value has a type or size that DeepSpeed does not take, which it says by errors of many kinds.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    for key, (kinds, expected) in _NOT_CHECKED.items():
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise MismatchError(_wrong_value(key, value, expected))
    try:
        DeepSpeedConfig(copy.deepcopy(settings), groups)
    except Exception as error:  # pydantic's, or whatever DeepSpeed's own code comes to by a wrong type
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        key = next((one for one in settings if _refused_alone(one, settings[one], groups)), "")
        expected = "what DeepSpeed's documentation says of the key"
        fault = _wrong_value(key or "the DeepSpeed config", settings.get(key), expected)
        reason = f"{type(error).__name__}: {' '.join(lines)}"[:300]
        raise MismatchError(replace(fault, got=f"{fault.got if key else 'values'} ({reason})")) from None


def unread_checkpointing(settings: dict[str, Any], is_read: bool) -> str | None:
    """What to say of an `activation_checkpointing` section that nothing reads; None where it asks for nothing.

    Args:
        settings: of `engine_config`.
        is_read: whether the model's code has called `deepspeed.checkpointing.configure`, which alone reads it.
    """
    section = settings.get("activation_checkpointing")
    asked = sorted(key for key, value in section.items() if value) if isinstance(section, dict) else []
    if is_read or not asked:
        return None
    return (
        f"activation_checkpointing ({', '.join(asked)}) of the DeepSpeed config changes nothing: "
        "deepspeed.checkpointing.checkpoint alone reads it, which this model does not call. "
        'load_model(activation_checkpointing="selective" or "full") computes activations again.'
    )


_NOT_CHECKED: dict[str, tuple[tuple[type, ...], str]] = {
    "gradient_clipping": ((int, float), "a number"),
    "steps_per_print": ((int, float), "a number"),
}
"""Keys whose values DeepSpeed takes as they are, until they are used."""


def _refused_alone(key: str, value: Any, groups: Any) -> bool:
    """Whether a config that has one key beside a batch size is refused for it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    batch = {} if key.startswith(("train_", "gradient_acc")) else {"train_micro_batch_size_per_gpu": 1}
    try:
        DeepSpeedConfig({**batch, key: copy.deepcopy(value)}, groups)
    except Exception:  # as above
        return True
    return False


def _wrong_value(where: str, value: Any, expected: str) -> Fault:
    return Fault(
        code="wrong-deepspeed-value",
        what="the DeepSpeed config has a wrong value",
        where=where,
        got=f"{type(value).__name__} {json.dumps(value, default=repr)[:80]}",
        expected=expected,
        next="correct the value, or leave the key out",
    )


def _fault(what: str, where: str, got: str, expected: str) -> Fault:
    return Fault(
        what=what,
        where=where,
        got=got,
        expected=expected,
        next="leave the key out: the plan says it; or compile a plan for that size",
    )
