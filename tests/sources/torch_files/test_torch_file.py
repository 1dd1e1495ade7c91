"""Files of `torch.save` give the tensors that torch.load(weights_only=True) gives, in every byte range."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from autotp_plan.schemas.storage.files import ByteRange, Reader, Span
from autotp_plan.schemas.storage.safetensors_header import read_header
from autotp_plan.sources.torch_files.strided_bytes import copy_strided, is_contiguous
from autotp_plan.sources.torch_files.torch_file import read_torch_file

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def state_dict() -> dict[str, Tensor]:
    """Every dtype; views, shared memory, parameters, scalars, nothing."""
    torch.manual_seed(0)
    base = torch.randn(6, 10, dtype=torch.bfloat16)
    return {
        **{str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES},
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "window": base[1:4, 2:7],
        "row": base[2],
        "column": base[:, 3],
        "parameter": torch.nn.Parameter(torch.randn(3, 4)),
        "frozen": torch.nn.Parameter(torch.ones(2), False),
        "every third": torch.arange(20)[::3],
        "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "one row": torch.arange(4).expand(1, 4),
        "complex": torch.randn(3, 3).to(torch.complex64).t(),
        "repeated": torch.arange(7, dtype=torch.int16)[None].expand(3, 7),
        "columns": torch.randn(6, 1, 8).transpose(0, 2),
    }


def raw(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).numpy())


def read(path: Path, target: Path) -> tuple[Any, bytes]:
    """The view of a file of torch.save, and its bytes, which are also written to `target`."""
    found = read_torch_file(path, target.name)
    data = bytearray(found.size)
    with Reader() as reader:
        reader.read_into(memoryview(data), [ByteRange(found.path, 0, found.size)])
    target.write_bytes(data)
    return found, bytes(data)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("ordered", [False, True])
def test_tensors_are_those_of_torch_load(tmp_path: Path, protocol: int, ordered: bool) -> None:
    written: Any = state_dict()
    if ordered:  # as state_dict() of a module, with the versions of its modules
        written = torch.nn.Module().state_dict()
        written.update(state_dict())
        assert hasattr(written, "_metadata")
    path = tmp_path / "pytorch_model.bin"
    torch.save(written, path, pickle_protocol=protocol)
    found, _ = read(path, tmp_path / "model.safetensors")
    # torch itself reads other protocols than 2 only with code
    expected = torch.load(path, weights_only=True) if protocol == 2 else written
    loaded = load_file(tmp_path / "model.safetensors")
    assert list(loaded.keys() ^ expected.keys()) == []
    for name, value in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape), name
        assert raw(loaded[name]) == raw(value), name
    again = read_header(tmp_path / "model.safetensors")
    assert [(t.name, t.start, t.stop) for t in again.tensors] == [(t.name, t.start, t.stop) for t in found.tensors]
    assert again.metadata == {"format": "pt", "converted_from": "pytorch_model.bin"}


def test_any_bytes_in_any_order(tmp_path: Path) -> None:
    """Single spans, and several at once, also of header, tensors with gaps, and the end."""
    torch.save(state_dict(), tmp_path / "a.bin")
    found, data = read(tmp_path / "a.bin", tmp_path / "a.safetensors")
    random = Random(0)
    with Reader() as reader:
        for _ in range(300):
            spans = []
            for _ in range(random.randint(1, 6)):
                start = random.randrange(found.size)
                spans.append(Span(start, random.randint(0, min(found.size - start, random.choice((3, 40, 4000))))))
            target = bytearray(sum(length for _, length in spans))
            reader.read_into(memoryview(target), [ByteRange(found.path, *span) for span in spans])
            assert target == b"".join(data[start : start + length] for start, length in spans)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.permutations(range(4)), st.integers(0, 3), st.data(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_strided_bytes_are_those_of_the_contiguous_tensor(
    sizes: list[int], order: list[int], dtype: int, data: st.DataObject
) -> None:
    kind = (torch.uint8, torch.int16, torch.float32, torch.float64)[dtype]
    full = torch.arange(1000).to(kind)[: int(torch.tensor(sizes).prod())].view(sizes)
    view = full.permute([d for d in order if d < len(sizes)])
    if data.draw(st.booleans()):
        view = view[..., :: data.draw(st.integers(1, 3))]
    if data.draw(st.booleans()):
        view = view.unsqueeze(0).expand(2, *view.shape)
    expected = raw(view)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    target = bytearray(stop - start)
    storage = memoryview(raw(full))[view.storage_offset() * kind.itemsize :]
    copy_strided(memoryview(target), storage, kind.itemsize, view.shape, view.stride(), start)
    assert target == expected[start:stop]
    assert is_contiguous(view.shape, view.stride()) == view.is_contiguous()


def test_a_read_in_the_wrong_place_would_be_found(tmp_path: Path) -> None:
    """Planted: the comparison above fails for a tensor that is read from one element further on."""
    path = tmp_path / "a.bin"
    torch.save({"w": torch.arange(10)[:5]}, path)
    found, data = read(path, tmp_path / "a.safetensors")
    piece = found.path.pieces[0]
    with Reader() as reader:
        wrong = bytearray(40)
        reader.read_into(memoryview(wrong), [ByteRange(path, piece.begin + 8, 40)])
    assert data[-40:] == raw(torch.arange(5)) != bytes(wrong)


def test_files_of_other_programs(tmp_path: Path) -> None:
    """A name of the archive that is not the file's, a storage that begins before the tensor, and no byte order."""
    import zipfile

    path = tmp_path / "some name.bin"
    torch.save({"w": torch.arange(10)[3:7]}, path)
    path.rename(tmp_path / "other.bin")
    with zipfile.ZipFile(tmp_path / "other.bin") as old, zipfile.ZipFile(tmp_path / "new.bin", "w") as new:
        for info in old.infolist():
            if not info.filename.endswith(("byteorder", ".format_version", ".storage_alignment", "serialization_id")):
                new.writestr(info.filename, old.read(info))  # also without the alignment to 64 bytes
    for name in ("other.bin", "new.bin"):
        read(tmp_path / name, tmp_path / "out.safetensors")
        assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.arange(3, 7))


def test_many_tensors_are_read_fast_enough(tmp_path: Path) -> None:
    """Ten thousand tensors: a few operations for each, none for each byte."""
    import time

    one = torch.zeros(2)
    torch.save({f"model.layers.{i}.mlp.experts.{j}.weight": one for i, j in itertools.product(range(100), range(100))},
               tmp_path / "a.bin")  # fmt: skip
    started = time.monotonic()
    assert len(read_torch_file(tmp_path / "a.bin", "a.safetensors").tensors) == 10_000
    assert time.monotonic() - started < 20
