"""A spec file for a model that cannot be planned by itself: a rule for each weight, filled in where it is known."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from autotp_plan.schemas.names import starred
from autotp_plan.schemas.spec import Spec

CHOICE = "column | row | skip"
"""What stands for the `partition_type` of a linear layer that the user must choose."""


def spec_skeleton(model: Any, found: Mapping[str, Spec], decided: Callable[[str], bool]) -> str:
    """A spec file to fill in, as JSON text.

    Args:
        model: a transformers model; its parameters may be on meta.
        found: rules for parameters that are known.
        decided: whether a parameter has a rule of the user's, and needs none.

    Returns:
        `partition_type` is `CHOICE` where it is not known. Fused experts, weights of three dimensions that no linear
        layer holds, get a `shard` rule each and an entry in `modules`, without which their sums would be missing.
    """
    rules: list[str] = []
    modules: dict[str, str] = {}
    done: set[str] = set()
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        template = starred(name)
        if parameter.dim() < 2 or template in done or decided(name):
            continue
        done.add(template)
        owner = name.rpartition(".")[0]
        rule: dict[str, Any] = {"patterns": [name_pattern(template)], "partition_type": CHOICE}
        known = found.get(name)
        if known is not None and known.partition_type == "skip":
            rule["partition_type"] = "skip"
        elif parameter.dim() == 3 and not hasattr(owners[owner], "in_features") and "weight" not in name:
            rule |= _fused_experts(name, tuple(parameter.shape), model.config)
            inputs = dict.fromkeys(differentiable_inputs(owners[owner]), "copy")
            module = {"patterns": [name_pattern(starred(owner))], "inputs": inputs, "output": "reduce"}
            modules[starred(owner)] = json.dumps(module)
        elif known is not None and (known.partition_type == "vocab" or known.gather_output):
            rule["partition_type"] = known.partition_type
            rule |= {"gather_output": True} if known.gather_output else {}
            rule |= {"indivisible": "uneven"} if known.indivisible == "uneven" else {}
        rules.append(json.dumps(rule))
    text = '  {"layer_specs": [\n    ' + ",\n    ".join(rules) + "\n  ]"
    return text + "".join(_section("modules", modules.values())) + "}"


def name_pattern(template: str) -> str:
    """The regex of names that `template`, with `*` for numbers, stands for."""
    return re.escape(template).replace(r"\*", r"\d+") + "$"


def differentiable_inputs(experts: Any) -> list[str]:
    """The inputs of an experts module that gradients flow through: hidden states and routing weights.

    transformers passes `(hidden_states, indices, weights)` in this order (MoeExpertsParallel in
    transformers/distributed/tensor_parallel.py).
    """
    _, *names = inspect.signature(type(experts).forward).parameters
    return names[:3:2]


def _fused_experts(name: str, shape: tuple[int, ...], config: Any) -> dict[str, Any]:
    """The rule for experts in one tensor: the dimension that is not the hidden one, gate and up each by itself."""
    text = getattr(config, "text_config", config)
    hidden = getattr(text, "hidden_size", None)
    inner = [dim for dim in (1, 2) if shape[dim] != hidden]
    first = name.rpartition(".")[2].startswith(("gate", "up", "w1", "w3", "fc1", "in"))
    dim = inner[0] if len(inner) == 1 else 1 if first else 2
    fused = [2 if at == dim else -1 for at in range(3)]
    return {"partition_type": "shard", "partition_dim": dim} | ({"shape": fused} if "gate_up" in name else {})


def _section(key: str, entries: Any) -> Iterator[str]:
    lines = list(entries)
    if lines:
        yield f',\n   "{key}": [\n    ' + ",\n    ".join(lines) + "\n  ]"
