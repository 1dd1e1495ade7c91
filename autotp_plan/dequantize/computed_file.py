"""A file whose quantised weights are computed while it is read: as if the checkpoint had been saved with plain ones."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from autotp_plan.dequantize.quantized_tensor import QuantizedTensor
from autotp_plan.schemas.errors import Fault, MissingDependencyError
from autotp_plan.schemas.storage.files import ByteRange, File, Reader, Span
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, TensorEntry, item_size, prefixed

if TYPE_CHECKING:
    from autotp_plan.dequantize.weight_reader import WeightReader


class Weights:
    """The weights of a checkpoint, computed when they are read.

    Args:
        dtype: what they become: BF16, F16 or F32.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._reader: WeightReader | None = None
        self._lock = threading.Lock()

    def reader(self) -> WeightReader:
        """What reads them.

        Raises:
            MissingDependencyError: numpy is not installed.
        """
        with self._lock:
            if self._reader is None:
                try:
                    from autotp_plan.dequantize.weight_reader import WeightReader
                except ImportError as error:
                    raise MissingDependencyError(_no_numpy(str(error.name))) from None
                self._reader = WeightReader(self.dtype)
            return self._reader

    def forget(self) -> None:
        """Read again what was kept of scales and codes."""
        with self._lock:
            self._reader = None


Source = TensorEntry | QuantizedTensor
"""A tensor that stays as it is, or a weight that is computed."""


class Step(NamedTuple):
    """Bytes of a `ComputedFile` that are read at once.

    Attributes:
        length: bytes.
        position: the byte of the original where what they are computed from begins.
        entries: the tensors of the original that are read for them: the codes first.
    """

    length: int
    position: int
    entries: tuple[TensorEntry, ...]


_MANY = 8
_AT_ONCE = 4
"""Tensors of one file that are read at the same time, where they are at least so many and lie far away."""


class ComputedFile:
    """A `StoredFile`, once it is filled.

    Args:
        original: the file with the codes.
        weights: computes the weights.
    """

    def __init__(self, original: File, weights: Weights) -> None:
        self.name, self._original, self._weights = original.name, original, weights
        self.size = 0
        self._header = b""
        self._tensors: tuple[TensorEntry, ...] = ()
        self._sources: Sequence[Source] = ()
        self._starts: list[int] = []

    def fill(self, described: SafetensorsFile, sources: Sequence[Source]) -> None:
        """Say what is in the file: its header and tensors, and for each where it comes from."""
        self.size, self._header = described.size, prefixed(described.header.encode())
        self._tensors, self._sources = described.tensors, sources
        self._starts = [tensor.start for tensor in described.tensors]

    def __str__(self) -> str:
        return str(self._original)

    @property
    def behind(self) -> tuple[File, ...]:
        """The files with the codes and scales, and with what is not quantised."""
        tensors = (tensor for source in self._sources for tensor in _tensors(source))
        return tuple(dict.fromkeys([self._original, *(tensor.file for tensor in tensors)]))

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        """Fill `target` with the bytes of `spans`, one after the other. Raises as `StoredFile`, and as `Weights`."""
        wanted = []
        for source, group in itertools.groupby(self._parts(spans), key=lambda part: part[0]):
            parts = [span for _, span in group]
            size = sum(span.length for span in parts)
            wanted.append((target[:size], source, parts))
            target = target[size:]
        if len(wanted) < _MANY or isinstance(self._original, Path):
            for one in wanted:
                self._read(*one, reader)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # samples of many tensors far away
            list(pool.map(lambda one: self._read_alone(reader, *one), wanted))

    def _read_alone(self, beside: Reader, target: memoryview, source: Source | None, parts: Sequence[Span]) -> None:
        with beside.another() as reader:
            self._read(target, source, parts, reader)

    def _read(self, target: memoryview, source: Source | None, parts: Sequence[Span], reader: Reader) -> None:
        """Fill `target` with bytes of one tensor, or of the header."""
        if isinstance(source, QuantizedTensor):
            self._weights.reader().read_into(target, source, parts, reader)
        elif isinstance(source, TensorEntry):
            reader.read_into(target, [ByteRange(source.file, source.start + at, length) for at, length in parts])
        else:
            for at, length in parts:
                target[:length] = self._header[at : at + length]
                target = target[length:]

    def forget(self) -> None:
        """Read again what was kept of scales and codes, of all files of the checkpoint."""
        self._weights.forget()

    def steps(self, span: Span, most: int, unit: int = 1) -> Iterator[Step]:
        """A span of full tensors in steps of about `most` bytes, each of full rows of one tensor.

        Args:
            span: bytes of this file.
            most: bytes of a step; or one row, or `unit`, where that is more.
            unit: bytes that are not separated: full rows.
        """
        for source, (start, length) in self._parts((span,)):
            if isinstance(source, QuantizedTensor):
                row = source.shape[-1] * item_size(self._weights.dtype)
                entries = source.entries
            else:
                assert source is not None, "the header is not written to shards"
                row, entries = 1, (source,)
            codes, size = entries[0], max(unit, row)
            size = max(most // size, 1) * size
            for at in range(start, start + length, size):
                position = codes.start + at * (codes.stop - codes.start) // length
                yield Step(min(size, start + length - at), position, entries)

    def _parts(self, spans: Sequence[Span]) -> Iterator[tuple[Source | None, Span]]:
        """Spans by tensor: which it is (None for the header), and which bytes of it."""
        for start, length in spans:
            if start < len(self._header) and length:
                count = min(length, len(self._header) - start)
                yield None, Span(start, count)
                start, length = start + count, length - count
            if not length:
                continue
            index = bisect.bisect_right(self._starts, start) - 1
            while length:
                if index >= len(self._tensors):
                    raise EOFError(f"{self} ended {length} bytes early")
                tensor = self._tensors[index]
                count = min(length, tensor.stop - start)
                if count > 0:
                    yield self._sources[index], Span(start - tensor.start, count)
                    start, length = start + count, length - count
                index += 1


def _tensors(source: Source) -> tuple[TensorEntry, ...]:
    """The tensors that a tensor is computed of, or the one that it is."""
    return (source,) if isinstance(source, TensorEntry) else (source.codes, source.scale)


def _no_numpy(missing: str) -> Fault:
    return Fault(
        code="numpy-missing",
        what="weights that are quantised are computed by numpy",
        where="the checkpoint's quantised weights",
        got=f"no module named {missing!r}",
        expected="numpy",
        next="pip install 'autotp-plan[fast]'",
    )
