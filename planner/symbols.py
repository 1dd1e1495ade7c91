"""Sizes by name: `num_heads * head_dim` resolved from a model's own config.

Expressions are integers, names, `+ - * //`, `max`, `min` and parentheses, nothing else: they are parsed, never
evaluated by Python. A name is a symbol that a spec file defines, or else a key of the config.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autotp_plan.schemas.documents import did_you_mean
from autotp_plan.schemas.spec import Size

MAX_EXPRESSION = 200

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}

_ALLOWED = "integers, names, + - * //, max, min and parentheses"
_FUNCTIONS: dict[str, Callable[[Iterable[int]], int]] = {"max": max, "min": min}


class SymbolError(ValueError):
    """An expression cannot be resolved. The message says why; the caller knows where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Symbols:
    """What names mean: `definitions` of spec files first, then the keys of `config`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    definitions: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)

    def resolve(self, size: Size, extra: Mapping[str, int] | None = None) -> int:
        """The integer that `size` is. `extra` names win over all others. Raises SymbolError."""
        if isinstance(size, int):
            return size
        return self._evaluate(size, extra or {}, ())

    def config_flag(self, key: str) -> bool:
        """Whether the config key `key` is there and true."""
        return bool(self.config.get(key))

    def _evaluate(self, text: str, extra: Mapping[str, int], pending: tuple[str, ...]) -> int:
        if len(text) > MAX_EXPRESSION:
            raise SymbolError(f"an expression of {len(text)} characters; at most {MAX_EXPRESSION}")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise SymbolError(f"{text!r} is not an expression of {_ALLOWED}") from None
        return self._node(tree, extra, pending)

    def _node(self, node: ast.expr, extra: Mapping[str, int], pending: tuple[str, ...]) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return self._name(node.id, extra, pending)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = self._node(node.left, extra, pending), self._node(node.right, extra, pending)
            try:
                result = _OPERATORS[type(node.op)](left, right)
            except ZeroDivisionError:
                raise SymbolError(f"{ast.unparse(node)} divides by zero") from None
            if abs(result) >= 2**62:
                raise SymbolError(f"{ast.unparse(node)} is too large for a size")
            return result
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and not node.keywords:
            function = _FUNCTIONS.get(node.func.id)
            if function is not None:
                return function([self._node(argument, extra, pending) for argument in node.args])
        raise SymbolError(f"{ast.unparse(node)!r} is not allowed; use {_ALLOWED}")

    def _name(self, name: str, extra: Mapping[str, int], pending: tuple[str, ...]) -> int:
        if name in extra:
            return extra[name]
        if name in self.definitions and name not in pending:
            reasons = []
            for candidate in self.definitions[name]:
                if isinstance(candidate, int):
                    return candidate
                try:
                    return self._evaluate(candidate, extra, (*pending, name))
                except SymbolError as error:
                    reasons.append(str(error))
            raise SymbolError("; ".join(dict.fromkeys(reasons)))
        value = self.config.get(name)
        if type(value) is int:
            return value
        if name in self.config and value is not None:
            raise SymbolError(f"the config's {name!r} is {value!r}, not an integer")
        known = {*extra, *self.definitions, *(key for key, found in self.config.items() if type(found) is int)}
        hint = did_you_mean(name, known - {name})
        raise SymbolError(f"the config has no {name!r}" + (f"; {hint}" if hint else ""))
