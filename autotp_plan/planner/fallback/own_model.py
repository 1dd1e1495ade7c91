"""The `tp_plan` of a model that is not one of transformers: read as DeepSpeed reads it, and never proven.

DeepSpeed takes `config.base_model_tp_plan` and `_tp_plan` of any model (runtime/tensor_parallel/config.py), matches
their keys at the end of names, and leaves whole what they do not name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from autotp_plan.planner.fallback.skeleton import name_pattern
from autotp_plan.schemas.names import starred
from autotp_plan.schemas.spec import AttributeSpec

_HEADS = (
    "num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head", "num_query_heads",
    "num_attention_heads_per_partition", "num_kv_heads", "num_key_value_heads", "num_kv", "kv_n_heads", "n_kv_heads",
    "n_kv_head", "num_multi_query_groups_per_partition",
)  # fmt: skip
_SIZES = ("hidden_size", "embed_dim", "inner_dim", "all_head_size", "d_model", "hidden_size_per_partition")
"""What counts in an attention module: all that DeepSpeed divides (module_inject/auto_tp.py), and some more."""


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


def counting_attributes(model: Any, column_parallel: Collection[str]) -> Iterator[AttributeSpec]:
    """The attributes of the model's attention modules that count heads, or sizes of all heads, for each rank.

    An attention module is one with an attribute that counts heads and a column-parallel layer. What it counts is
    divided as its heads are: KV heads that are fewer than ranks are one on each.

    Args:
        model: the model.
        column_parallel: the names of its modules that are column-parallel.
    """
    found: dict[tuple[tuple[str, int], ...], list[str]] = defaultdict(list)
    owners = {name.rpartition(".")[0] for name in column_parallel}
    for name, module in model.named_modules():
        counts = {key: value for key, value in vars(module).items() if type(value) is int and value > 0}
        if name in owners and counts.keys() & set(_HEADS):
            found[tuple((key, counts[key]) for key in (*_HEADS, *_SIZES) if key in counts)].append(name)
    for counted, names in found.items():
        patterns = tuple(map(name_pattern, dict.fromkeys(map(starred, names))))
        yield AttributeSpec(patterns=patterns, attributes={key: f"max({n} // tp_size, 1)" for key, n in counted})


NOTE = (
    "The rules are the model's own tp_plan, and are not proven: `autotp-plan verify --module package.module:function` "
    "proves them, where a function makes the model."
)
"""On a plan that was made by a `tp_plan` of one's own."""
