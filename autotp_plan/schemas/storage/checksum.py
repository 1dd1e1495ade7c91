"""CRC-32 of files and of blocks of files, in any order and on several threads.

CRC-32 (that of zip and PNG) because it can be put together from the checksums of blocks, so that what several threads
write in any order is never read back; because it finds every flipped bit; and because zlib computes it several times
faster than a disk writes (isal, where it is installed, several times faster than zlib). It guards against accidents,
not against people.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from autotp_plan.schemas.storage.files import ByteRange, File, Reader

try:
    from isal.isal_zlib import crc32, crc32_combine
except ImportError:  # the same numbers
    from zlib import crc32

    def crc32_combine(crc1: int, crc2: int, crc2_length: int, /) -> int:
        """zlib has this function, Python's zlib does not."""
        return combine_without_isal(crc1, crc2, crc2_length)


Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); from any thread, but never from two at once."""

BLOCK_BYTES = 16 * 1024 * 1024
READ_BYTES = 1024 * 1024
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


class Block(NamedTuple):
    """The checksum of `length` bytes of a file, from byte `start` on."""

    start: int
    length: int
    crc32: int


def of_bytes(data: memoryview | bytes) -> int:
    """The CRC-32 of bytes in memory."""
    return crc32(data)


def of_blocks(blocks: Iterable[Block], size: int) -> int:
    """The CRC-32 of a file of `size` bytes, from those of the blocks that it consists of, in any order."""
    joined = join_blocks(blocks)
    if not joined and size == 0:
        return of_bytes(b"")
    assert [(block.start, block.length) for block in joined] == [(0, size)], f"{joined} in a file of {size} bytes"
    return joined[0].crc32


def join_blocks(blocks: Iterable[Block]) -> list[Block]:
    """The same blocks, those that touch made one."""
    joined: list[Block] = []
    for block in sorted(blocks):
        if joined and joined[-1].start + joined[-1].length == block.start:
            before = joined.pop()
            crc = combine(before.crc32, block.crc32, block.length)
            block = Block(before.start, before.length + block.length, crc)
        joined.append(block)
    return joined


def of_files(
    sizes: dict[Path, int], *, workers: int = 4, progress: Progress | None = None
) -> dict[Path, int | OSError | EOFError]:
    """The CRC-32 of the first `sizes` bytes of each file; or why it could not be read.

    Args:
        sizes: bytes to read, by file. Symbolic links are not followed.
        workers: threads that read.
        progress: called, from one thread, with the bytes read and the bytes in all.
    """
    ranges = [
        ByteRange(path, start, min(BLOCK_BYTES, size - start))
        for path, size in sizes.items()
        for start in range(0, max(size, 1), BLOCK_BYTES)
    ]
    total, done = sum(sizes.values()), 0
    blocks: dict[File, list[Block]] = {path: [] for path in sizes}
    failed: dict[File, OSError | EOFError] = {}
    with ThreadPoolExecutor(workers) as pool:
        for found, crc in zip(ranges, pool.map(_of_range, ranges)):
            if isinstance(crc, int):
                blocks[found.file].append(Block(found.start, found.length, crc))
            else:
                failed.setdefault(found.file, crc)
            done += found.length
            if progress:
                progress(done, total)
    return {path: failed[path] if path in failed else of_blocks(blocks[path], size) for path, size in sizes.items()}


def text(crc: int) -> str:
    """A checksum as documents hold it: eight hexadecimal digits."""
    return f"{crc:08x}"


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two blocks one after the other, from the checksums of both.

    Args:
        first: the checksum of the first block.
        second: the checksum of the second block.
        length: the length of the second block, in bytes.
    """
    return crc32_combine(first, second, length)


def combine_without_isal(first: int, second: int, length: int) -> int:
    """As `combine`, where isal is not installed: zlib has the function, Python's zlib does not.

    Source: https://github.com/madler/zlib/blob/v1.3.1/crc32.c
    """
    return _product(_shift(length), first) ^ second


def _of_range(found: ByteRange) -> int | OSError | EOFError:
    buffer = memoryview(bytearray(min(READ_BYTES, max(found.length, 1))))
    crc = 0
    try:
        with Reader(follow_links=False) as reader:
            for data in reader.read_through(buffer, (found,)):
                crc = crc32(data, crc)
    except (OSError, EOFError) as error:
        return error
    return crc


def _product(a: int, b: int) -> int:
    """The product of two polynomials over the field of two elements, modulo that of CRC-32."""
    found, bit = 0, _ONE
    while a:
        if a & bit:
            found ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return found


@functools.lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """What a checksum is multiplied with when `length` bytes follow: x to the power of 8 * length."""
    found, power = _ONE, _ONE >> 8  # x ** 8
    while length:
        if length & 1:
            found = _product(power, found)
        power = _product(power, power)
        length >>= 1
    return found
