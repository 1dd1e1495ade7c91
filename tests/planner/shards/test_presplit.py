"""Splitting checkpoints: every byte where torch's slicing puts it, complete files or nothing."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autotp_plan.planner import SpecFile, compile_plan, presplit
from autotp_plan.planner.copying import copy_engine
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, MismatchError, OptionError, OutputError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.manifest import (
    INDEX_COPY_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    FileOwner,
    Manifest,
    Owner,
)
from autotp_plan.schemas.storage import checkpoint
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, read_header
from tests.helpers.checkpoints import write_llama

SPEC = SpecFile.from_dict(
    {
        "layer_specs": [
            {"patterns": [r"qkv\.weight$"], "shape": [[16, 8, 8], -1], "unit": 4},
            {"patterns": [r"o\.weight$"], "partition_type": "row", "unit": 4},
            {"patterns": [r"gate_up\.weight$"], "shape": [2, -1]},
            {"patterns": [r"down\.weight$"], "partition_type": "row"},
            {"patterns": [r"experts\.up$"], "partition_dim": 1, "shape": [-1, 2, -1]},
            {"patterns": [r"viewed\.weight$"], "shape": [3, -1, 5], "partition_dim": 1},
            {"patterns": [r"odd\.weight$"], "partition_type": "vocab", "indivisible": "uneven"},
            {"patterns": [r"kept\.weight$"], "partition_type": "skip"},
        ]
    }
)  # fmt: skip
SHAPES = {
    "qkv.weight": (32, 6), "qkv.bias": (32,), "o.weight": (6, 16), "o.bias": (6,), "gate_up.weight": (24, 6),
    "down.weight": (6, 12), "experts.up": (3, 8, 5), "viewed.weight": (24, 5), "odd.weight": (11, 3),
    "kept.weight": (4, 4), "norm.weight": (6,), "scalar": (), "empty": (0,),
}  # fmt: skip
DTYPES = {
    "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "float8": torch.float8_e4m3fn,
    "mixed": torch.bfloat16,
}  # fmt: skip


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    size = torch.empty(shape, dtype=dtype)
    raw = torch.randint(256, (size.numel() * size.element_size(),), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def expected(tensors: dict[str, torch.Tensor], rank: int, tp_size: int = 2) -> dict[str, torch.Tensor]:
    """One rank's shards by torch's slicing; a plain restatement of SPEC that knows no intervals."""

    def part(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor.view(torch.uint8 if tensor.element_size() == 1 else tensor.dtype).chunk(tp_size, dim)[rank]

    def parts(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> torch.Tensor:
        tensor = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        return torch.cat([part(piece, dim) for piece in tensor.split(sizes, dim)], dim)

    viewed = tensors["viewed.weight"]
    return {
        "qkv.weight": parts(tensors["qkv.weight"], [16, 8, 8]),
        "qkv.bias": parts(tensors["qkv.bias"], [16, 8, 8]),
        "o.weight": part(tensors["o.weight"], 1),
        "gate_up.weight": parts(tensors["gate_up.weight"], 12),
        "down.weight": part(tensors["down.weight"], 1),
        "experts.up": parts(tensors["experts.up"], 4, 1),
        "viewed.weight": part(viewed.reshape(3, 8, 5), 1).reshape(12, 5),
        "odd.weight": tensors["odd.weight"][[slice(0, 6), slice(6, 11)][rank]],
    }


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=list(DTYPES))
def tensors(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    made = {
        name: random_tensor(shape, DTYPES[request.param], seed) for seed, (name, shape) in enumerate(SHAPES.items())
    }
    if request.param == "mixed":
        made["o.weight"] = random_tensor(SHAPES["o.weight"], torch.float64, 50)
        made["odd.weight"] = random_tensor(SHAPES["odd.weight"], torch.uint8, 51)
    return made


@pytest.fixture
def folder(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A checkpoint of three files with the files that usually lie next to it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for part in range(3):
        file_name = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names[part::3], file_name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "tokenizer.json", "generation_config.json", "chat template (old).jinja"):
        (folder / name).write_text("{}")
    for name in ("pytorch_model.bin", ".hidden", MANIFEST_NAME, "extra.safetensors", "bad\nname"):
        (folder / name).write_text("not copied")
    (folder / "sub").mkdir()
    return folder


@pytest.fixture
def plan(folder: Path) -> Plan:
    return compile_plan(folder, tp_size=2, preset="none", specs=[SPEC])


@pytest.fixture(params=[None, 16, 100, 700], ids=lambda size: f"chunks of {size}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(copy_engine, "CHUNK_BYTES", request.param)
        monkeypatch.setattr(copy_engine, "MAX_OPEN", 1)


def read_files(output: Path, manifest: Manifest, owner: FileOwner) -> dict[str, tuple[str, list[int], bytes]]:
    """What safetensors itself reads from the files of an owner."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for file in manifest.files:
        if file.owner == owner and file.name.endswith(".safetensors"):
            with safe_open(output / file.name, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                    assert name not in found
                    tensor = opened.get_tensor(name)
                    found[name] = (opened.get_slice(name).get_dtype(), list(tensor.shape), raw_bytes(tensor))
    return found


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("max_file_bytes", [1 << 30, 300])
def test_every_byte_is_where_slicing_puts_it(
    tensors: dict[str, torch.Tensor], folder: Path, plan: Plan, tmp_path: Path, max_file_bytes: int
) -> None:
    output = tmp_path / "shards"
    steps: list[tuple[int, int]] = []
    manifest = presplit(plan, folder, output, max_file_bytes=max_file_bytes, progress=lambda *step: steps.append(step))
    for rank in range(2):
        wanted = expected(tensors, rank)
        found = read_files(output, manifest, rank)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name][1:] == (list(tensor.shape), raw_bytes(tensor)), f"{name} of rank {rank}"
    shared = read_files(output, manifest, Owner.ALL_RANKS)
    assert shared.keys() == SHAPES.keys() - expected(tensors, 0).keys()
    assert all(found[2] == raw_bytes(tensors[name]) for name, found in shared.items())
    parts = [file.name for file in manifest.files if file.owner == 0]
    assert (len(parts) > 1) == (max_file_bytes == 300)
    copied = sum(file.size for file in manifest.files if file.owner is None and file.name != PLAN_NAME)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + copied
    assert steps[-1] == (total, total)
    assert sum(step[0] == total for step in steps) == 1, "every source byte is read once"


def test_a_shards_folder_holds_all_that_training_needs(folder: Path, plan: Plan, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    manifest = presplit(plan, folder, output)
    assert Manifest.read(output) == manifest
    assert Plan.read(output / PLAN_NAME) == plan
    assert manifest.plan == plan.fingerprint
    names = {path.name for path in output.iterdir()}
    assert names == {file.name for file in manifest.files} | {MANIFEST_NAME}
    assert names == {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat template (old).jinja",
        INDEX_COPY_NAME,
        MANIFEST_NAME,
        PLAN_NAME,
        "shared.00001-of-00001.safetensors",
        "tp-00-of-02.00001-of-00001.safetensors",
        "tp-01-of-02.00001-of-00001.safetensors",
    }
    for file in manifest.files:
        data = (output / file.name).read_bytes()
        assert (file.size, file.crc32) == (len(data), f"{zlib.crc32(data):08x}")
        assert (file.owner is None) == (not file.name.endswith(".safetensors"))
        if file.owner is not None:
            header = read_header(output / file.name)
            assert header.metadata is not None
            assert header.metadata["autotp_plan"] == plan.fingerprint
            assert header.metadata["autotp_source"] == manifest.source.fingerprint
            itemsizes = [(t.stop - t.start) // max(1, __import__("math").prod(t.shape)) for t in header.tensors]
            assert all(t.start % max(1, size) == 0 for t, size in zip(header.tensors, itemsizes)), "aligned"
    assert [file.name for file in manifest.source.files] == [f"model-{part}.safetensors" for part in range(3)]
    for source in manifest.source.files:
        raw = source.header.encode()
        assert (folder / source.name).read_bytes().startswith(len(raw).to_bytes(8, "little") + raw)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Plan]:
    folder = write_llama(tmp_path / "llama", num_files=2)
    return folder, compile_plan(folder, tp_size=2)


def test_the_same_bytes_every_time(llama: tuple[Path, Plan], tmp_path: Path) -> None:
    folder, plan = llama
    (tmp_path / "b").mkdir()
    for name, workers in (("a", 1), ("b", 4)):
        presplit(plan, folder, tmp_path / name, workers=workers)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_files_of_a_single_rank_and_of_a_replicated_model(llama: tuple[Path, Plan], tmp_path: Path) -> None:
    folder, _ = llama
    skip = SpecFile.from_dict({"layer_specs": [{"patterns": [".*"], "partition_type": "skip"}]})
    manifest = presplit(compile_plan(folder, tp_size=2, specs=[skip], preset="none"), folder, tmp_path / "replicated")
    assert {file.owner for file in manifest.files} == {Owner.ALL_RANKS, None}
    manifest = presplit(compile_plan(folder, tp_size=1), folder, tmp_path / "one")
    assert {file.owner for file in manifest.files} == {Owner.ALL_RANKS, 0, None}


def refused(error: type[AutoTPError], plan: Plan, folder: Path, output: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        presplit(plan, folder, output, **options)
    return str(caught.value)


def test_a_folder_that_is_in_use_is_refused(llama: tuple[Path, Plan], tmp_path: Path) -> None:
    folder, plan = llama
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("keep")
    assert "a folder that is not empty" in refused(OutputError, plan, folder, output)
    assert "a file" in refused(OutputError, plan, folder, output / "precious")
    assert (output / "precious").read_text() == "keep"
    assert "a folder that is not empty" in refused(OutputError, plan, folder, folder)
    assert "Not a directory" in refused(OutputError, plan, folder, output / "precious" / "under")
    assert "File name too long" in refused(OutputError, plan, folder, output / ("x" * 300))
    assert "positive numbers" in refused(OptionError, plan, folder, tmp_path / "new", workers=0)
    assert not (tmp_path / "new").exists()


def test_another_checkpoint_is_refused(llama: tuple[Path, Plan], tmp_path: Path) -> None:
    _, plan = llama
    other = write_llama(tmp_path / "other", vocab_size=62)
    assert "a tensor is not what the plan says" in refused(MismatchError, plan, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_read_is_said(
    llama: tuple[Path, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = llama

    def pread(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    message = refused(CheckpointError, plan, folder, tmp_path / "out")
    assert "the checkpoint cannot be read" in message and "Input/output error" in message
    assert not (tmp_path / "out").exists()


def test_headers_are_read_once(llama: tuple[Path, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plan = llama
    read: list[str] = []

    def counted(path: Path) -> SafetensorsFile:
        read.append(path.name)
        return read_header(path)

    monkeypatch.setattr(checkpoint, "read_header", counted)
    presplit(plan, folder, tmp_path / "out")
    assert sorted(read) == sorted(path.name for path in folder.glob("*.safetensors"))


def test_short_writes_and_reads_are_finished(
    llama: tuple[Path, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = llama
    presplit(plan, folder, tmp_path / "a")
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: pwrite(fd, bytes(views[0][:5]), at))
    presplit(plan, folder, tmp_path / "b")
    assert Manifest.read(tmp_path / "a") == Manifest.read(tmp_path / "b")


def test_a_file_that_shrinks_while_it_is_read(
    llama: tuple[Path, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = llama
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    assert "it changed while it was read" in refused(OutputError, plan, folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL_NAME]
