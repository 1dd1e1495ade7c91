"""Reading and writing JSON documents: parse, validate against a schema, format, fingerprint.

The JSON Schema files are the only home of what a document may contain; this module turns their complaints into faults
with a dotted path, what was expected and, for a misspelt key, what was probably meant. It knows nothing of what any
document is for.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autotp_plan.schemas.errors import DocumentError, Fault
from autotp_plan.schemas.schema_check import conforms, python_pattern
from autotp_plan.schemas.untrusted.plain_files import NO_PLAIN_FILE, TooLargeError, read_plain
from autotp_plan.schemas.untrusted.plain_files import make_folder as make_folder
from autotp_plan.schemas.untrusted.plain_files import sync_folder as sync_folder
from autotp_plan.schemas.untrusted.plain_files import write_atomically as write_atomically

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
MAX_CONTAINERS = 3_000_000
"""Objects and lists of a document: an empty one takes two bytes there, and 64 in memory."""
MOST_FAULTS = 100
"""Of one document; where it has more, those are the first."""
_MOST_WORDS, _MOST_COMPARED, _LONGEST_WORD = 10_000, 2_000, 200
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, kind: str, special_floats: bool = False, plain: bool = False) -> Any:
    """The parsed JSON of a file; a pipe that has a name, a socket or a device is refused.

    Args:
        path: the file.
        kind: what messages call it, such as `plan`.
        special_floats: as for `loads`.
        plain: refuse a shell's pipe too, of `--spec <(command)`: no file of a folder is one.

    Raises:
        DocumentError: it is missing, no file, too large, not UTF-8 or not JSON.
    """
    try:
        text = read_plain(path, MAX_DOCUMENT_BYTES, shell_pipe=not plain).decode("utf-8")
    except TooLargeError as error:
        raise DocumentError(_too_large(path, kind, f"{error.size} bytes", f"{MAX_DOCUMENT_BYTES} bytes")) from None
    except OSError as error:
        raise DocumentError(_unreadable(path, kind, error)) from None
    except UnicodeDecodeError:
        raise DocumentError(_not_json(path, kind, "bytes that are not UTF-8 text")) from None
    containers = text.count("{") + text.count("[")
    if containers > MAX_CONTAINERS:
        got, expected = f"{containers} brackets", f"{MAX_CONTAINERS} of {{ and ["
        raise DocumentError(_too_large(path, kind, got, expected))
    return parse_json(text, kind, path, special_floats)


def refuse_unreadable(text: str, kind: str) -> str:
    """The text of a document, which `read_json` reads.

    Raises:
        DocumentError: it is larger than what `read_json` reads.
    """
    size = len(text.encode("utf-8"))
    containers = text.count("{") + text.count("[")
    if size <= MAX_DOCUMENT_BYTES and containers <= MAX_CONTAINERS:
        return text
    raise DocumentError(
        Fault(
            code="document-would-be-too-large",
            what=f"the {kind} would be too large to be read again",
            where=f"the {kind}",
            got=f"{size} bytes with {containers} brackets",
            expected=f"at most {MAX_DOCUMENT_BYTES} bytes with {MAX_CONTAINERS} of {{ and [",
            next="name the tensors so that those of many layers differ in a number between dots, as in "
            "model.layers.3.mlp.up_proj.weight: they are one entry then",
        )
    )


def _too_large(path: Path, kind: str, got: str, expected: str) -> Fault:
    return Fault(
        code="document-too-large",
        what=f"the {kind} is too large to be one",
        where=str(path),
        got=got,
        expected=f"at most {expected}",
        next="check that this is the file you meant",
    )


def _unreadable(path: Path, kind: str, error: OSError) -> Fault:
    no_file = error.strerror == NO_PLAIN_FILE
    return Fault(
        code="unreadable-document",
        what=f"cannot read the {kind}",
        where=str(path),
        got=error.strerror or str(error),
        expected="a file, and not a pipe, a socket or a device" if no_file else "a readable JSON file",
        next="write what it gives to a file, and give that" if no_file else "check the path",
    )


def parse_json(text: str, kind: str, path: Path | str, special_floats: bool = False) -> Any:
    """The parsed JSON of `text`; `kind` and `path` are what messages call it. `special_floats`: as for `loads`.

    Raises:
        DocumentError: a syntax error, a repeated key, or NaN.
    """
    try:
        return loads(text, special_floats)
    except (ValueError, RecursionError) as error:
        raise DocumentError(_not_json(path, kind, str(error) or type(error).__name__)) from None


def loads(text: str, special_floats: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: the JSON.
        special_floats: read `Infinity` and `-Infinity`, which Python writes and JSON does not have, as
            `{"__float__": "Infinity"}`: transformers' own form for them (`PreTrainedConfig`), which is JSON, and which
            it reads back.

    Raises:
        ValueError: a syntax error, a repeated key, NaN, or half of a character.
    """
    value = json.loads(
        text, object_pairs_hook=_no_repeated_keys, parse_constant=_tagged if special_floats else _no_constant
    )
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a pair is a character, one alone is not
    return value


def validate(data: Any, schema_name: str, kind: str) -> None:
    """Check `data` against `schemas/{schema_name}.schema.json`; `kind` is what messages call it.

    Raises:
        DocumentError: with every fault found.
    """
    schema = _schema(schema_name)
    try:
        if conforms(data, schema, schema):
            return
        errors = list(_validator(schema_name).iter_errors(data))
        faults = [fault for error in errors for fault in _faults_of(error, kind, schema_name)]
    except RecursionError:
        raise DocumentError(_not_json(f"the {kind}", kind, "lists within lists without end")) from None
    if faults:
        raise DocumentError(faults)


def format_json(data: Any, width: int = 110) -> str:
    """Deterministic JSON for people: a value that fits on a line is on one line, keys keep their order."""
    return _format(data, "", width) + "\n"


def fingerprint(data: Any) -> str:
    """`sha256:` and the SHA-256 of the canonical form (sorted keys, no spaces) of a JSON value."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "x"?`, or nothing when no known word is near, or when there are too many to look through."""
    words = list(itertools.islice(known, _MOST_WORDS + 1))
    if len(words) > _MOST_WORDS or len(word) > _LONGEST_WORD:
        return ""
    similar = [one for one in words if abs(len(one) - len(word)) <= 0.6 * max(len(one), len(word))]
    near = difflib.get_close_matches(word, similar[:_MOST_COMPARED], n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""


def dotted(path: Iterable[str | int]) -> str:
    """`layer_specs[2].shape` for `["layer_specs", 2, "shape"]`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


@functools.cache
def _schema(schema_name: str) -> dict[str, Any]:
    text = resources.files(__package__).joinpath(f"{schema_name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@functools.cache
def _validator(schema_name: str) -> Draft202012Validator:
    """A validator to which 2.0 is no integer, and `$` in a pattern is the very end, not the place before a newline."""
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend

    def pattern(_: Any, wanted: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not python_pattern(wanted).search(instance):
            yield ValidationError(f"{instance!r} does not match {wanted!r}")

    integer = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    strict = cast(Any, extend)(Draft202012Validator, validators={"pattern": pattern}, type_checker=integer)
    validator: Draft202012Validator = strict(_schema(schema_name))
    return validator


def _faults_of(error: ValidationError, kind: str, schema_name: str) -> list[Fault]:
    where = dotted(error.absolute_path) or f"the {kind}"
    if error.context:
        deepest = max(error.context, key=lambda child: len(child.absolute_path))
        if len(deepest.absolute_path) > len(error.absolute_path):
            return _faults_of(deepest, kind, schema_name)
    schema: Any = error.schema
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        known = schema.get("properties", {})
        return [
            Fault(
                code="unknown-key",
                what=f"the {kind} has an unknown key",
                where=f"{dotted(error.absolute_path)}.{key}".lstrip("."),
                got=_short(key),
                expected="one of " + ", ".join(sorted(known)),
                next=did_you_mean(key, known) or "remove the key",
            )
            for key in instance
            if key not in known
        ]
    if error.validator == "required":
        wanted: Any = error.validator_value
        missing = [key for key in wanted if key not in instance]
        return [
            Fault(
                code="missing-key",
                what=f"the {kind} lacks a key",
                where=where,
                got="keys " + (", ".join(sorted(map(str, instance))) or "none"),
                expected=_short(key),
                next=f"add {_short(key)}; see {schema_name}.schema.json",
            )
            for key in missing
        ]
    expected = schema.get("description") or f"{error.validator} {_short(error.validator_value)}"
    return [
        Fault(
            code="wrong-value",
            what=f"the {kind} has a wrong value",
            where=where,
            got=_short(instance),
            expected=expected,
            next=f"correct the value; see {schema_name}.schema.json",
        )
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = next(key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1)
        raise ValueError(f"the key {repeated!r} appears twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _tagged(name: str) -> dict[str, str]:
    if name == "NaN":
        raise ValueError("NaN, which is no value")
    return {"__float__": name}


def _not_json(path: Path | str, kind: str, got: str) -> Fault:
    return Fault(
        code="not-json",
        what=f"the {kind} is not JSON",
        where=str(path),
        got=got,
        expected="a JSON document in UTF-8",
        next="correct the syntax; a JSON editor shows the place",
    )


def _format(value: Any, indent: str, width: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) <= width or not isinstance(value, (dict, list)) or not value:
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        items = [
            f"{json.dumps(key, ensure_ascii=False)}: {_format(item, deeper, width)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _format(item, deeper, width) for item in value) + f"\n{indent}]"
