"""A file of `torch.save` as a safetensors file: a header is made, and the tensors' bytes are read where they lie.

The zip is read by its directory alone: members that are compressed, encrypted or outside of the file are refused, and
sizes are checked before anything is allocated.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.files import ByteRange, File, Reader, file_size
from autotp_plan.schemas.storage.safetensors_header import (
    CONVERTED_FROM,
    SafetensorsFile,
    header_bytes,
    item_size,
    num_bytes,
    parse_header,
)
from autotp_plan.sources.torch_files.pickled_tensors import PickledTensor, broken, last_byte, not_plain, read_pickle
from autotp_plan.sources.torch_files.strided_bytes import is_contiguous
from autotp_plan.sources.torch_files.torch_view import Piece, TorchFile

MAX_PICKLE_BYTES = 16 * 1024 * 1024
MAX_DIRECTORY_BYTES = 32 * 1024 * 1024

_LOCAL_HEADER = 30
_ENCRYPTED = 1


def read_torch_file(file: File, name: str) -> SafetensorsFile:
    """The tensors of a file of `torch.save`, as a safetensors file called `name`. No tensor is read.

    Raises:
        CheckpointError: it is no such file, is from before torch 1.6, or holds other things than plain tensors.
        OSError: a file that lies far away cannot be read.
    """
    try:
        size = _size(file)
        with Reader() as reader:
            members = _Members(file, size, reader)
            tensors = read_pickle(members.pickle(), file)
            begins = members.storages({tensor.storage for tensor in tensors.values()})
    except (OSError, EOFError) as error:
        if not isinstance(file, Path):
            raise
        raise broken(file, getattr(error, "strerror", None) or str(error)) from None
    _check(file, size, tensors, begins)
    return _view(file, name, tensors, {key: begin for key, (begin, _) in begins.items()})


def _check(file: File, size: int, tensors: Mapping[str, PickledTensor], begins: Mapping[str, tuple[int, int]]) -> None:
    """Raise CheckpointError where a tensor is not within its storage."""
    for name, tensor in tensors.items():
        held = begins[tensor.storage][1]
        if last_byte(tensor) > held:
            raise broken(file, f"{name} of {list(tensor.shape)} in a storage of {held} bytes")
        if num_bytes(tensor.dtype, tensor.shape) > size:
            raise not_plain(file, f"{name}, {list(tensor.shape)} elements that repeat the few in its storage")


def _view(file: File, name: str, tensors: Mapping[str, PickledTensor], begins: Mapping[str, int]) -> SafetensorsFile:
    """The header that safetensors would write, and which tensor is where."""
    ordered = sorted(tensors.items(), key=lambda item: -item_size(item[1].dtype))  # so that every tensor is aligned
    described = [(key, tensor.dtype, tensor.shape) for key, tensor in ordered]
    original = file.name
    header = header_bytes(described, {"format": "pt", CONVERTED_FROM: original})
    pieces = []
    reached = len(header)
    for _, tensor in ordered:
        item, length = item_size(tensor.dtype), num_bytes(tensor.dtype, tensor.shape)
        if length:
            begin = begins[tensor.storage] + tensor.offset * item
            plain = is_contiguous(tensor.shape, tensor.stride)
            pieces.append(Piece(reached, reached + length, begin, item, tensor.shape, tensor.stride, plain))
        reached += length
    starts = tuple(piece.start for piece in pieces)
    view = TorchFile(name=name, file=file, header=header, size=reached, pieces=tuple(pieces), starts=starts)
    return parse_header(view, header[8:].decode("utf-8"))


class _Members:
    """The members of a zip file as torch writes it: `NAME/data.pkl`, and a storage in each `NAME/data/KEY`."""

    def __init__(self, file: File, size: int, reader: Reader) -> None:
        self._file, self._size, self._reader = file, size, reader
        self._infos = self._directory()
        roots = [name.removesuffix("/data.pkl") for name in self._infos if name.count("/") == 1 and "/data.pkl" in name]
        if len(roots) != 1:
            raise broken(file, "a zip file with " + ("several data.pkl" if roots else "no data.pkl"))
        self._root = roots[0]

    def pickle(self) -> bytes:
        """The pickle that says which tensors there are."""
        order = self._bytes("byteorder", 16) if f"{self._root}/byteorder" in self._infos else b"little"
        if order != b"little":
            raise not_plain(self._file, f"tensors in the byte order {order[:16]!r}")
        return self._bytes("data.pkl", MAX_PICKLE_BYTES)

    def storages(self, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
        """First byte and number of bytes of storages, by their keys."""
        return {key: self._place(f"data/{key}") for key in sorted(keys)}

    def _bytes(self, name: str, most: int) -> bytes:
        begin, size = self._place(name)
        if size > most:
            raise broken(self._file, f"{name} of {size} bytes")
        data = bytearray(size)
        self._reader.read_into(memoryview(data), [ByteRange(self._file, begin, size)])
        return bytes(data)

    def _place(self, name: str) -> tuple[int, int]:
        info = self._infos.get(f"{self._root}/{name}")
        if info is None:
            raise broken(self._file, f"no {name[:100]} in the zip file")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise broken(self._file, f"{name}, which is compressed: torch.save does not do that")
        if info.flag_bits & _ENCRYPTED:
            raise broken(self._file, f"{name}, which is encrypted")
        header = bytearray(_LOCAL_HEADER)
        if not 0 <= info.header_offset <= self._size - _LOCAL_HEADER:
            raise broken(self._file, f"{name} outside of the file")
        self._reader.read_into(memoryview(header), [ByteRange(self._file, info.header_offset, _LOCAL_HEADER)])
        begin = info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
        if header[:4] != b"PK\x03\x04" or begin + info.file_size > self._size:
            raise broken(self._file, f"{name} outside of the file")
        return begin, info.file_size

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        first = bytearray(min(4, self._size))
        self._reader.read_into(memoryview(first), [ByteRange(self._file, 0, len(first))])
        if first[:1] == b"\x80":
            raise _legacy(self._file)
        if first != b"PK\x03\x04":
            raise broken(self._file, f"a file that begins with {bytes(first)!r}")
        try:
            with zipfile.ZipFile(_Window(self._file, self._size, self._reader)) as opened:
                infos = opened.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, LookupError, struct.error, OverflowError) as error:
            raise broken(self._file, f"a zip file that cannot be read: {error}") from None
        found = {info.filename: info for info in infos}
        if len(found) != len(infos):
            raise broken(self._file, "two members of one name in the zip file")
        return found


class _Window:
    """A file for `zipfile`, which asks for sizes that the file names: those that are too large are refused."""

    def __init__(self, file: File, size: int, reader: Reader) -> None:
        self._file, self._size, self._reader, self._at = file, size, reader, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._at = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise ValueError("a place before the file")
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        count = left if count < 0 else min(count, left)
        if count > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {count} bytes")
        data = bytearray(count)
        self._reader.read_into(memoryview(data), [ByteRange(self._file, self._at, count)])
        self._at += count
        return bytes(data)


def _size(file: File) -> int:
    if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
        raise broken(file, "no regular file")
    return file_size(file)


def _legacy(file: File) -> CheckpointError:
    rewrite = f"import torch; f = {str(file)!r}; torch.save(torch.load(f, map_location='cpu', weights_only=True), f)"
    return CheckpointError(
        Fault(
            code="legacy-torch-file",
            what="this file is in the format that torch.save had before torch 1.6",
            where=str(file),
            got="a pickle, and no zip file",
            expected="a zip file",
            next=f'write it again in the format of today (in a copy of it): python -c "{rewrite}"',
        )
    )
