"""Models in a folder of a web server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.sources.model_folder import open_checkpoint
from autotp_plan.sources.transfer import http_file, persistence
from autotp_plan.sources.transfer.http_connections import close_kept
from tests.helpers.checkpoints import write_llama
from tests.helpers.hub_server import HubServer, Repository, Trouble, folder_files, hub_server


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(persistence, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    with hub_server() as server:
        yield server
        close_kept()


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("answers_ranges", [True, False])
def test_a_model_on_a_web_server(web: HubServer, tmp_path: Path, num_files: int, answers_ranges: bool) -> None:
    """One that always sends all of a file is good enough for small files."""
    web.answers_ranges = answers_ranges
    folder = write_llama(tmp_path / "llama", num_files=num_files)
    (folder / "tokenizer.json").write_text("{}")
    web.repositories["org/llama"] = Repository(folder_files(folder))
    place = f"{web.url}/files/org/llama"
    plan = compile_plan(place, tp_size=2)
    assert plan == compile_plan(folder, tp_size=2)
    presplit(plan, place + "/", tmp_path / "shards")
    presplit(plan, folder, tmp_path / "local")
    for path in (tmp_path / "local").iterdir():
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()


def test_what_a_web_server_refuses(web: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_llama(tmp_path / "llama")
    web.repositories["org/llama"] = Repository(folder_files(folder))
    place = f"{web.url}/files/org/llama"

    def code(place: str) -> str:
        with pytest.raises(CheckpointError) as raised:
            open_checkpoint(place)
        (fault,) = raised.value.faults
        assert fault.where.startswith(place)
        return fault.code

    assert code(f"{web.url}/files/org/nothing") == "web-no-model"
    web.trouble = lambda method, path: Trouble(403)
    assert code(place) == "access-refused"
    web.trouble = lambda method, path: Trouble(500)
    monkeypatch.setattr(persistence, "ATTEMPTS", 2)
    assert code(place) == "server-unreachable"
    web.trouble = lambda method, path: None
    monkeypatch.setattr(http_file, "MOST_SKIPPED", 1000)
    web.answers_ranges = False
    assert code(place) == "access-refused"


def test_the_proxy_of_the_environment(web: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_llama(tmp_path / "llama")
    web.repositories["org/llama"] = Repository(folder_files(folder))
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", web.url)
    assert open_checkpoint("http://nowhere.invalid/files/org/llama").tensors
    monkeypatch.setenv("no_proxy", "nowhere.invalid")
    monkeypatch.setattr(persistence, "ATTEMPTS", 1)
    close_kept()
    with pytest.raises(CheckpointError):
        open_checkpoint("http://nowhere.invalid/files/org/llama")


def test_a_file_that_changes_meanwhile(web: HubServer, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    files = folder_files(folder)
    web.repositories["org/llama"] = Repository(files)
    place = f"{web.url}/files/org/llama"
    checkpoint = open_checkpoint(place)
    files["model.safetensors"] = (folder / "model.safetensors").read_bytes() + b" "
    from autotp_plan.schemas.shards.origin import fingerprint_of

    with pytest.raises(CheckpointError, match="were asked for"):
        fingerprint_of(checkpoint)
