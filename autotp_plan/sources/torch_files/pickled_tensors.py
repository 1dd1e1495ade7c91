"""The pickle in a file of `torch.save`, read as data: which tensors there are, and where their bytes lie.

Nothing in it is run: a name in a pickle (`torch.FloatStorage`, `os.system`) stays a name, and the few calls that
rebuild a tensor are read for their arguments. A pickle that wants anything else is refused.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.files import File
from autotp_plan.schemas.storage.safetensors_header import item_size

MAX_STACK = 100_000
"""Values at a time; pickles put at most a thousand items of a dict on the stack."""

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_DTYPES = {
    "uint16": "U16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""Dtypes that have no storage of their own."""

_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_KNOWN = frozenset(
    {_DICT, _TENSOR, _TENSOR_OF_DTYPE, *_PARAMETERS, *_UNTYPED}
    | {f"torch.{name}" for name in (*_STORAGES, *_DTYPES, "ComplexDoubleStorage")}
)

_OTHER_TENSORS = re.compile(r"torch\._utils\._rebuild_\w+|torch\.(sparse_\w+|per_\w+_affine)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LITERALS = frozenset({
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
})  # fmt: skip
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as a pickle describes it: `shape` and `stride` in elements of a storage, `offset` its first one."""

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """What a pickle would import."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    kind: str


class _Malformed(Exception):
    """Not what torch writes."""


def read_pickle(data: bytes, where: File) -> dict[str, PickledTensor]:
    """The tensors of a pickled dict, by name.

    Args:
        data: the pickle.
        where: the file that it is in.

    Raises:
        CheckpointError: it is broken, would need code to be read, or holds something else than tensors by name.
    """
    machine = _Machine(where)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        (found,) = machine.stack
    except (ValueError, LookupError, TypeError, OverflowError, _Malformed) as error:
        raise broken(where, f"a pickle that torch does not write: {str(error) or type(error).__name__}"[:200]) from None
    if not isinstance(found, dict):
        raise _more_than_tensors(where, f"a {_kind(found)} and no dict of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, PickledTensor):
            raise _more_than_tensors(where, f"a {_kind(value)} called {str(name)[:100]}")
        if name == "__metadata__" or _SURROGATE.search(name):
            raise broken(where, f"a tensor called {name[:100]!a}")
    return found


class _Machine:
    """The stack of a pickle, on which only data lies."""

    def __init__(self, where: File) -> None:
        self._where = where
        self._memo: dict[int, Any] = {}
        self._marks: list[int] = []
        self.stack: list[Any] = []

    def step(self, opcode: str, argument: Any) -> None:
        """Do what one opcode says."""
        stack = self.stack
        if len(stack) > MAX_STACK:
            raise _Malformed(f"more than {MAX_STACK} values on its stack")
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif opcode == "MARK":
            self._marks.append(len(stack))
        elif opcode == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif opcode == "EMPTY_LIST":
            stack.append([])
        elif opcode in ("EMPTY_DICT", "EMPTY_SET"):
            stack.append({})
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if opcode == "SETITEM" else self._pop_to_mark()
            _set_items(stack[-1], items[::2], items[1::2])
        elif opcode in ("APPEND", "APPENDS"):
            items = self._pop(1) if opcode == "APPEND" else self._pop_to_mark()
            if not isinstance(stack[-1], list):
                raise _Malformed("items for what is no list")
            stack[-1].extend(items)
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            name = argument.replace(" ", ".") if opcode == "GLOBAL" else ".".join(self._pop(2))
            stack.append(self._named(name))
        elif opcode == "BINPERSID":
            stack.append(_storage(*self._pop(1)))
        elif opcode == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(self._rebuilt(function, arguments))
        elif opcode == "BUILD":  # `_metadata` of a state dict: versions of modules
            self._pop(1)
            if not isinstance(stack[-1], dict):
                raise _needs_code(self._where, "the state of an object")
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise _needs_code(self._where, f"the opcode {opcode}")

    def _pop(self, count: int) -> list[Any]:
        first = len(self.stack) - count
        if first < (self._marks[-1] if self._marks else 0):
            raise _Malformed("a value is taken that is not there")
        items = self.stack[first:]
        del self.stack[first:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        first = self._marks.pop()
        items = self.stack[first:]
        del self.stack[first:]
        return items

    def _named(self, name: str) -> _Name:
        if name in _KNOWN:
            return _Name(name)
        if _OTHER_TENSORS.fullmatch(name):
            raise not_plain(self._where, f"a tensor that {name} makes")
        raise _needs_code(self._where, name)

    def _rebuilt(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Name) else ""
        if not isinstance(arguments, tuple):
            raise _Malformed("a call without arguments")
        if name == _DICT:
            made: dict[Any, Any] = {}
            for pair in arguments[0] if arguments else ():
                _set_items(made, pair[:1], pair[1:2])
            return made
        if name in _PARAMETERS and isinstance(arguments[0], PickledTensor):
            return arguments[0]
        if name not in (_TENSOR, _TENSOR_OF_DTYPE):
            raise _Malformed(f"a call of {name or _kind(function)}")
        return self._tensor(name, arguments)

    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> PickledTensor:
        storage, offset, shape, stride, *rest = arguments
        if not isinstance(storage, _Storage):
            raise _Malformed("a tensor without a storage")
        dtype = storage.kind
        if name == _TENSOR_OF_DTYPE:
            dtype = rest[2].name.removeprefix("torch.") if isinstance(rest[2], _Name) else ""
        if any(rest[3:] if name == _TENSOR_OF_DTYPE else rest[2:]):
            raise not_plain(self._where, "a tensor that is conjugated or negated when it is read")
        found = _DTYPES.get(dtype) if name == _TENSOR_OF_DTYPE else _STORAGES.get(dtype)
        if found is None:
            raise not_plain(self._where, f"a tensor of {dtype or 'no dtype'}")
        numbers = (offset, *_tuple(shape), *_tuple(stride))
        if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise _Malformed("a tensor whose shape or stride are no sizes")
        return PickledTensor(storage.key, found, offset, shape, stride)


def last_byte(tensor: PickledTensor) -> int:
    """How many bytes a storage must have for a tensor."""
    if 0 in tensor.shape:
        return 0
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride))
    return (last + 1) * item_size(tensor.dtype)


def _storage(given: Any) -> _Storage:
    """What `("storage", class, key, device, number of elements)` says."""
    if not (isinstance(given, tuple) and len(given) == 5 and given[0] == "storage" and isinstance(given[1], _Name)):
        raise _Malformed("a reference that is no storage")
    if not isinstance(given[2], str):
        raise _Malformed("a storage without a name")
    return _Storage(given[2], given[1].name.rpartition(".")[2])


def _set_items(target: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
    if not isinstance(target, dict) or len(keys) != len(values):
        raise _Malformed("items for what is no dict")
    if not all(isinstance(key, str | int) for key in keys):
        raise _Malformed("keys that are no names")
    target.update(zip(keys, values))


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise _Malformed("a shape that is no tuple")
    return value


def _kind(value: Any) -> str:
    return value.name if isinstance(value, _Name) else type(value).__name__.lstrip("_")


def broken(where: File, got: str) -> CheckpointError:
    """The error of a file that torch did not write, or that is not complete."""
    return CheckpointError(
        Fault(
            code="broken-torch-file",
            what="this is not a sound file of torch.save",
            where=str(where),
            got=got,
            expected="a complete zip file as torch.save writes it, of torch 1.6 or newer",
            next="fetch or write the file again; it may be truncated",
        )
    )


def not_plain(where: File, got: str) -> CheckpointError:
    """The error of a tensor that is not a block of numbers in a file."""
    return CheckpointError(
        Fault(
            code="torch-tensor-kind",
            what="a file of torch.save holds a tensor that safetensors cannot hold",
            where=str(where),
            got=got,
            expected="dense tensors in dtypes that training uses",
            next="load the file with torch.load(..., weights_only=True), make its tensors plain (for example with "
            "to_dense().to(torch.bfloat16)), and torch.save them by name",
        )
    )


def _needs_code(where: File, got: str) -> CheckpointError:
    return CheckpointError(
        Fault(
            code="torch-file-needs-code",
            what="reading this file of torch.save would run code that is in it",
            where=str(where),
            got=got[:200],
            expected="tensors by name, and nothing else",
            next="use safetensors files of the model; or, only where you trust who made this file, load it with "
            "torch.load(..., weights_only=False), and torch.save its tensors as a dict by name",
        )
    )


def _more_than_tensors(where: File, got: str) -> CheckpointError:
    return CheckpointError(
        Fault(
            code="torch-file-of-other-things",
            what="a file of torch.save holds other things than tensors by name",
            where=str(where),
            got=got,
            expected="a state dict: tensors by name",
            next="load the file with torch.load(..., weights_only=True), and torch.save the tensors in it as a dict by "
            "name",
        )
    )
