"""Byte ranges are one string of bytes, and are read as such, whatever the files, buffers and short reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import ByteRange, Reader
from autotp_plan.schemas.storage.safetensors_header import TensorEntry

PLACES = st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=8)


def entries(places: list[tuple[str, int, int]]) -> Iterator[TensorEntry]:
    for name, (file, start, size) in zip("abcdefgh", places):
        yield TensorEntry(name=name, dtype="U8", shape=(size,), file=Path(file), start=start, stop=start + size)


@given(PLACES)
def test_a_slice_is_the_bytes_one_after_the_other(places: list[tuple[str, int, int]]) -> None:
    ranges = ByteRanges.of(list(entries(places)))
    each = [(file, start + byte) for file, start, size in places for byte in range(size)]
    assert ranges.size == len(each)
    for start in range(len(each) + 1):
        for length in range(len(each) - start + 1):
            sliced = list(ranges.slice(start, length))
            found = [(str(file), at + byte) for file, at, count in sliced for byte in range(count)]
            assert found == each[start : start + length]
            assert all(part.length > 0 for part in sliced)


def test_tensors_that_touch_are_one_range() -> None:
    ranges = ByteRanges.of(list(entries([("x", 10, 4), ("x", 14, 6), ("y", 20, 2), ("x", 22, 1)])))
    assert ranges.ranges == (
        ByteRange(Path("x"), 10, 10), ByteRange(Path("y"), 20, 2), ByteRange(Path("x"), 22, 1)
    )  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=PLACES, buffer_bytes=st.integers(1, 9), max_open=st.integers(1, 2), at_once=st.integers(1, 9))
def test_what_is_read_is_what_the_files_hold(
    tmp_path: Path, places: list[tuple[str, int, int]], buffer_bytes: int, max_open: int, at_once: int
) -> None:
    contents = {"x": bytes(range(20)), "y": bytes(range(100, 120))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    ranges = [ByteRange(tmp_path / file, start, length) for file, start, length in places]
    wanted = b"".join(contents[file][start : start + length] for file, start, length in places)
    preadv = os.preadv
    with pytest.MonkeyPatch.context() as patch, Reader(max_open=max_open) as reader:
        patch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:at_once]], at))
        target = bytearray(len(wanted))
        reader.read_into(memoryview(target), ranges)
        assert target == wanted
        read = [bytes(data) for data in reader.read_through(memoryview(bytearray(buffer_bytes)), ranges)]
        assert b"".join(read) == wanted
        assert all(len(data) == buffer_bytes for data in read[:-1])
        assert len(reader._open) <= max_open
    assert not reader._open


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    with Reader() as reader, pytest.raises(EOFError, match="x ended 2 bytes early"):
        reader.read_into(memoryview(bytearray(6)), [ByteRange(tmp_path / "x", 1, 6)])


def test_a_link_is_followed_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    target = memoryview(bytearray(5))
    with Reader() as reader:
        reader.read_into(target, [ByteRange(tmp_path / "link", 0, 5)])
    assert bytes(target) == b"12345"
    with Reader(follow_links=False) as reader, pytest.raises(OSError, match="link"):
        reader.read_into(target, [ByteRange(tmp_path / "link", 0, 5)])
