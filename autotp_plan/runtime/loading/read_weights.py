"""Reading one rank's weights: mapped, or straight into their memory, several at a time.

A pre-split tensor that stays on the CPU is mapped, a page of it read when it is used and copied when it is written to.
Every other tensor is read straight into its memory, or through small buffers on the way to another device or dtype: the
rank never holds more than its shard and those buffers.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from autotp_plan.runtime.loading.weights import DTYPES, Weight
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.files import Reader, in_parts, local_path
from autotp_plan.schemas.storage.uncached import BLOCK_BYTES, huge_pages

CHUNK_BYTES = 8 * 1024 * 1024
READERS = 4
"""Threads that read; each may use two buffers of `CHUNK_BYTES`."""
BATCH_BYTES = 4 * 1024 * 1024
"""Small weights of this machine's files are read by one thread one after the other, as many as have these bytes."""
HUGE_BYTES = 2 * 1024 * 1024
"""From this size on, memory is asked for in huge pages: the kernel hands it out several times faster."""

_Placed = tuple[Weight, "Tensor | None"]


def read_weights(
    weights: Iterable[Weight], device: torch.device, dtypes: Mapping[str, torch.dtype], *, once: bool = False
) -> Iterator[tuple[Weight, Tensor]]:
    """Weights and their tensors, in order; while one is used, the next ones are read.

    Args:
        weights: of one rank.
        device: the device of the tensors.
        dtypes: what floating-point tensors are converted to, by name of the weight; others keep the dtype on disk.
        once: one process reads each rank's shards: those of a file that is not in the page cache are read past it.

    Raises:
        CheckpointError: a file ended early.
    """

    readers = _Readers()
    # asked for before the first is read, which takes no memory yet: to give out address space, the kernel stops readers
    placed = [(weight, _target(weight, device, dtypes.get(weight.name), once)) for weight in weights]

    def read(batch: list[_Placed]) -> list[tuple[Weight, Tensor]]:
        reader = readers.of_this_thread()
        return [(one, _read(one, device, dtypes.get(one.name), reader, once, tensor)) for one, tensor in batch]

    waiting: deque[Future[list[tuple[Weight, Tensor]]]] = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for batch in _batches(placed):
            waiting.append(pool.submit(read, batch))
            if len(waiting) > READERS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        readers.close()


class _Readers:
    """A reader for each thread, and its open files."""

    def __init__(self) -> None:
        self._here, self._all = threading.local(), list[Reader]()

    def of_this_thread(self) -> Reader:
        reader: Reader | None = getattr(self._here, "reader", None)
        if reader is None:
            reader = self._here.reader = Reader()
            self._all.append(reader)
        return reader

    def close(self) -> None:
        for reader in self._all:
            reader.close()


def _batches(placed: list[_Placed]) -> Iterator[list[_Placed]]:
    """Weights in order, a large one or one that is far away alone."""
    batch: list[_Placed] = []
    size = 0
    placed.reverse()
    while placed:  # the list must not hold what was read
        weight, target = placed.pop()
        batch.append((weight, target))
        size += math.prod(weight.shape) * DTYPES[weight.dtype].itemsize
        if size >= BATCH_BYTES or not all(isinstance(found.file, Path) for found in weight.stored.ranges):
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_weight(weight: Weight, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A rank's shard of a parameter as a tensor.

    It is mapped, or read straight into its memory, where it can be; to another dtype or device it goes through a buffer
    of `CHUNK_BYTES`.

    Args:
        weight: where it is.
        device: the device of the tensor.
        dtype: what a floating-point tensor is converted to; None keeps the dtype on disk, as other tensors do.

    Raises:
        CheckpointError: a file ended early.
    """
    with Reader() as reader:
        return _read(weight, device, dtype, reader, False, _target(weight, device, dtype, False))


def _target(weight: Weight, device: torch.device, dtype: torch.dtype | None, once: bool) -> Tensor | None:
    """The tensor that a weight is read into; None where it is mapped, or on a device, whose memory is taken later."""
    wanted = _wanted(weight, dtype)
    direct = wanted == DTYPES[weight.dtype]
    if device.type != "cpu" or (direct and weight.mapped and weight.stored.size):
        return None
    in_place = once and direct and weight.of_one_rank
    return _empty(weight.shape, wanted, device, weight.stored.ranges[0].start if in_place else 0)


def _wanted(weight: Weight, dtype: torch.dtype | None) -> torch.dtype:
    stored = DTYPES[weight.dtype]
    return dtype if dtype is not None and stored.is_floating_point else stored


def _read(
    weight: Weight,
    device: torch.device,
    dtype: torch.dtype | None,
    reader: Reader,
    once: bool,
    target: Tensor | None,
) -> Tensor:
    """As `read_weight`, into `target`. `once` is as for `read_weights`."""
    stored, wanted = DTYPES[weight.dtype], _wanted(weight, dtype)
    if target is None and device.type == "cpu":
        return _map(weight, stored)
    tensor = _empty(weight.shape, wanted, device) if target is None else target
    if weight.full_shape is not None:
        return _read_transposed(weight, weight.full_shape, tensor, reader)
    once = once and weight.of_one_rank
    try:
        if wanted == stored and device.type == "cpu":
            reader.read_into(_memory(tensor), weight.byte_ranges(), once=once)
        elif device.type == "cuda":
            _through_pinned_memory(tensor, weight, reader, stored, once)
        else:
            buffer = torch.empty(min(tensor.numel(), CHUNK_BYTES // stored.itemsize), dtype=stored)
            done = 0
            for data in reader.read_through(_memory(buffer), weight.byte_ranges(), once=once):
                count = len(data) // stored.itemsize
                tensor.view(-1)[done : done + count].copy_(buffer[:count])
                done += count
    except EOFError as error:
        raise CheckpointError(_short_read(weight, str(error))) from None
    return tensor


def _through_pinned_memory(tensor: Tensor, weight: Weight, reader: Reader, stored: torch.dtype, once: bool) -> None:
    """Fill a tensor on a CUDA device: one buffer is copied to the device while the next is read."""
    side = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(tensor.device))  # its memory may be in use until then
    size = min(tensor.numel(), CHUNK_BYTES // stored.itemsize)
    buffers = [torch.empty(size, dtype=stored, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
    done, number = 0, 0
    for part in in_parts(weight.byte_ranges(), size * stored.itemsize):
        buffer, event = buffers[number % 2], copied[number % 2]
        event.synchronize()
        count = sum(found.length for found in part) // stored.itemsize
        reader.read_into(_memory(buffer[:count]), part, once=once)
        with torch.cuda.stream(side):
            tensor.view(-1)[done : done + count].copy_(buffer[:count], non_blocking=True)
            event.record(side)
        done, number = done + count, number + 1
    side.synchronize()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, position: int = 0) -> Tensor:
    """A tensor whose values are not set; a large one begins in its page where byte `position` of a file does."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    offset = position % BLOCK_BYTES if position % dtype.itemsize == 0 else 0
    return torch.frombuffer(huge_pages(size, offset), dtype=dtype).view(shape)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_transposed(weight: Weight, full: tuple[int, ...], tensor: Tensor, reader: Reader) -> Tensor:
    """A rank's shard of a parameter that is transposed on disk, a matrix at a time."""
    stored, layout = DTYPES[weight.dtype], weight.layout
    rows, columns = full[-2:]
    matrix = torch.empty((columns, rows), dtype=stored)
    memory = _memory(matrix)
    numbers = torch.arange(math.prod(full[:-2])).view(full[:-2])
    if layout.dim is not None and layout.dim < len(full) - 2:  # of stacked matrices each rank has some
        numbers = _share(numbers, layout.dim, weight)
    parts = tensor.view(-1, *weight.shape[-2:])
    try:
        for to, number in enumerate(numbers.flatten().tolist()):
            reader.read_into(memory, weight.stored.slice(number * len(memory), len(memory)))
            found = matrix.t()
            if layout.dim is not None and layout.dim >= len(full) - 2:
                found = _share(found, layout.dim - (len(full) - 2), weight)
            parts[to].copy_(found)
    except EOFError as error:
        raise CheckpointError(_short_read(weight, str(error))) from None
    return tensor


def _share(tensor: Tensor, dim: int, weight: Weight) -> Tensor:
    """What the weight's rank has of `tensor` along `dim`."""
    intervals = weight.layout.intervals[weight.tp_rank]
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in intervals], dim)


def _map(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A pre-split shard as memory backed by its file. What is written to it stays in this process."""
    ((file, position, size),) = weight.byte_ranges()
    before = position % mmap.ALLOCATIONGRANULARITY
    try:
        with local_path(file).open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), before + size, access=mmap.ACCESS_COPY, offset=position - before)
    except ValueError as error:  # it is shorter than its header said
        raise CheckpointError(_short_read(weight, f"{file}: {error}")) from None
    pages.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=before).view(weight.shape)


def _short_read(weight: Weight, got: str) -> Fault:
    return Fault(
        code="short-file",
        what="a file ended early while it was read",
        where=weight.name,
        got=got,
        expected=f"the {weight.stored.size} bytes of {weight.name}",
        next="do not write to the folder while a job reads it",
    )
