"""What the units of a rule are called in messages: `4 KV heads of 8 rows` says more than `4 units of 8`."""

from __future__ import annotations

import contextlib

from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.schemas.layout import SubParameter
from autotp_plan.schemas.spec import Spec

_HEAD_SYMBOLS = frozenset(
    {"head_dim", "num_heads", "num_attention_heads", "n_head", "n_heads", "qk_head_dim", "v_head_dim", "kv_head_dim"}
)
"""Sizes that a unit is made of when it holds attention heads."""


def describe_units(spec: Spec, position: int, sub: SubParameter, symbols: Symbols, tp_size: int) -> str:
    """How many units a sub-parameter has, and what they are.

    Args:
        spec: the rule that gives the unit.
        position: which of the rule's sub-parameters `sub` is, from 0.
        sub: its size and unit as integers.
        symbols: what names mean for the model.
        tp_size: number of TP ranks, which a unit may depend on.

    Returns:
        `8 heads of 4 rows`, `2 KV heads of 4 rows`, `2 groups of 4 heads (16 rows each)`; `6 units of 8` where the
        rule's unit is not made of heads, and `6` where a unit is a single index.
    """
    unit = spec.unit[position] if isinstance(spec.unit, tuple) else spec.unit
    indices = "columns" if spec.partition_type == "row" else "rows"
    if isinstance(unit, str) and symbols.names_in(unit) & _HEAD_SYMBOLS:
        heads = _first(("num_heads", "num_attention_heads"), symbols, tp_size)
        kv_heads = _first(("num_kv_heads", "num_key_value_heads"), symbols, tp_size)
        head_dim = _first(("head_dim",), symbols, tp_size)
        if sub.num_units == heads:
            return f"{_plural(heads, 'head')} of {sub.unit} {indices}"
        if sub.num_units == kv_heads and sub.unit == head_dim:
            return f"{_plural(kv_heads, 'KV head')} of {sub.unit} {indices}"
        if heads is not None and heads % sub.num_units == 0:
            groups = _plural(sub.num_units, "group")
            return f"{groups} of {heads // sub.num_units} heads ({sub.unit} {indices} each)"
    return f"{sub.num_units} units of {sub.unit}" if sub.unit > 1 else str(sub.size)


def _first(names: tuple[str, ...], symbols: Symbols, tp_size: int) -> int | None:
    """The value of the first of `names` that has one."""
    for name in names:
        with contextlib.suppress(SymbolError):
            return symbols.resolve(name, {"tp_size": tp_size})
    return None


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("s" if count != 1 else "")
