"""`.bin` files on the hub: their directory and pickle are read from there, tensors in ranges."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from autotp_plan.planner import compile_plan, convert, presplit
from autotp_plan.schemas.errors import CheckpointError
from tests.helpers.checkpoints import write_llama
from tests.helpers.hub_client import loopback_hub, point_to
from tests.helpers.hub_server import HubServer, Repository, folder_files
from tests.sources.test_folder_kinds import tensors_in, write_bin
from tests.sources.torch_files.test_torch_file import raw


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with loopback_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.mark.parametrize("files", [1, 3])
def test_bin_files_far_away_are_those_of_the_folder(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """With matrices that are stored transposed: on the hub, on a web server, and in the hub's cache."""
    folder = write_llama(tmp_path / "llama", hidden_size=256, intermediate_size=512)
    tensors = tensors_in(folder)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].t().contiguous().t()
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    write_bin(folder, tensors, files)
    hub.repositories["org/llama"] = Repository(folder_files(folder))
    plan = compile_plan("org/llama", tp_size=2)
    local = compile_plan(folder, tp_size=2)
    assert plan.fingerprint == local.fingerprint and plan.notes == local.notes
    presplit(local, "org/llama", tmp_path / "shards")
    presplit(local, folder, tmp_path / "expected")
    for path in (tmp_path / "expected").iterdir():
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes(), path.name
    convert("org/llama", tmp_path / "converted")
    found: Any = tensors_in(tmp_path / "converted")
    assert all(raw(found[name]) == raw(value) for name, value in tensors.items())
    assert compile_plan(f"{hub.url}/files/org/llama", tp_size=2) == local, "a folder of a web server"
    huggingface_hub.snapshot_download("org/llama")
    point_to("http://127.0.0.1:9", tmp_path / "cache", monkeypatch, offline=True)
    assert compile_plan("org/llama", tp_size=2).fingerprint == local.fingerprint, "the cache"


def test_safetensors_are_preferred_there_too_and_the_others_named(hub: HubServer, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", num_files=2)
    local = compile_plan(folder, tp_size=2)
    write_bin(folder, {"other": torch.ones(2)})
    shutil.copy(folder / "pytorch_model.bin", folder / "consolidated.00.pth")
    hub.repositories["org/llama"] = Repository(folder_files(folder))
    plan = compile_plan("org/llama", tp_size=2)
    assert plan.parameters == local.parameters
    assert [note for note in plan.notes if note not in local.notes] == [
        "The weights are read from model.safetensors.index.json, as from_pretrained does. "
        "Not read: consolidated.00.pth, pytorch_model.bin."
    ]


def test_a_hostile_file_there_is_refused(hub: HubServer, tmp_path: Path) -> None:
    from tests.sources.torch_files.test_hostile_torch_files import Runs

    folder = write_llama(tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    torch.save({"w": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    hub.repositories["org/llama"] = Repository(folder_files(folder))
    with pytest.raises(CheckpointError, match="would run code that is in it"):
        compile_plan("org/llama", tp_size=2)
    assert not (tmp_path / "ran").exists()
