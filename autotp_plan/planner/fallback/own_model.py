"""The `tp_plan` of a model that is not one of transformers: read as DeepSpeed reads it, and never proven.

DeepSpeed takes `config.base_model_tp_plan` and `_tp_plan` of any model (runtime/tensor_parallel/config.py), matches
their keys at the end of names, and leaves whole what they do not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotp_plan.schemas.names import starred


def is_of_transformers(model: Any) -> bool:
    """Whether the class of `model` is one of transformers, so that a small model of it can be built for a proof."""
    return type(model).__module__.partition(".")[0] == "transformers"


def with_full_names(plan: Mapping[str, str], model: Any) -> dict[str, str]:
    """`plan` with whole names of modules and parameters as keys, `*` for numbers.

    Args:
        plan: style by name, or by the end of one: `layers.*.mlp.up_proj` is `model.layers.*.mlp.up_proj` too.
        model: the model.

    Returns:
        Where two keys end one name, the style of the longer.
    """
    names = [starred(name) for name, _ in [*model.named_modules(), *model.named_parameters(remove_duplicate=False)]]
    found: dict[str, str] = {}
    for key, style in sorted(plan.items(), key=lambda item: len(item[0])):
        whole = [name for name in dict.fromkeys(names) if f".{name}".endswith(f".{key}")]
        found.update(dict.fromkeys(whole or [key], style))
    return found


NOTE = (
    "The rules are the model's own tp_plan, and are not proven: `autotp-plan verify --module package.module:function` "
    "proves them, where a function makes the model."
)
"""On a plan that was made by a `tp_plan` of one's own."""
