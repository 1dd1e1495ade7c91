"""A file's checksum is put together from those of its blocks, with isal and without."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autotp_plan.schemas.storage import checksum


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_blocks_in_any_order_have_the_checksum_of_all(contents: list[bytes]) -> None:
    data = b"".join(contents)
    blocks: list[checksum.Block] = []
    for content in contents:
        start = blocks[-1].start + blocks[-1].length if blocks else 0
        blocks.append(checksum.Block(start, len(content), checksum.of_bytes(content)))
    assert checksum.of_blocks(reversed(blocks), len(data)) == checksum.of_bytes(data) == zlib.crc32(data)


def test_a_block_that_is_missing_is_noticed() -> None:
    blocks = [checksum.Block(0, 3, 1), checksum.Block(4, 2, 2)]
    assert checksum.join_blocks(blocks) == blocks
    for size in (3, 6):
        with pytest.raises(AssertionError):
            checksum.of_blocks(blocks, size)


CRC = st.integers(0, 2**32 - 1)


@given(first=CRC, second=CRC, length=st.integers(0, 2**40))
@example(first=1, second=2, length=5 * 2**30)
def test_isal_and_our_fallback_give_the_same(first: int, second: int, length: int) -> None:
    isal_zlib = pytest.importorskip("isal.isal_zlib")
    assert checksum.combine is not checksum.combine_without_isal
    assert checksum.combine_without_isal(first, second, length) == isal_zlib.crc32_combine(first, second, length)
    assert checksum.combine(first, second, length) == isal_zlib.crc32_combine(first, second, length)


@given(first=st.binary(max_size=50), second=st.binary(max_size=50))
def test_the_fallback_is_the_checksum_of_both(first: bytes, second: bytes) -> None:
    crcs = zlib.crc32(first), zlib.crc32(second)
    assert checksum.combine_without_isal(*crcs, len(second)) == zlib.crc32(first + second)


def test_files_are_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "BLOCK_BYTES", 100)
    monkeypatch.setattr(checksum, "READ_BYTES", 7)
    sizes = {}
    for name, size in (("empty", 0), ("one", 99), ("more", 350)):
        (tmp_path / name).write_bytes(bytes(range(256))[:size] * 2)
        sizes[tmp_path / name] = size
    sizes[tmp_path / "short"] = 5
    (tmp_path / "short").write_bytes(b"1234")
    sizes[tmp_path / "missing"] = 1
    found = checksum.of_files(sizes)
    for path, size in sizes.items():
        if path.name == "short":
            assert isinstance(found[path], EOFError)
        elif path.name == "missing":
            assert isinstance(found[path], FileNotFoundError)
        else:
            assert found[path] == zlib.crc32(path.read_bytes()[:size])
