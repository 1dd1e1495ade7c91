"""Frozen dataclasses to and from JSON values: one home for what every document would otherwise write by hand.

A field that has its default is left out; tuples become lists. A class that is written in another way than as an object
of its fields has `from_value` and `to_value`, which win. What a document may contain is checked before, by its schema.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

_T = TypeVar("_T")


def encode(value: Any) -> Any:
    """The JSON value of a dataclass, or of tuples and dicts of them.

    Args:
        value: a dataclass, a tuple, list or dict of such, or a JSON value, which stays as it is.

    Returns:
        dicts, lists and scalars; keys in the order of the fields, without those that have their default.
    """
    if hasattr(value, "to_value"):
        return value.to_value()
    if dataclasses.is_dataclass(value):
        present = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: encode(found) for field, found in present if found != _default(field)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode(kind: type[_T], value: Any) -> _T:
    """The `kind`, a dataclass, that the JSON value `value` is.

    Args:
        kind: a dataclass whose fields are scalars, dataclasses, and tuples, dicts and unions of them.
        value: a JSON object with keys of `kind` only, already checked against a schema.

    Returns:
        `encode` of it is `value`, where that has no key with its default.
    """
    found: _T = _decode(kind, value)
    return found


def _decode(kind: Any, value: Any) -> Any:
    if hasattr(kind, "from_value"):
        return kind.from_value(value)
    if dataclasses.is_dataclass(kind):
        kinds = _kinds(typing.cast(type, kind))
        return kind(**{key: _decode(kinds[key], item) for key, item in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode(next((one for one in arguments if _is_written_as(one, type(value))), None), value)
    if origin is tuple:
        one_kind = len(arguments) == 2 and arguments[1] is Ellipsis
        each = (arguments[0],) * len(value) if one_kind else arguments
        return tuple(_decode(one, item) for one, item in zip(each, value, strict=True))
    if origin is dict:
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    return value


def _is_written_as(kind: Any, json_type: type) -> bool:
    """Whether `kind` is the member of a union that a value of a JSON type becomes; other scalars stay as they are."""
    if hasattr(kind, "from_value"):
        return json_type is not type(None)
    if json_type is list:
        return typing.get_origin(kind) is tuple
    return json_type is dict and (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict)


@functools.cache
def _kinds(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
