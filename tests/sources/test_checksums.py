"""presplit finds every byte that is not what the hub has a SHA-256 of, in whatever file of weights it is."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from autotp_plan.planner import Plan, compile_plan, presplit
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError, OutputError
from autotp_plan.schemas.storage.files import ByteRange, Reader, Span
from autotp_plan.sources.model_folder import ModelFolder
from autotp_plan.sources.torch_files.torch_file import read_torch_file
from autotp_plan.sources.torch_files.torch_view import TorchFile
from tests.helpers.checkpoints import write_llama
from tests.helpers.hub_client import loopback_hub, point_to
from tests.helpers.hub_server import HubServer, Repository, folder_files
from tests.sources.test_folder_kinds import tensors_in, write_bin
from tests.sources.test_hub_presplit import same_files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with loopback_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def fault_of(plan: Plan, place: Any, output: Path, **options: Any) -> Fault:
    """The one fault of a presplit, which leaves no manifest."""
    with pytest.raises(CheckpointError) as raised:
        presplit(plan, place, output, **options)
    (fault,) = raised.value.faults
    assert fault.code == "wrong-sha256"
    assert not (output / "autotp_shards.json").exists()
    return fault


def again(plan: Plan, place: Any, output: Path, expected: Path, **options: Any) -> None:
    """What the fault says is done, and completes the folder."""
    try:
        presplit(plan, place, output, **options)
    except OutputError as error:
        assert "another source" in str(error)
        shutil.rmtree(output)
        presplit(plan, place, output, **options)
    assert same_files(output, expected)


def flipped(data: bytes, at: int) -> bytes:
    wrong = bytearray(data)
    wrong[at] ^= 1
    return bytes(wrong)


def bin_folder(work: Path, files: int = 1) -> Path:
    """With a matrix that is stored transposed, and one that is in the file twice, under two names."""
    folder = write_llama(work / "llama", hidden_size=64, tie_word_embeddings=True)
    tensors = tensors_in(folder)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].t().contiguous().t()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    write_bin(folder, tensors, files)
    return folder


def places_in(path: Path) -> dict[str, int]:
    """Bytes of a `.bin` file: of tensors, and of what lies between them and no reader asks for."""
    view = read_torch_file(path, "model.safetensors")
    assert isinstance(view.path, TorchFile)
    pieces = {
        tensor.name: piece for tensor in view.tensors for piece in view.path.pieces if piece.start == tensor.start
    }
    with zipfile.ZipFile(path) as opened:
        infos = {info.filename.partition("/")[2]: info for info in opened.infolist()}
    return {
        "a row-parallel tensor": pieces["model.layers.0.self_attn.o_proj.weight"].begin + 77,
        "a small tensor": pieces["model.norm.weight"].begin + 1,
        "a transposed tensor": pieces["model.layers.0.mlp.up_proj.weight"].begin + 99,
        "a tensor with two names": pieces["model.embed_tokens.weight"].begin + 500,
        "padding before a tensor": pieces["model.norm.weight"].begin - 1,
        "a member that is not read": infos["version"].header_offset + 30 + len(infos["version"].filename) + 20,
        "the header of a member": infos["version"].header_offset + 10,
    }


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_any_byte_of_a_bin_file(hub: HubServer, tmp_path: Path, tp_size: int) -> None:
    folder = bin_folder(tmp_path)
    plan = compile_plan(folder, tp_size=tp_size, uneven=True)
    repository = hub.repositories["org/llama"] = Repository(folder_files(folder))
    name = "pytorch_model.bin"
    right = (folder / name).read_bytes()
    repository.digest(name)
    presplit(plan, folder, tmp_path / "local")
    places = places_in(folder / name)
    for number, (what, at) in enumerate(places.items()):
        if number % 4 not in (tp_size - 1, (tp_size + 1) % 4):
            continue
        repository.files[name] = flipped(right, at)
        output = tmp_path / f"shards-{number}"
        fault = fault_of(plan, "org/llama", output, workers=1 + number)
        assert fault.where == name, what
        repository.files[name] = right
        again(plan, "org/llama", output, tmp_path / "local")


@dataclasses.dataclass(eq=False)
class Unsteady:
    """A file far away; of the reads of byte `at` that with number `wrong` brings another."""

    path: Path
    at: int
    wrong: int = -1
    reads: int = 0

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        reader.read_into(target, [ByteRange(self.path, *span) for span in spans])
        for start, length in spans:
            if start <= self.at < start + length:
                if self.reads == self.wrong:
                    target[self.at - start] ^= 1
                self.reads += 1
            target = target[length:]


@pytest.mark.parametrize("what", ["a transposed tensor", "a tensor with two names"])
def test_bytes_that_are_wrong_once(tmp_path: Path, what: str) -> None:
    """Some bytes of a `.bin` file are read for the shards, and for the checksum again: both must be right."""
    folder = bin_folder(tmp_path)
    plan = compile_plan(folder, tp_size=2)
    presplit(plan, folder, tmp_path / "local")
    path = folder / "pytorch_model.bin"
    small = tmp_path / "small"
    small.mkdir()
    shutil.copy(folder / "config.json", small)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def run(wrong: int) -> tuple[int, bool]:
        """How often the byte was read, and whether that was refused."""
        file = Unsteady(path, places_in(path)[what] + (8 - 99 if what == "a transposed tensor" else 8 - 500), wrong)
        place = ModelFolder(given="far", folder=small, elsewhere={path.name: file}, sha256={path.name: digest})
        output = tmp_path / f"shards-{wrong}"
        try:
            presplit(plan, place, output, workers=1)
        except CheckpointError as error:
            assert error.faults[0].code == "wrong-sha256"
            return file.reads, True
        except MismatchError:  # two names of one tensor
            return file.reads, True
        assert same_files(output, tmp_path / "local"), "an error that nobody noticed"
        return file.reads, False

    reads, refused = run(-1)
    assert reads > 1 and not refused
    assert sum(run(wrong)[1] for wrong in range(reads)) >= 2


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("offline", [False, True])
def test_files_in_the_cache(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, offline: bool
) -> None:
    """A blob of the cache is called by its SHA-256. What the error proposes works."""
    folder = bin_folder(tmp_path) if kind == "bin" else write_llama(tmp_path / "llama", hidden_size=64)
    plan = compile_plan(folder, tp_size=2)
    hub.repositories["org/llama"] = Repository(folder_files(folder))
    name = "pytorch_model.bin" if kind == "bin" else "model.safetensors"
    huggingface_hub.snapshot_download("org/llama")
    if offline:
        point_to("http://127.0.0.1:9", tmp_path / "cache", monkeypatch, offline=True)
    presplit(plan, "org/llama", tmp_path / "shards")
    presplit(plan, folder, tmp_path / "local")
    assert same_files(tmp_path / "shards", tmp_path / "local")
    (blob,) = (path.resolve() for path in (tmp_path / "cache").rglob(name))
    blob.write_bytes(flipped(blob.read_bytes(), blob.stat().st_size * 2 // 3))
    fault = fault_of(plan, "org/llama", tmp_path / "wrong")
    assert fault.where == name and "cache" in fault.what
    found = re.match(r"remove (\S+), and run the command again", fault.next)
    assert found and Path(found[1]) == blob
    blob.unlink()
    if offline:
        point_to(hub.url, tmp_path / "cache", monkeypatch)
    again(plan, "org/llama", tmp_path / "wrong", tmp_path / "local")


def test_small_files_that_the_hub_has_a_checksum_of(hub: HubServer, tmp_path: Path) -> None:
    """Tokenizers are often such files."""
    folder = write_llama(tmp_path / "llama")
    (folder / "tokenizer.model").write_bytes(b"right" * 100)
    plan = compile_plan(folder, tp_size=2)
    repository = hub.repositories["org/llama"] = Repository(folder_files(folder))
    repository.digest("tokenizer.model")
    repository.files["tokenizer.model"] = b"wrong" * 100
    fault = fault_of(plan, "org/llama", tmp_path / "shards")
    assert fault.where == "tokenizer.model"
    (blob,) = (path.resolve() for path in (tmp_path / "cache").rglob("tokenizer.model"))
    assert str(blob) in fault.next
    blob.unlink()
    repository.files["tokenizer.model"] = b"right" * 100
    again(plan, "org/llama", tmp_path / "shards", folder_of(plan, folder, tmp_path / "local"))


def folder_of(plan: Plan, folder: Path, output: Path) -> Path:
    presplit(plan, folder, output)
    return output
