"""Whether a JSON value is what a schema says: quickly, without saying why not.

A plan is read at the start of every command and of every rank, and nearly always it is right. This knows the part of
JSON Schema (draft 2020-12) that the schemas of this folder use, and takes a hundredth of the time that importing
jsonschema takes, which says what is wrong with a value that is not. What is not known here does not conform.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]

_TYPES: dict[str, Callable[[Any], bool]] = {
    "array": lambda value: isinstance(value, list),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int,
    "null": lambda value: value is None,
    "number": lambda value: _is_number(value),
    "object": lambda value: isinstance(value, dict),
    "string": lambda value: isinstance(value, str),
}
_NO_CHECKS = frozenset({"$schema", "$id", "$defs", "title", "description"})


def conforms(value: Any, schema: Schema, root: Schema) -> bool:
    """Whether `value` is what `schema` says; its `$ref`s are to definitions of `root`."""
    for keyword, wanted in schema.items():
        if keyword in _NO_CHECKS:
            continue
        if keyword not in _CHECKS or not _CHECKS[keyword](value, wanted, schema, root):
            return False
    return True


@functools.cache
def python_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of a schema, in which `$` is the very end, and not the place before a newline too."""
    return re.compile(re.sub(r"\$$", r"\\Z", pattern))


def _type(value: Any, wanted: str | list[str], *_: Any) -> bool:
    return any(_TYPES[name](value) for name in ([wanted] if isinstance(wanted, str) else wanted))


def _enum(value: Any, wanted: list[Any], *_: Any) -> bool:
    return any(type(value) is type(one) and value == one for one in wanted if not isinstance(one, (list, dict)))


def _items(value: Any, wanted: Schema, schema: Schema, root: Schema) -> bool:
    before = len(schema.get("prefixItems", ()))
    return not isinstance(value, list) or all(conforms(one, wanted, root) for one in value[before:])


def _prefix_items(value: Any, wanted: list[Schema], _: Schema, root: Schema) -> bool:
    return not isinstance(value, list) or all(conforms(one, of, root) for one, of in zip(value, wanted))


def _properties(value: Any, wanted: Mapping[str, Schema], _: Schema, root: Schema) -> bool:
    return not isinstance(value, dict) or all(
        conforms(value[key], of, root) for key, of in wanted.items() if key in value
    )


def _additional_properties(value: Any, wanted: bool | Schema, schema: Schema, root: Schema) -> bool:
    if not isinstance(value, dict):
        return True
    known = schema.get("properties", {})
    others = [one for key, one in value.items() if key not in known]
    return not others or (wanted if isinstance(wanted, bool) else all(conforms(one, wanted, root) for one in others))


def _property_names(value: Any, wanted: Schema, _: Schema, root: Schema) -> bool:
    return not isinstance(value, dict) or all(conforms(key, wanted, root) for key in value)


def _dependent_required(value: Any, wanted: Mapping[str, list[str]], *_: Any) -> bool:
    return not isinstance(value, dict) or all(
        other in value for key, others in wanted.items() if key in value for other in others
    )


def _reference(value: Any, wanted: str, _: Schema, root: Schema) -> bool:
    return wanted.startswith("#/$defs/") and conforms(value, root["$defs"][wanted.removeprefix("#/$defs/")], root)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[Any, Any, Schema, Schema], bool]] = {
    "$ref": _reference,
    "additionalProperties": _additional_properties,
    "anyOf": lambda value, wanted, _, root: any(conforms(value, one, root) for one in wanted),
    "const": lambda value, wanted, *_: _enum(value, [wanted]),
    "dependentRequired": _dependent_required,
    "enum": _enum,
    "items": _items,
    "maxItems": lambda value, wanted, *_: not isinstance(value, list) or len(value) <= wanted,
    "maxLength": lambda value, wanted, *_: not isinstance(value, str) or len(value) <= wanted,
    "maximum": lambda value, wanted, *_: not _is_number(value) or not value > wanted,
    "minItems": lambda value, wanted, *_: not isinstance(value, list) or len(value) >= wanted,
    "minLength": lambda value, wanted, *_: not isinstance(value, str) or len(value) >= wanted,
    "minimum": lambda value, wanted, *_: not _is_number(value) or not value < wanted,
    "pattern": lambda value, wanted, *_: not isinstance(value, str) or bool(python_pattern(wanted).search(value)),
    "prefixItems": _prefix_items,
    "properties": _properties,
    "propertyNames": _property_names,
    "required": lambda value, wanted, *_: not isinstance(value, dict) or all(key in value for key in wanted),
    "type": _type,
}
