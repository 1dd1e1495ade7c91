"""The SHA-256 of files while they are read in about their order: for what cannot be hashed afterwards.

Of quantised weights the shards hold values, and not the bytes that the hub has a checksum of. So these are hashed as
they arrive. A hash takes them in their order: those that come too early wait, as long as there is memory for them; what
does not come, because nobody asks for it, or was dropped, is fetched. Bytes that are fetched twice must be the same:
their CRC-32 are compared, tensor by tensor.
"""

from __future__ import annotations

import bisect
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from autotp_plan.planner.copying.source_check import Expected
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.files import ByteRange, File, Reader
from autotp_plan.schemas.storage.safetensors_header import TensorEntry, prefixed

WAITING_BYTES = 128 * 1024 * 1024
"""Of all files, bytes that wait for those before them."""
FETCH_BYTES = 32 * 1024 * 1024
"""What is fetched at once of what nobody asked for."""


class Waiting:
    """Counts the bytes that wait, of all files.

    Args:
        most: how many may.
    """

    def __init__(self, most: int = WAITING_BYTES) -> None:
        self._left = most
        self._lock = threading.Lock()

    def enter(self, count: int) -> bool:
        """Whether there is memory for `count` bytes more."""
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def leave(self, count: int) -> None:
        """`count` bytes wait no more."""
        with self._lock:
            self._left += count


class SourceHash:
    """One file.

    Args:
        expected: the file, and what it must be.
        waiting: counts what waits.
        known: the CRC-32 of its parts, where an earlier attempt has compared the file: then only they are compared.

    Attributes:
        is_complete: whether all of it was hashed.
        got: its SHA-256, when it is complete.
    """

    def __init__(self, expected: Expected, waiting: Waiting, known: Sequence[int] | None = None) -> None:
        assert expected.described is not None
        self.expected, self.size = expected, expected.described.size
        tensors = expected.described.tensors
        self._starts = sorted({0, *(tensor.start for tensor in tensors if tensor.stop > tensor.start)})
        self._used: list[set[checksum.Block]] = [set() for _ in self._starts]
        known = known if known is not None and len(known) == len(self._starts) else None
        self._crcs = [0] * len(self._starts) if known is None else list(known)
        self.is_complete = known is not None
        self.got = "" if known is None else expected.sha256
        self._waiting, self._early = waiting, dict[int, bytes]()
        self._digest, self._reached = hashlib.sha256(), 0
        self._lock, self._fetching = threading.Lock(), threading.Lock()
        if known is None:
            self._take(memoryview(prefixed(expected.described.header.encode())))

    @property
    def is_right(self) -> bool:
        """Whether all of it was hashed, and it is what the hub has."""
        return self.is_complete and self.got == self.expected.sha256

    def arrived(self, start: int, data: memoryview) -> None:
        """Bytes of the file were read, from byte `start` on. From any thread."""
        blocks = list(self._blocks(start, data))
        with self._lock:
            for part, block in blocks:
                self._used[part].add(block)
            if self.is_complete or start + len(data) <= self._reached:
                return
            if start <= self._reached:
                self._take(data[self._reached - start :])
                self._take_early()
            elif start not in self._early and self._waiting.enter(len(data)):
                self._early[start] = bytes(data)

    def advance(self, until: int) -> bool:
        """Hash up to byte `until`, by fetching what has not arrived; whether the file is complete now, and was not.

        Raises:
            OSError: it cannot be read.
            EOFError: it ends before.
        """
        if self.is_complete or until <= self._reached < self.size:
            return False
        with self._fetching, Reader() as reader:
            while True:
                with self._lock:
                    self._take_early()
                    start = self._reached
                    stop = min([until, start + FETCH_BYTES, *(at for at in self._early if at > start)])
                if start >= until:
                    break
                data = memoryview(bytearray(stop - start))
                reader.read_into(data, [ByteRange(self.expected.stored, start, stop - start)])
                with self._lock:
                    self._take(data[self._reached - start :])  # some may have arrived
            with self._lock:
                if self.is_complete or self._reached < self.size:
                    return False
                self.is_complete, self.got = True, self._digest.hexdigest()
                return True

    def agrees(self, tensor: TensorEntry) -> bool:
        """Whether what was read of a tensor, which is all of it, is what was hashed."""
        if tensor.stop == tensor.start:
            return True
        part = bisect.bisect_right(self._starts, tensor.start) - 1
        with self._lock:
            joined = checksum.join_blocks(self._used[part])
        return joined == [checksum.Block(tensor.start, tensor.stop - tensor.start, self._crcs[part])]

    def record(self) -> dict[str, Any]:
        """What an interrupted attempt leaves of a file that is right."""
        crcs = "".join(map(checksum.text, self._crcs))
        return {"hashed": self.expected.name, "sha256": self.expected.sha256, "parts": crcs}

    def _take(self, data: memoryview) -> None:
        """Hash what comes next."""
        if not data:
            return
        self._digest.update(data)
        for part, block in self._blocks(self._reached, data):
            self._crcs[part] = checksum.combine(self._crcs[part], block.crc32, block.length)
        self._reached += len(data)

    def _take_early(self) -> None:
        for start in sorted(self._early):
            if start > self._reached:
                break
            data = self._early.pop(start)
            self._waiting.leave(len(data))
            self._take(memoryview(data)[self._reached - start :])

    def _blocks(self, start: int, data: memoryview) -> Iterator[tuple[int, checksum.Block]]:
        """Bytes from byte `start` on, by the parts of the file that they are of."""
        part = bisect.bisect_right(self._starts, start) - 1
        while data:
            following = self._starts[part + 1] if part + 1 < len(self._starts) else self.size
            count = min(len(data), following - start)
            yield part, checksum.Block(start, count, checksum.of_bytes(data[:count]))
            start, data, part = start + count, data[count:], part + 1


class HashingReader(Reader):
    """A reader that shows what it reads to the hashes of files.

    Args:
        hashes: those of files, by file.
        max_open: files to keep open.
    """

    def __init__(self, hashes: Mapping[File, SourceHash], *, max_open: int = 1) -> None:
        super().__init__(max_open=max_open)
        self._hashes = hashes

    def another(self) -> Reader:
        """A reader of the same kind, for another thread."""
        return HashingReader(self._hashes)

    def read_into(self, target: memoryview, ranges: Iterable[ByteRange], *, once: bool = False) -> None:
        """As `Reader.read_into`."""
        wanted = list(ranges)
        super().read_into(target, wanted, once=once)
        for file, start, length in wanted:
            found = self._hashes.get(file)
            if found is not None and length:
                found.arrived(start, target[:length])
            target = target[length:]


def source_hashes(expected: Iterable[Expected], records: Iterable[Mapping[str, Any]]) -> dict[File, SourceHash]:
    """The hashes of files that are to be read, by file.

    Args:
        expected: the files, and what they must be.
        records: what an earlier attempt left of those that were right.
    """
    known = {(record.get("hashed"), record.get("sha256")): record.get("parts") for record in records}
    waiting = Waiting()
    return {one.stored: SourceHash(one, waiting, _parsed(known.get((one.name, one.sha256)))) for one in expected}


def _parsed(parts: object) -> list[int] | None:
    """The checksums of a record; None where there is none."""
    if not isinstance(parts, str) or not re.fullmatch(r"([0-9a-f]{8})+", parts):
        return None
    return [int(parts[at : at + 8], 16) for at in range(0, len(parts), 8)]
