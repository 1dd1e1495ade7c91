"""Reading past the page cache: the same bytes, whatever the positions, and as always where it cannot be done."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from autotp_plan.schemas.storage import uncached
from autotp_plan.schemas.storage.files import ByteRange, Reader
from autotp_plan.schemas.storage.uncached import BLOCK_BYTES, UncachedFiles, address, huge_pages
from tests.helpers.page_cache import cold, is_cached

SIZE = 5 * 2**20 + 1234


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "data"
    path.write_bytes(data)
    return path


def read(file: Path, position: int, target: memoryview, once: bool = True) -> bytes:
    with Reader() as reader:
        reader.read_into(target, [ByteRange(file, position, len(target))], once=once)
    return bytes(target)


def test_the_same_bytes_from_every_position_to_every_place(file: Path, data: bytes) -> None:
    draw = random.Random(1)
    for number in range(60):
        cold(file)
        position = draw.choice([0, 1, 511, 4095, 4096, 4097, draw.randrange(SIZE)])
        length = min(SIZE - position, draw.choice([1, 4096, uncached.LEAST_BYTES, draw.randrange(1, SIZE)]))
        offset = draw.choice([0, position, position, draw.randrange(5000)]) % (2 * BLOCK_BYTES)
        assert read(file, position, huge_pages(length, offset)) == data[position : position + length], number
    cold(file)
    assert read(file, 0, memoryview(bytearray(SIZE))) == data
    assert not is_cached(file), "through a buffer"
    assert read(file, 3, huge_pages(SIZE - 3, 3)) == data[3:]
    assert not is_cached(file), "straight"
    assert read(file, 0, memoryview(bytearray(SIZE)), once=False) == data
    assert is_cached(file), "as always otherwise"


def test_what_is_cached_is_read_from_there(file: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    file.read_bytes()

    def refused(*_: object) -> None:
        raise AssertionError("read past the cache")

    monkeypatch.setattr(uncached, "_read_blocks", refused)
    monkeypatch.setattr(UncachedFiles, "_read_through_buffer", refused)
    assert read(file, 5, memoryview(bytearray(SIZE - 5))) == data[5:]
    cold(file)
    with pytest.raises(AssertionError, match="read past the cache"):
        read(file, 5, memoryview(bytearray(SIZE - 5)))


def test_what_was_just_written_is_what_is_read(file: Path, data: bytes) -> None:
    cold(file)
    with open(file, "r+b") as opened:
        opened.seek(70_000)
        opened.write(b"new" * 1000)
    assert not is_cached(file)
    changed = data[:70_000] + b"new" * 1000 + data[73_000:]
    assert read(file, 0, huge_pages(SIZE)) == changed
    assert read(file, 0, huge_pages(SIZE, 1)) == changed


@pytest.mark.parametrize("offset", [0, 1])
def test_a_file_that_ends_early_is_an_error(file: Path, offset: int) -> None:
    for size in (SIZE - 1, SIZE - SIZE % BLOCK_BYTES, SIZE - 3 * BLOCK_BYTES, 0):
        cold(file)
        os.truncate(file, size)
        with Reader() as reader, pytest.raises(EOFError, match="bytes early"):
            reader.read_into(huge_pages(SIZE, offset), [ByteRange(file, 0, SIZE)], once=True)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [1, 4096, 5000, 12288])
def test_short_reads_are_continued(
    file: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, offset: int, count: int
) -> None:
    cold(file)
    preadv, calls = os.preadv, 0

    def short(descriptor: int, buffers: list[memoryview], position: int) -> int:
        nonlocal calls
        calls += 1
        found = preadv(descriptor, buffers, position)
        return min(found, count) if calls < 20 else found

    monkeypatch.setattr(os, "preadv", short)
    assert read(file, 0, huge_pages(SIZE, offset)) == data
    assert calls > 2


def refuse(wrong: int, call: Callable[..., int], is_refused: Callable[..., bool]) -> Callable[..., int]:
    def refusing(*arguments: object) -> int:
        if is_refused(*arguments):
            raise OSError(wrong, os.strerror(wrong))
        return call(*arguments)

    return refusing


def test_file_systems_without_it_are_read_as_always(file: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    cold(file)
    opens, reads = os.open, os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse(errno.EINVAL, opens, lambda _, flags, *mode: bool(flags & os.O_DIRECT)))
        assert read(file, 0, huge_pages(SIZE)) == data
    cold(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse(errno.EINVAL, reads, lambda fd, *_: bool(flags_of(fd) & os.O_DIRECT)))
        assert read(file, 0, huge_pages(SIZE)) == data
    cold(file)
    with monkeypatch.context() as patch:
        patch.setattr(uncached, "_libc", lambda: None)
        assert read(file, 0, huge_pages(SIZE)) == data


def test_a_disk_that_fails_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold(file)
    monkeypatch.setattr(os, "preadv", refuse(errno.EIO, os.preadv, lambda fd, *_: bool(flags_of(fd) & os.O_DIRECT)))
    with pytest.raises(OSError, match="Input/output error"):
        read(file, 0, huge_pages(SIZE))


def flags_of(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def test_no_file_stays_open_or_mapped(file: Path) -> None:
    cold(file)
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    for _ in range(3):
        read(file, 0, huge_pages(SIZE))
        read(file, 0, huge_pages(SIZE, 1))
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before
    assert str(file) not in Path("/proc/self/maps").read_text()


def test_huge_pages_begin_where_they_are_asked_to() -> None:
    for offset in (0, 1, 4096, 12345):
        memory = huge_pages(3 * 2**20, offset)
        assert len(memory) == 3 * 2**20 and address(memory) % uncached.HUGE_PAGE_BYTES == offset
        memory[0] = memory[-1] = 1
