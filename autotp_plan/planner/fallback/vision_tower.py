"""Rules that shard the attention and the MLPs of what is around a language model: a vision tower.

They are read off the modules of the model on meta: linear layers whose names say what they are, and whose widths are
the module's heads. What has another form, or does not divide, stays replicated, with the reason. That the rules are
right is proven with images before a plan is made of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from autotp_plan.planner.fallback.skeleton import name_pattern
from autotp_plan.schemas.names import is_index, starred
from autotp_plan.schemas.spec import AttributeSpec, Spec, SpecFile

_ATTENTION = (("q_proj", "k_proj", "v_proj"), ("qkv",))
_ATTENTION_OUTPUTS = ("out_proj", "o_proj", "proj", "projection_layer")
_MLP = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("linear_fc1",), "linear_fc2"),
    (("lin1",), "lin2"),
)
_HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerRules:
    """Rules for what is around a language model.

    Attributes:
        rules: the rules.
        modules: how many modules they shard, by name with `*` for numbers.
        reasons: why others stay replicated, by name with `*` for numbers.
    """

    rules: SpecFile
    modules: dict[str, int]
    reasons: dict[str, str]


class _Part(NamedTuple):
    """How a module is sharded: its column-parallel layers, what is fused in them, its row-parallel layer."""

    columns: tuple[str, ...]
    fused: int
    row: str
    width: int
    unit: int
    heads: int | None


def tower_rules(model: Any, inside: Collection[str], tp_size: int, ungraded: Sequence[str] = ()) -> TowerRules:
    """The rules for all of `model` that is not in its language model.

    Args:
        model: a transformers model; its parameters may be on meta.
        inside: names of the language model and its head.
        tp_size: number of TP ranks.
        ungraded: patterns of parameters whose gradients a proof cannot see.
    """
    parts: dict[str, dict[_Part | str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, module in model.named_modules():
        if not any(map(is_index, name.split("."))) or any(f"{name}.".startswith(f"{one}.") for one in inside):
            continue
        found = _part_of(module, tp_size)
        if found is None:
            continue
        if any(
            re.match(pattern, f"{name}.{layer}.weight")
            for pattern in ungraded
            for layer in dict(module.named_children())
        ):
            found = "the loss of a text with images does not depend on it, so that nothing is proven"
        parts[starred(name)][found].append(name)
    specs: list[Spec] = []
    attributes: list[AttributeSpec] = []
    for template, groups in parts.items():
        for part, names in groups.items():
            if isinstance(part, str):
                continue
            patterns = [name_pattern(template)] if len(groups) == 1 else [re.escape(name) + "$" for name in names]
            specs += [rule for pattern in patterns for rule in _specs(part, pattern.removesuffix("$"))]
            if part.heads is not None:
                module = model.get_submodule(names[0])
                counts = [key for key in _HEADS if getattr(module, key, None) == part.heads]
                values: dict[str, int | str] = dict.fromkeys(counts, f"{part.heads} // tp_size")
                attributes += [AttributeSpec(patterns=(pattern,), attributes=values) for pattern in patterns if values]
    return TowerRules(
        rules=SpecFile(layer_specs=tuple(specs), module_attributes=tuple(attributes)),
        modules={
            template: len(names)
            for template, groups in parts.items()
            for part, names in groups.items()
            if not isinstance(part, str)
        },
        reasons={template: part for template, groups in parts.items() for part in groups if isinstance(part, str)},
    )


def _part_of(module: Any, tp_size: int) -> _Part | str | None:
    """How a module is sharded, why it is not, or None for one that is neither attention nor an MLP."""
    layers = {name: one for name, one in module.named_children() if hasattr(one, "in_features")}
    columns = next((names for names in _ATTENTION if layers.keys() >= set(names)), None)
    row = next((name for name in _ATTENTION_OUTPUTS if name in layers), None)
    if columns is not None and row is not None:
        return _attention(module, layers, columns, row, tp_size)
    mlp = next((one for one in _MLP if layers.keys() >= {*one[0], one[1]}), None)
    if mlp is None:
        return None
    ups, down = mlp
    width = layers[down].in_features
    if other := _others(module, (*ups, down)):
        return f"it has {other}"
    if any(layers[name].out_features != width for name in ups):
        return f"its {down} does not take what {', '.join(ups)} give"
    if width % tp_size:
        return f"its {width} features do not divide by {tp_size}"
    return _Part(columns=ups, fused=1, row=down, width=width, unit=1, heads=None)


def _attention(module: Any, layers: Any, columns: tuple[str, ...], row: str, tp_size: int) -> _Part | str:
    heads, head_dim = (getattr(module, key, None) for key in ("num_heads", "head_dim"))
    if type(heads) is not int or type(head_dim) is not int:
        return "it does not say its num_heads and head_dim"
    fused, width = (3 if columns == ("qkv",) else 1), heads * head_dim
    if other := _others(module, (*columns, row)):
        return f"it has {other}"
    if layers[row].in_features != width or any(layers[name].out_features != fused * width for name in columns):
        return f"its projections are not {heads} heads of {head_dim} features"
    if heads % tp_size:
        return f"its {heads} heads do not divide by {tp_size}"
    return _Part(columns=columns, fused=fused, row=row, width=width, unit=head_dim, heads=heads)


def _others(module: Any, layers: Collection[str]) -> str:
    """Parameters of a module that are in none of `layers`."""
    names = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in layers or "." not in name]
    return ", ".join(names)


def _specs(part: _Part, module: str) -> Iterator[Spec]:
    for layer in part.columns:
        shape = ((part.width,) * part.fused, -1)
        yield Spec(patterns=(rf"{module}\.{layer}\.weight$",), partition_type="column", shape=shape, unit=part.unit)
    shape_of_row = (-1, (part.width,))
    yield Spec(patterns=(rf"{module}\.{part.row}\.weight$",), partition_type="row", shape=shape_of_row, unit=part.unit)
