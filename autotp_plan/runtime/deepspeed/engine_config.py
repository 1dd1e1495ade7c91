"""The DeepSpeed config that the engine gets: the user's, with the plan's TP size and without what the plan decides."""

from __future__ import annotations

import copy
import os
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
        MismatchError: it is no object, or its `tensor_parallel` section is of another TP size.
        DocumentError: the file cannot be read.
    """
    if isinstance(config, dict):
        settings = copy.deepcopy(config)
    else:
        settings = documents.read_json(Path(config), "DeepSpeed config")
    section = dict(settings.get("tensor_parallel") or {}) if isinstance(settings, dict) else None
    if section is None:
        got = type(settings).__name__
        raise MismatchError(_fault("the DeepSpeed config is not a JSON object", str(config), got, "an object"))
    size = section.get("autotp_size", plan.tp_size)
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


def _fault(what: str, where: str, got: str, expected: str) -> Fault:
    return Fault(
        what=what,
        where=where,
        got=got,
        expected=expected,
        next="leave the key out: the plan says it; or compile a plan for that size",
    )
