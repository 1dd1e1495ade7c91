"""Sizes by name: `num_heads * head_dim` resolved from a model's config.

Expressions are integers, names, `+ - * //`, `max`, `min`, `gcd`, `share` and parentheses, nothing else: they are
parsed, never evaluated by Python. A name is a symbol that a spec file defines, or else a key of the config
(`ffn_config.top_k` for one inside another). Conditions (`when`) add `not`, `and`, `or` and comparisons, of any values.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.documents import did_you_mean
from autotp_plan.schemas.spec import Size

MAX_EXPRESSION = 200
MAX_STEPS = 2_000
"""Numbers, names and operations that one size may be made of, those of the symbols in it included."""
MAX_DEPTH = 50
"""Symbols that are defined by one another."""
MAX_REASON = 500

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_ALLOWED = "integers, names, + - * //, max, min, gcd, share and parentheses"
_FUNCTIONS: dict[str, Callable[[Iterable[int]], int]] = {"max": max, "min": min, "gcd": lambda n: math.gcd(*n)}


class SymbolError(ValueError):
    """An expression cannot be resolved. The message says why; the caller knows where."""


@dataclass(slots=True)
class _Trail:
    """The symbols that a size is being resolved through; `steps` is one list for all of them."""

    names: tuple[str, ...] = ()
    steps: list[int] = field(default_factory=lambda: [0])

    def step(self) -> None:
        self.steps[0] += 1
        if self.steps[0] > MAX_STEPS:
            raise SymbolError(f"a size that takes more than {MAX_STEPS} steps")

    def through(self, name: str) -> _Trail:
        if len(self.names) >= MAX_DEPTH:
            raise SymbolError(f"{name!r} is defined by more than {MAX_DEPTH} other symbols")
        return _Trail((*self.names, name), self.steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Symbols:
    """What names mean: `definitions` of spec files first, then the keys of `config`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    definitions: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)

    def resolve(self, size: Size, extra: Mapping[str, int] | None = None) -> int:
        """The integer that `size` is.

        Args:
            size: an integer, or an expression.
            extra: names that win over all others, such as `tp_size`.

        Raises:
            SymbolError: a name is not known, or the expression is not allowed.
        """
        if isinstance(size, int):
            return size
        return self._evaluate(size, extra or {}, _Trail())

    def names_in(self, size: Size) -> set[str]:
        """Every name that `size` depends on, those in the definitions of its symbols included."""
        found: set[str] = set()
        pending = [size]
        while pending:
            text = pending.pop()
            for node in ast.walk(_parsed(text)) if isinstance(text, str) else ():
                name = _path(node) if isinstance(node, ast.expr) else None
                if name is not None and name not in found:
                    found.add(name)
                    pending += self.definitions.get(name, ())
        return found

    def config_flag(self, key: str) -> bool:
        """Whether the config key `key` is there and true."""
        return bool(self.config.get(key))

    def holds(self, condition: str | None) -> bool:
        """Whether `condition` is true of the model; None always is.

        Raises:
            SymbolError: as `resolve`, or values that cannot be compared.
        """
        return condition is None or bool(self._value(_parsed(condition)))

    def _value(self, node: ast.expr) -> Any:
        """The value, of any kind, of a part of a condition."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BoolOp):
            values = [bool(self._value(part)) for part in node.values]
            return all(values) if isinstance(node.op, ast.And) else any(values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._value(node.operand)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
            left, right = self._value(node.left), self._value(node.comparators[0])
            try:
                return _COMPARISONS[type(node.ops[0])](left, right)
            except TypeError:
                raise SymbolError(f"{ast.unparse(node)} compares {left!r} with {right!r}") from None
        path = _path(node)
        if path is not None and path not in self.definitions:
            found = self._config_value(path)
            if found is not _MISSING:
                return found
        return self._node(node, {}, _Trail())

    def _config_value(self, path: str) -> Any:
        found: Any = self.config
        for key in path.split("."):
            if not isinstance(found, Mapping) or key not in found:
                return _MISSING
            found = found[key]
        return found

    def _evaluate(self, text: str, extra: Mapping[str, int], trail: _Trail) -> int:
        return self._node(_parsed(text), extra, trail)

    def _node(self, node: ast.expr, extra: Mapping[str, int], trail: _Trail) -> int:
        trail.step()
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        path = _path(node)
        if path is not None:
            return self._name(path, extra, trail)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = self._node(node.left, extra, trail), self._node(node.right, extra, trail)
            try:
                result = _OPERATORS[type(node.op)](left, right)
            except ZeroDivisionError:
                raise SymbolError(f"{ast.unparse(node)} divides by zero") from None
            if abs(result) >= 2**62:
                raise SymbolError(f"{ast.unparse(node)} is too large for a size")
            return result
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and not node.keywords:
            function = _FUNCTIONS.get(node.func.id)
            arguments = [self._node(argument, extra, trail) for argument in node.args]
            if function is not None:
                return function(arguments)
            if node.func.id == "share" and len(arguments) <= 2 and {"tp_size", "tp_rank"} <= extra.keys():
                return _share(extra["tp_size"], extra["tp_rank"], *arguments)
        raise SymbolError(f"{ast.unparse(node)!r} is not allowed; use {_ALLOWED}")

    def _name(self, name: str, extra: Mapping[str, int], trail: _Trail) -> int:
        if name in extra:
            return extra[name]
        if name in self.definitions and name not in trail.names:
            reasons = []
            for candidate in self.definitions[name]:
                if isinstance(candidate, int):
                    return candidate
                try:
                    return self._evaluate(candidate, extra, trail.through(name))
                except SymbolError as error:
                    reasons.append(str(error))
            reason = "; ".join(dict.fromkeys(reasons))
            raise SymbolError(reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + "...")
        value = self._config_value(name)
        if type(value) is int:
            return value
        if value is not _MISSING and value is not None:
            raise SymbolError(f"the config's {name!r} is {value!r}, not an integer")
        known = {*extra, *self.definitions, *(key for key, found in self.config.items() if type(found) is int)}
        hint = _hint(name, frozenset(known - {name}))
        raise SymbolError(f"the config has no {name!r}" + (f"; {hint}" if hint else ""))


_MISSING = object()
_hint = functools.lru_cache(maxsize=256)(did_you_mean)  # of the same names for each TP size that is tried


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.expr:
    if len(text) > MAX_EXPRESSION:
        raise SymbolError(f"an expression of {len(text)} characters; at most {MAX_EXPRESSION}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SymbolError(f"{text!r} is not an expression of {_ALLOWED}") from None


def _path(node: ast.expr) -> str | None:
    """`ffn_config.top_k` of such a node; None for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (path := _path(node.value)) is not None:
        return f"{path}.{node.attr}"
    return None


def _share(tp_size: int, tp_rank: int, count: int, units: int | None = None) -> int:
    """How many of `count` things a rank holds when they are sharded in `units` (default: one by one).

    Fewer units than ranks: the units are replicated, and the `count` things are sharded further.
    """
    units = count if units is None else units
    if min(count, units) < 1 or count % units:
        raise SymbolError(f"share of {count} in {units} units")
    if units >= tp_size:
        return iv.length([iv.divide(units, tp_size)[tp_rank]]) * (count // units)
    return max(1, count // tp_size)
