"""safetensors headers, without reading a tensor or decoding a dtype.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, then the
tensors' bytes, row-major, without gaps. Nothing here trusts a header: sizes are checked against the file's before
anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.names import MAX_NAMES
from autotp_plan.schemas.storage.files import File, Reader, Span, StoredFile

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = MAX_NAMES
"""Of a checkpoint: a plan has at most as many parameters, and the largest models have a fifth of it."""
MAX_NAME = 4096
"""Characters of a tensor's name; real ones have a hundred. A name is looked at once for each module it is in."""
_MAX_BRACKETS = 4 * MAX_TENSORS
"""Of a header: a tensor takes three."""
FIRST_READ_BYTES = 8192
"""What is read first of a file far away: the header of most files of large models is shorter."""

CONVERTED_FROM = "converted_from"
"""Where the metadata of a header says which file of `torch.save` the tensors were read from."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of each dtype that can be sharded; of narrower ones a byte holds several elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where a tensor lies: absolute byte range `[start, stop)` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: File
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetensorsFile:
    """The header of one file: its tensors in the order of their bytes, its metadata, and the text it was read from."""

    path: File
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str] | None
    size: int
    header: str


def read_header(path: File) -> SafetensorsFile:
    """Read the header of a file.

    Raises:
        CheckpointError: `path` is not a complete safetensors file.
        OSError: a file that lies far away cannot be read.
    """
    if not isinstance(path, Path):
        return _read_stored(path)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _broken(path, "no regular file")
            size = status.st_size
            prefix = file.read(8)
            header_size = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
                raise _broken(path, f"a header of {header_size} bytes in a file of {size}")
            raw = file.read(header_size)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from None
    return _parsed(path, raw, size)


def _read_stored(file: StoredFile) -> SafetensorsFile:
    """The header of a file far away: one request for a short one, two for a longer one."""
    with Reader() as reader:
        first = bytearray(min(FIRST_READ_BYTES, file.size))
        file.read_into(memoryview(first), [Span(0, len(first))], reader)
        header_size = int.from_bytes(first[:8], "little")
        if len(first) < 8 or header_size > min(file.size - 8, MAX_HEADER_BYTES):
            raise _broken(file, f"a header of {header_size} bytes in a file of {file.size}")
        raw = bytearray(8 + header_size)
        known = min(len(first), len(raw))
        raw[:known] = first[:known]
        if known < len(raw):
            file.read_into(memoryview(raw)[known:], [Span(known, len(raw) - known)], reader)
    return _parsed(file, bytes(raw[8:]), file.size)


def _parsed(path: File, raw: bytes, size: int) -> SafetensorsFile:
    try:
        header = raw.decode("utf-8")
    except ValueError as error:
        raise _broken(path, f"a header that is not JSON: {error}") from None
    found = parse_header(path, header)
    if found.size != size:
        raise _broken(path, f"{size} bytes where the header accounts for {found.size}")
    return found


def parse_header(path: File, text: str) -> SafetensorsFile:
    """What the header `text` of a file says; the file `path` need not exist.

    Raises:
        CheckpointError: the text is no safetensors header, its tensors leave gaps or overlap, or are too many.
    """
    if text.count("{") + text.count("[") > _MAX_BRACKETS:
        raise too_many_tensors(path)
    try:
        header = documents.loads(text)
        begin = 8 + len(text.encode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _broken(path, "a header that is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _broken(path, "__metadata__ that is not strings by name")
    if len(header) > MAX_TENSORS:
        raise too_many_tensors(path)
    tensors = [_entry(path, name, value, begin) for name, value in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    reached = begin
    for tensor in tensors:
        if tensor.start != reached:
            raise _broken(path, f"{tensor.name} begins at byte {tensor.start} where {reached} bytes are accounted for")
        reached = tensor.stop
    return SafetensorsFile(path=path, tensors=tuple(tensors), metadata=metadata, size=reached, header=text)


def header_bytes(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file, length prefix included.

    Args:
        tensors: `(name, dtype, shape)` in the order of their bytes.
        metadata: what `__metadata__` holds.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape in tensors:
        stop = at + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return prefixed(raw)


def described_file(
    path: File, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> SafetensorsFile:
    """The file with the header `header_bytes(tensors, metadata)`; the file `path` need not exist."""
    header = header_bytes(tensors, metadata)
    at = len(header)
    entries = []
    for name, dtype, shape in tensors:
        stop = at + num_bytes(dtype, shape)
        entries.append(TensorEntry(name=name, dtype=dtype, shape=shape, file=path, start=at, stop=stop))
        at = stop
    return SafetensorsFile(
        path=path, tensors=tuple(entries), metadata=dict(metadata), size=at, header=header[8:].decode("utf-8")
    )


def prefixed(header: bytes) -> bytes:
    """A header with its length before it, as it stands at the beginning of a file."""
    return len(header).to_bytes(8, "little") + header


def item_size(dtype: str) -> int:
    """Bytes of an element."""
    return BITS[dtype] // 8


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return item_size(dtype) * math.prod(shape)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe is opened too, and then refused


def _entry(path: File, name: str, value: Any, begin: int) -> TensorEntry:
    if len(name) > MAX_NAME:
        raise _broken(path, f"a tensor with a name of {len(name)} characters, where {MAX_NAME} are the most")
    try:
        dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"no dtype, shape and data_offsets for {name}") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(
            Fault(
                code="unknown-tensor-dtype",
                what="a tensor has a dtype that cannot be sharded",
                where=f"{path}: {name}",
                got=str(dtype),
                expected="one of " + ", ".join(sorted(BITS)),
                next="use a checkpoint in a dtype that training uses, such as BF16",
            )
        )
    numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers):
        raise _broken(path, f"a shape or offset of {name} that is not a list of sizes")
    if last - first != num_bytes(dtype, shape):
        raise _broken(path, f"{last - first} bytes for {name}, {dtype} of shape {shape}")
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), file=path, start=begin + first, stop=begin + last)


def too_many_tensors(where: File) -> CheckpointError:
    """The error of a file, or of a checkpoint, with more tensors than a plan has names for."""
    return CheckpointError(
        Fault(
            code="checkpoint-too-many-tensors",
            what="the checkpoint has too many tensors",
            where=str(where),
            got=f"more than {MAX_TENSORS} tensors",
            expected=f"at most {MAX_TENSORS} tensors in all",
            next="stack tensors of one kind, such as those of the experts of a layer, into one",
        )
    )


def _broken(path: File, got: str) -> CheckpointError:
    return CheckpointError(
        Fault(
            code="broken-safetensors",
            what="this is not a sound safetensors file",
            where=str(path),
            got=got,
            expected="a complete file as safetensors writes it",
            next="fetch or write the file again; it may be truncated",
        )
    )
