"""Hostile and broken files of `torch.save`: refused with a reason; nothing in them is run, and little is allocated."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.files import Reader, Span
from autotp_plan.sources.torch_files.torch_file import read_torch_file

SOUND = {"a": torch.arange(6).view(2, 3), "b": torch.ones(4)}
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def refused(path: Path) -> Fault:
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path, "model.safetensors")
    (fault,) = caught.value.faults
    assert str(path) in fault.where
    return fault


def archive(path: Path, data: bytes | None, **options: Any) -> Path:
    """A zip like torch's with `data` as its pickle, and a storage of four float32."""
    with zipfile.ZipFile(path, "w") as opened:
        if data is not None:
            opened.writestr("archive/data.pkl", data, **options)
        opened.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4), **options)
        opened.writestr("archive/version", "3\n")
    return path


def tensor(
    offset: bytes = b"K\x00", shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", name: bytes = b"w"
) -> bytes:
    """The pickle of a dict with one tensor."""
    return (
        b"\x80\x02}X" + struct.pack("<I", len(name)) + name + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE + offset + shape + stride + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_the_hand_made_file_is_sound_where_nothing_is_wrong(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.bin", tensor())
    assert torch.load(path, weights_only=True)["w"].tolist() == [1, 2, 3, 4]
    found = read_torch_file(path, "model.safetensors")
    data = bytearray(16)
    with Reader() as reader:
        found.path.read_into(memoryview(data), [Span(found.size - 16, 16)], reader)  # type: ignore[union-attr]
    assert struct.unpack("<4f", data) == (1, 2, 3, 4)


@pytest.mark.parametrize("wrapped", [lambda it: it, lambda it: {"w": it}, lambda it: {**SOUND, "z": [it]}])
def test_code_is_not_run(tmp_path: Path, wrapped: Callable[[Any], Any]) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(wrapped(Runs(tmp_path / "ran")), path)
    fault = refused(path)
    assert (fault.code, fault.got) == ("torch-file-needs-code", "posix.mkdir")
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\nX\x04\x00\x00\x00true\x85R.",  # as os.system("true")
        b"(X\x04\x00\x00\x00trueios\nsystem\n.",  # INST
        b"cbuiltins\neval\n)\x81.",  # NEWOBJ
        b"\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",  # OBJ
        b"\x82\x01.",  # an extension
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",  # state for a function
        b"ctorch.hub\nload\n.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"P0\n.",  # a reference in text
    ],
)
def test_no_opcode_reaches_code(tmp_path: Path, opcodes: bytes) -> None:
    assert refused(archive(tmp_path / "a.bin", b"\x80\x02" + opcodes)).code == "torch-file-needs-code"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b".",
        b"\x80\x02.",
        b"\x80\x02}",
        b"\xff\xff",
        b"\x80\x02h\x00.",
        b"\x80\x02t.",
        b"\x80\x02s.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02K\x01K\x02e.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02K\x01K\x01R.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02\x85.",
        b"\x80\x02(K\x01\x86.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n]K\x01a\x85R.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x85R.",
        tensor(stride=b")"),
        tensor(shape=b"K\x04"),
        tensor(offset=b"N"),
        tensor(shape=b"J\xff\xff\xff\xff\x85"),
        tensor(stride=b"J\xff\xff\xff\xff\x85"),
        tensor(offset=b"\x8a\x09" + b"\xff" * 8 + b"\x00"),
        tensor(name=b"__metadata__"),
        tensor(name=b"\xed\xa0\x80"),
        tensor().replace(STORAGE, b"K\x01"),
        tensor().replace(b"X\x01\x00\x00\x000X", b"K\x00X"),
        tensor().replace(b"\x07\x00\x00\x00storage", b"\x07\x00\x00\x00storaga"),
        tensor()[:-20],
    ],
)
def test_broken_pickles(tmp_path: Path, data: bytes) -> None:
    assert refused(archive(tmp_path / "a.bin", data)).code == "broken-torch-file"


@pytest.mark.parametrize(
    "data",
    [
        tensor(offset=b"K\x01"),
        tensor(shape=b"K\x05\x85"),
        tensor(stride=b"K\x02\x85"),
        tensor(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"),
        tensor().replace(b"X\x01\x00\x00\x000X", b"X\x01\x00\x00\x001X"),
        tensor().replace(b"X\x01\x00\x00\x000X", b"X\x06\x00\x00\x00../../X"),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path: Path, data: bytes) -> None:
    assert refused(archive(tmp_path / "a.bin", data)).code == "broken-torch-file"


def test_a_tensor_that_repeats_a_few_bytes_for_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"w": torch.ones(1).expand(2**40)}, path)
    assert refused(path).code == "torch-tensor-kind"
    torch.save({"w": torch.ones(1).expand(2**30, 2**30)}, path)
    assert refused(path).code == "torch-tensor-kind"


@pytest.mark.parametrize(
    "value",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.zeros(2, dtype=torch.complex128),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.zeros(2, dtype=torch.complex64).conj(),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds(tmp_path: Path, value: Callable[[], Any]) -> None:
    torch.save({"w": value()}, tmp_path / "a.bin")
    assert refused(tmp_path / "a.bin").code == "torch-tensor-kind"


@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], {"model": {"w": torch.ones(2)}}, {1: torch.ones(2)},
                                   {"w": torch.ones(2), "step": 3}, {"w": "text"}, {"w": None}, 7])  # fmt: skip
def test_what_is_no_dict_of_tensors(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "a.bin")
    assert refused(tmp_path / "a.bin").code == "torch-file-of-other-things"


def test_legacy_files_are_told_from_broken_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(SOUND, path, _use_new_zipfile_serialization=False)
    assert refused(path).code == "legacy-torch-file"
    path.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    assert refused(path).code == "legacy-torch-file"
    assert not (tmp_path / "ran").exists()
    with tarfile.open(path, "w") as opened:
        opened.add(__file__, "pickle")
    for data in (
        path.read_bytes(),
        b"",
        b"P",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\0" * 100,
        b"PK\x05\x06" + bytes(18),
    ):
        path.write_bytes(data)
        assert refused(path).code == "broken-torch-file"


def test_what_is_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.bin").got == "No such file or directory"
    (tmp_path / "folder.bin").mkdir()
    assert refused(tmp_path / "folder.bin").got == "no regular file"
    os.mkfifo(tmp_path / "pipe.bin")
    assert refused(tmp_path / "pipe.bin").got == "no regular file"


def test_members_of_the_zip_that_are_not_torch_s(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert "compressed" in refused(archive(path, tensor(), compress_type=zipfile.ZIP_DEFLATED)).got
    assert refused(archive(path, None)).got == "a zip file with no data.pkl"
    with zipfile.ZipFile(path, "w") as opened:
        for name in ("a", "b"):
            opened.writestr(f"{name}/data.pkl", tensor())
    assert refused(path).got == "a zip file with several data.pkl"
    with zipfile.ZipFile(path, "w") as opened, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            opened.writestr("a/data.pkl", tensor())
    assert refused(path).got == "two members of one name in the zip file"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a/data.pkl", tensor())
        opened.writestr("a/byteorder", "big")
    assert refused(path).code == "torch-tensor-kind"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a/data.pkl", b"N" * (17 << 20))
    assert refused(path).got == f"data.pkl of {17 << 20} bytes"


def test_a_zip_whose_directory_lies(tmp_path: Path) -> None:
    """Sizes and places that are not in the file, also of 2**63."""
    sound = archive(tmp_path / "a.bin", tensor()).read_bytes()
    entry = sound.index(b"PK\x01\x02", sound.index(b"PK\x01\x02") + 1)  # of data/0
    assert sound[entry + 46 :].startswith(b"archive/data/0")
    for at, value in ((20, 2**31), (24, 2**31), (42, 2**31), (42, len(sound) - 5), (42, 1), (10, 8), (8, 1)):
        data = bytearray(sound)
        data[entry + at : entry + at + (4 if at > 10 else 2)] = value.to_bytes(4 if at > 10 else 2, "little")
        if at == 24:  # both sizes, so that it does not look compressed
            data[entry + 20 : entry + 24] = data[entry + 24 : entry + 28]
        path = tmp_path / "b.bin"
        path.write_bytes(data)
        assert refused(path).code == "broken-torch-file", at
    end = sound.index(b"PK\x05\x06")
    for at, value in ((12, 2**31), (16, 2**31), (16, 0), (12, 0xFFFFFFFF), (16, 0xFFFFFFFF)):
        data = bytearray(sound)
        data[end + at : end + at + 4] = value.to_bytes(4, "little")
        path.write_bytes(data)
        assert refused(path).code == "broken-torch-file", at


@pytest.mark.timeout(120)
def test_random_damage_never_ends_in_anything_else(tmp_path: Path) -> None:
    random = Random(0)
    path = tmp_path / "a.bin"
    torch.save(SOUND, path)
    sound = path.read_bytes()
    directory = sound.index(b"PK\x01\x02")
    pickled = sound.index(b"\x80\x02")
    outcomes = {"sound": 0, "refused": 0}
    for _ in range(600):
        data = bytearray(sound)
        for _ in range(random.randint(1, 4)):
            low, high = random.choice(((0, len(data)), (directory, len(data)), (pickled, pickled + 300)))
            data[random.randrange(low, high)] = random.choice((0, 1, 255, random.randrange(256)))
        if random.random() < 0.1:
            data = data[: random.randrange(len(data))]
        path.write_bytes(data)
        try:
            found = read_torch_file(path, "model.safetensors")
            target = bytearray(found.size)
            with Reader() as reader:
                found.path.read_into(memoryview(target), [Span(0, found.size)], reader)  # type: ignore[union-attr]
            outcomes["sound"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


LIMITED = """
import resource, sys
from pathlib import Path
from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.sources.torch_files.torch_file import read_torch_file
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try:
    read_torch_file(Path(sys.argv[1]), "model.safetensors")
except CheckpointError as error:
    print(error.faults[0].code)
"""


@pytest.mark.parametrize("kind", ["memo", "long bytes", "directory", "stack"])
def test_little_memory_is_taken(tmp_path: Path, kind: str) -> None:
    """A place in the memo of 2**32 (Python's own unpickler fills it), bytes of 2**60, a directory of 1 GB, a stack."""
    path = tmp_path / "a.bin"
    if kind == "directory":
        with path.open("wb") as opened:
            opened.write(b"PK\x03\x04")
            opened.seek(2**30)
            opened.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**30 - 4, 4, 0))
    else:
        bomb = {
            "memo": b"\x80\x02}r\xfe\xff\xff\xff.",
            "long bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".",
            "stack": b"\x80\x02" + b"}" * (10 << 20) + b".",
        }
        archive(path, bomb[kind])
    before = resource.getrlimit(resource.RLIMIT_AS)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(300 << 20)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    expected = {"memo": ""}.get(kind, "broken-torch-file")
    assert (done.stdout.strip(), done.stderr) == (expected, ""), done
