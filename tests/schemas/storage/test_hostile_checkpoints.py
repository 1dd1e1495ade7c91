"""Hostile and broken checkpoints: refused with a reason, before anything large is read or allocated."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.schemas.errors import AutoTPError, CheckpointError, DocumentError
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.storage.checkpoint import config_hash, read_checkpoint, read_config
from autotp_plan.schemas.storage.safetensors_header import BITS, header_bytes, num_bytes, read_header, runs
from tests.helpers.checkpoints import tensor_bytes, write_checkpoint, write_file

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: int = 24, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data))
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    (fault,) = caught.value.faults
    assert str(path) in fault.where
    return f"{fault.what}: {fault.got}"


def test_headers_of_sound_files_are_read(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a", {"b": ("BF16", (2, 3)), "é": ("U8", ()), "empty": ("F64", (0, 4))})
    file = read_header(path)
    assert {(t.name, t.dtype, t.shape, t.stop - t.start) for t in file.tensors} == {
        ("b", "BF16", (2, 3), 12), ("é", "U8", (), 1), ("empty", "F64", (0, 4), 0)
    }  # fmt: skip
    entry = next(t for t in file.tensors if t.name == "b")
    assert path.read_bytes()[entry.start : entry.stop] == tensor_bytes("b", "BF16", (2, 3))
    assert file.metadata == {"format": "pt"}
    assert read_header(write(tmp_path / "c", {"w": F32})).metadata is None
    assert read_header(write(tmp_path / "d", {}, data=0)).tensors == ()


def test_headers_are_safetensors_own(tmp_path: Path) -> None:
    """safetensors reads what we write, and we read what it writes."""
    from safetensors import safe_open

    path = write_file(tmp_path / "a", {name: (name, (3, 2)) for name in BITS if not name.startswith("F8_E8")})
    with safe_open(path, "np") as opened:
        assert set(opened.keys()) == {t.name for t in read_header(path).tensors}
        assert opened.get_slice("BF16").get_shape() == [3, 2]
    assert len(header_bytes([("w", "F32", [1])], {})) % 8 == 0


@pytest.mark.parametrize(
    ("header", "data", "length", "reason"),
    [
        (b"", 0, 10, "a header of 10 bytes in a file of 8"),
        (b"{}", 0, 2**63, "bytes in a file of 10"),
        (b"{}", 0, 2**64 - 1, "bytes in a file of 10"),
        (b"{}", 0, 3, "a header of 3 bytes"),
        ({"w": F32}, 23, None, "the header accounts for"),
        ({"w": F32}, 25, None, "the header accounts for"),
        (b'{"w":', 0, None, "a header that is not JSON"),
        (b"\xff\xff", 0, None, "a header that is not JSON"),
        (b"[" * 50_000, 0, None, "a header that is not JSON"),
        (b"[]", 0, None, "not a JSON object"),
        (b'{"w": 1, "w": 2}', 0, None, "the key 'w' appears twice"),
        (b'{"\\ud800": 1}', 0, None, "surrogate"),
        ({"__metadata__": []}, 0, None, "__metadata__ that is not strings"),
        ({"__metadata__": {"a": 1}}, 0, None, "__metadata__ that is not strings"),
        ({"w": 1}, 0, None, "no dtype, shape and data_offsets for w"),
        ({"w": {"dtype": "F32", "shape": [1]}}, 4, None, "no dtype, shape and data_offsets for w"),
        ({"w": {**F32, "data_offsets": [0]}}, 24, None, "no dtype, shape and data_offsets for w"),
        ({"w": {**F32, "data_offsets": [0, 1, 2]}}, 24, None, "no dtype, shape and data_offsets for w"),
        ({"w": {**F32, "data_offsets": 3}}, 24, None, "no dtype, shape and data_offsets for w"),
        ({"w": {**F32, "dtype": "F4"}}, 24, None, "a dtype that cannot be cut: F4"),
        ({"w": {**F32, "dtype": ["F32"]}}, 24, None, "a dtype that cannot be cut: ['F32']"),
        ({"w": {**F32, "dtype": None}}, 24, None, "a dtype that cannot be cut: None"),
        ({"w": {**F32, "shape": [2, -3]}}, 24, None, "not a list of sizes"),
        ({"w": {**F32, "shape": [2, 3.0]}}, 24, None, "not a list of sizes"),
        ({"w": {**F32, "shape": [2, True]}}, 24, None, "not a list of sizes"),
        ({"w": {**F32, "shape": "23"}}, 24, None, "not a list of sizes"),
        ({"w": {**F32, "shape": {"2": 3}}}, 24, None, "not a list of sizes"),
        ({"w": {**F32, "shape": [2**62, 2**62]}}, 24, None, "24 bytes for w"),
        ({"w": {**F32, "shape": [2**63]}}, 24, None, "not a list of sizes"),
        ({"w": {**F32, "data_offsets": [24, 0]}}, 24, None, "-24 bytes for w"),
        ({"w": {**F32, "data_offsets": ["0", "24"]}}, 24, None, "not a list of sizes"),
        ({"w": {**F32, "data_offsets": [8, 32]}}, 32, None, "w begins at byte"),
        ({"a": F32, "b": F32}, 48, None, "b begins at byte"),
        ({"a": F32, "b": {**F32, "data_offsets": [20, 44]}}, 44, None, "b begins at byte"),
        ({"a": F32, "b": {**F32, "data_offsets": [28, 52]}}, 52, None, "b begins at byte"),
    ],
)  # fmt: skip
def test_broken_safetensors_files_are_refused_with_the_reason(
    tmp_path: Path, header: Any, data: int, length: int | None, reason: str
) -> None:
    assert reason in refused(write(tmp_path / "model.safetensors", header, data, length))


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = write_file(tmp_path / "a", {"w": ("F32", (2, 3)), "v": ("U8", (5,))}).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:size])
        refused(tmp_path / "b")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(tmp_path: Path, at: int, value: int) -> None:
    whole = bytearray(write_file(tmp_path / "a", {"w": ("F32", (2, 3)), "v": ("U8", (5,))}).read_bytes())
    whole[at % len(whole)] = value
    (tmp_path / "b").write_bytes(whole)
    with contextlib.suppress(CheckpointError):
        read_header(tmp_path / "b")


@settings(max_examples=300)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from(["U8", "BF16", "F64"]),
)
def test_runs_are_a_shards_bytes(shape: list[int], data: st.DataObject, dtype: str) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    edges = sorted({0, shape[dim], *data.draw(st.sets(st.integers(0, shape[dim])))})
    wanted = data.draw(st.lists(st.sampled_from(list(zip(edges, edges[1:]))), unique=True))
    layout = Layout(shape=tuple(shape), dim=dim, sub_parameters=(SubParameter(size=shape[dim], unit=1),))
    whole = tensor_bytes("w", dtype, shape)
    found = b"".join(whole[offset : offset + count] for offset, count in runs(layout, wanted, dtype))
    itemsize = BITS[dtype] // 8
    by_hand = b""
    for index in range(num_bytes(dtype, shape[:dim]) // itemsize):
        inner = num_bytes(dtype, shape[dim + 1 :])
        for start, stop in wanted:
            by_hand += whole[(index * shape[dim] + start) * inner : (index * shape[dim] + stop) * inner]
    assert found == by_hand


# the index


def write_index(folder: Path, weight_map: Any) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["..", ".", "", "../a.safetensors", "/etc/passwd", "sub/a", "a/../a", "a\0b", "a/"])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / "a.safetensors", {"w": ("U8", (1,))})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(write_index(tmp_path, {"w": name}))
    assert "which is not a file of this folder" in caught.value.faults[0].got


@pytest.mark.parametrize("weight_map", [None, [], "x", {"w": 1}, {"w": None}, {"w": ["a"]}])
def test_an_index_is_a_map_of_names(tmp_path: Path, weight_map: Any) -> None:
    with pytest.raises(CheckpointError, match="no weight_map of file names"):
        read_checkpoint(write_index(tmp_path, weight_map))


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    write_file(tmp_path / "a", {"one": ("U8", (1,)), "both": ("U8", (1,)), "extra": ("U8", (1,))})
    write_file(tmp_path / "b", {"two": ("U8", (1,)), "both": ("U8", (1,))})
    write_index(tmp_path, {"one": "a", "two": "a", "both": "b", "gone": "b"})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert [fault.got for fault in caught.value.faults] == [
        "extra, which the index does not name", "both, also in a", "gone, which is not in b", "two, which is not in a"
    ]  # fmt: skip
    write_index(tmp_path, {"one": "missing"})
    with pytest.raises(CheckpointError, match="No such file"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(DocumentError, match="appears twice"):
        read_checkpoint(tmp_path)


def test_folders_without_weights_say_what_is_there(tmp_path: Path) -> None:
    for path, got in ((tmp_path, "a folder without weights"), (tmp_path / "none", "no such folder")):
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert caught.value.faults[0].got == got
    (tmp_path / "pytorch_model.bin").touch()
    for path, got in ((tmp_path, "pytorch_model.bin"), (tmp_path / "pytorch_model.bin", "a file")):
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert caught.value.faults[0].got == got
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_checkpoint(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    """Download caches are folders of symbolic links."""
    write_file(tmp_path / "blob", {"w": ("U8", (1,))})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert list(read_checkpoint(tmp_path / "snapshot").tensors) == ["w"]


def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None
    for text in ("[]", "3", "{", '{"a": NaN}', '{"a": "\\ud800"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(AutoTPError):
            read_config(tmp_path)
    assert config_hash(None) is None
    assert config_hash({"a": 1, "dtype": "x"}) == config_hash({"a": 1}) != config_hash({"a": 2})


def test_tensors_of_many_files_are_found(tmp_path: Path) -> None:
    shapes = {f"w{number}": (number + 1, 2) for number in range(40)}
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, shapes, num_files=20))
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == shapes
    assert [file.path.name for file in checkpoint.files] == sorted(file.path.name for file in checkpoint.files)
