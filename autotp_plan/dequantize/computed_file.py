"""A file whose quantised weights are computed while it is read: as if the checkpoint had been saved with plain ones."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from autotp_plan.dequantize.quantized_tensor import QuantizedTensor
from autotp_plan.schemas.errors import Fault, MissingDependencyError
from autotp_plan.schemas.storage.files import ByteRange, File, Reader, Span
from autotp_plan.schemas.storage.safetensors_header import TensorEntry

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


class Piece(NamedTuple):
    """Bytes `[start, stop)` of the file: those of a tensor that stays as it is, or of a weight that is computed."""

    start: int
    stop: int
    source: TensorEntry | QuantizedTensor


class ComputedFile:
    """A `StoredFile`.

    Args:
        original: the file with the codes.
        header: of the file, length prefix included.
        pieces: its tensors, in the order of their bytes and without gaps.
        weights: computes them.
    """

    def __init__(self, original: File, header: bytes, pieces: Sequence[Piece], weights: Weights) -> None:
        self._original, self._header, self._pieces, self._weights = original, header, pieces, weights
        self._starts = [piece.start for piece in pieces]
        self.size = pieces[-1].stop if pieces else len(header)

    def __str__(self) -> str:
        return str(self._original)

    @property
    def name(self) -> str:
        """Its name in its folder."""
        return self._original.name

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        """Fill `target` with the bytes of `spans`, one after the other. Raises as `StoredFile`, and as `Weights`."""
        for source, group in itertools.groupby(self._parts(spans), key=lambda part: part[0]):
            parts = [span for _, span in group]
            size = sum(span.length for span in parts)
            part, target = target[:size], target[size:]
            if isinstance(source, QuantizedTensor):
                self._weights.reader().read_into(part, source, parts, reader)
            elif isinstance(source, TensorEntry):
                reader.read_into(part, [ByteRange(source.file, source.start + at, length) for at, length in parts])
            else:
                for at, length in parts:
                    part[:length] = self._header[at : at + length]
                    part = part[length:]

    def _parts(self, spans: Sequence[Span]) -> Iterator[tuple[TensorEntry | QuantizedTensor | None, Span]]:
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
                if index >= len(self._pieces):
                    raise EOFError(f"{self} ended {length} bytes early")
                begin, stop, source = self._pieces[index]
                count = min(length, stop - start)
                if count > 0:
                    yield source, Span(start - begin, count)
                    start, length = start + count, length - count
                index += 1


def _no_numpy(missing: str) -> Fault:
    return Fault(
        code="numpy-missing",
        what="weights that are quantised are computed by numpy",
        where="the checkpoint's quantised weights",
        got=f"no module named {missing!r}",
        expected="numpy",
        next="pip install 'autotp-plan[fast]'",
    )
