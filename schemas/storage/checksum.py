"""CRC-32 of files and of pieces of files, in any order and on several threads.

CRC-32 (that of zip and PNG) because it can be put together from the checksums of pieces, so that what several threads
write in any order is never read back; because it finds every flipped bit; and because zlib computes it several times
faster than a disk writes (isal, where it is installed, several times faster than zlib). It guards against accidents,
not against people.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from isal.isal_zlib import crc32
except ImportError:  # the same numbers
    from zlib import crc32

BLOCK_BYTES = 16 * 1024 * 1024
READ_BYTES = 1024 * 1024
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def of_bytes(data: memoryview | bytes) -> int:
    """The CRC-32 of bytes in memory."""
    return crc32(data)


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two pieces one after the other, of the checksums of both; the second is `length` bytes.

    As `crc32_combine` of zlib: https://github.com/madler/zlib/blob/v1.3.1/crc32.c
    """
    return _product(_shift(length), first) ^ second


def of_pieces(pieces: Iterable[tuple[int, int, int]], size: int) -> int:
    """The CRC-32 of a file of `size` bytes, of the `(position, length, checksum)` of the pieces that it consists of."""
    crc = reached = 0
    for position, length, piece in sorted(pieces):
        assert position == reached, f"bytes {reached} to {position} are in no piece"
        crc, reached = combine(crc, piece, length), position + length
    assert reached == size, f"pieces of {reached} bytes in a file of {size}"
    return crc


def of_files(
    sizes: dict[Path, int], *, workers: int = 4, progress: Callable[[int, int], None] | None = None
) -> dict[Path, int | OSError]:
    """The CRC-32 of the first `sizes` bytes of each file, read on `workers` threads; or why it could not be read.

    `progress` is called, from one thread, with the bytes read and the bytes in all.
    """
    blocks = [
        (path, start, min(BLOCK_BYTES, size - start))
        for path, size in sizes.items()
        for start in range(0, max(size, 1), BLOCK_BYTES)
    ]
    total, done = sum(sizes.values()), 0
    pieces: dict[Path, list[tuple[int, int, int]]] = {path: [] for path in sizes}
    failed: dict[Path, OSError] = {}
    with ThreadPoolExecutor(workers) as pool:
        for (path, start, length), found in zip(blocks, pool.map(lambda block: _of_block(*block), blocks)):
            if isinstance(found, OSError):
                failed.setdefault(path, found)
            else:
                pieces[path].append((start, length, found))
            done += length
            if progress:
                progress(done, total)
    return {path: failed[path] if path in failed else of_pieces(pieces[path], size) for path, size in sizes.items()}


def text(crc: int) -> str:
    """A checksum as documents hold it: eight hexadecimal digits."""
    return f"{crc:08x}"


def _of_block(path: Path, start: int, length: int) -> int | OSError:
    buffer = memoryview(bytearray(min(READ_BYTES, length)))
    crc = 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            while length > 0:
                got = os.preadv(descriptor, [buffer[: min(len(buffer), length)]], start)
                if got == 0:
                    return OSError(f"the file ended {length} bytes early")
                crc = crc32(buffer[:got], crc)
                start, length = start + got, length - got
        finally:
            os.close(descriptor)
    except OSError as error:
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
