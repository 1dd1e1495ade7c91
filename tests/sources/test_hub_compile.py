"""Plans of models on the hub: headers alone are read; what is refused; and what the cache is good for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotp_plan.planner import Plan, check_checkpoint, compile_plan
from autotp_plan.planner.plan_table import describe
from autotp_plan.schemas.errors import AutoTPError, CheckpointError
from autotp_plan.sources.model_folder import model_folder, open_checkpoint
from autotp_plan.sources.transfer import persistence
from tests.dequantize.test_published import MODELS
from tests.helpers.checkpoints import write_llama
from tests.helpers.hub_client import loopback_hub, point_to
from tests.helpers.hub_server import HubServer, Repository, Trouble, folder_files
from tests.helpers.paths import PACKAGE
from tests.helpers.sparse import planned_tensors, write_sparse_checkpoint

COMMIT = "c" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with loopback_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def publish(hub: HubServer, folder: Path, name: str = "org/llama", prefix: str = "") -> Repository:
    hub.repositories[name] = Repository(folder_files(folder, prefix))
    return hub.repositories[name]


def sparse(folder: Path, plan_file: Path, num_files: int) -> Plan:
    """A checkpoint of holes for a plan of ours."""
    plan = Plan.read(plan_file)
    folder.mkdir()
    config = json.loads((plan_file.parent / "config.json").read_text())
    write_sparse_checkpoint(folder, config, planned_tensors(plan), num_files)
    return plan


def fault(place: str) -> tuple[str, str]:
    """Code and text of the fault of a place."""
    with pytest.raises(AutoTPError) as raised:
        open_checkpoint(place)
    (found,) = raised.value.faults
    assert found.where.startswith((place, "hf://"))
    return found.code, str(found)


def test_a_plan_of_a_hub_id_is_that_of_the_folder(hub: HubServer, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", num_files=3)
    publish(hub, folder)
    publish(hub, folder, "org/nested", "sub/folder/")
    local = compile_plan(folder, tp_size=2)
    plan = compile_plan("org/llama", tp_size=2)
    nested = compile_plan("hf://org/nested@main/sub/folder", tp_size=2)
    assert str(plan.model.repository) == f"hf://org/llama@{COMMIT}"
    assert str(nested.model.repository) == f"hf://org/nested@{COMMIT}/sub/folder"
    for found in (plan, nested):
        assert found.fingerprint == local.fingerprint
        assert dataclasses.replace(found, model=local.model) == local
        assert Plan.from_dict(json.loads(found.to_json())) == found
    assert plan.to_json() == compile_plan(f"org/llama@{COMMIT}", tp_size=2).to_json(), "the commit, not the branch"
    assert f"compiled from hf://org/llama@{COMMIT}" in describe(plan)
    assert check_checkpoint(local, "org/llama") == []
    assert check_checkpoint(plan, folder) == []


def test_a_plan_of_70b_parameters_takes_less_than_half_a_megabyte(hub: HubServer, tmp_path: Path) -> None:
    expected = sparse(tmp_path / "70b", PACKAGE / "plans" / "llama_3_1_70b" / "tp8.json", 30)
    files = publish(hub, tmp_path / "70b").files
    hub.repositories["org/llama"].sha256 = dict.fromkeys(files, "0" * 64)
    plan = compile_plan("org/llama", tp_size=8)
    assert plan.fingerprint == expected.fingerprint
    assert hub.sent() < 500_000
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_model_of_92_thousand_tensors_in_163_files(hub: HubServer, tmp_path: Path) -> None:
    """DeepSeek-V3 as it is published, in 8 bits."""
    make, tp_size, *_ = MODELS["deepseek_v3"]
    folder = tmp_path / "v3"
    folder.mkdir()
    write_sparse_checkpoint(folder, *make())
    files = publish(hub, folder, "org/v3").files
    hub.repositories["org/v3"].sha256 = dict.fromkeys(files, "0" * 64)
    plan = compile_plan("org/v3", tp_size=tp_size)
    assert plan.dequantize is not None
    assert plan.layouts == Plan.read(PACKAGE / "plans" / "deepseek_v3" / "tp16.json").layouts
    assert hub.sent() < 25_000_000, "the index of 9 MB and the headers of 12 MB"


def test_all_files_are_of_one_commit(hub: HubServer, tmp_path: Path) -> None:
    """The branch moves on after the files were listed."""
    folder = write_llama(tmp_path / "llama", num_files=2)
    repository = publish(hub, folder)
    expected = compile_plan(folder, tp_size=2)
    other = {**repository.files, "config.json": b'{"model_type": "gpt_neox"}'}

    def push(method: str, path: str) -> None:
        if path.startswith("/org/llama/resolve"):
            hub.repositories["org/llama"] = Repository(
                other, commit="d" * 40, older={COMMIT: Repository(repository.files)}
            )

    hub.trouble = push
    plan = compile_plan("org/llama", tp_size=2)
    assert plan.fingerprint == expected.fingerprint
    assert plan.model.repository is not None
    assert plan.model.repository.commit == COMMIT


def test_what_the_hub_refuses(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_llama(tmp_path / "llama")
    publish(hub, folder).gated = "secret"
    code, text = fault("org/llama")
    assert code == "hub-gated"
    assert "https://huggingface.co/org/llama" in text and "HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert fault("org/llama")[0] == "hub-gated"
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert open_checkpoint("org/llama").tensors
    assert fault("org/nothing")[0] == "hub-no-repository"
    assert fault("org/llama@v9")[0] == "hub-no-revision"
    assert fault("hf://org/llama/nowhere")[0] == "hub-no-model"
    with_token = [request.path for request in hub.requests if request.authorization]
    assert with_token and not [path for path in with_token if path.startswith("/link")], "a link gets no token"


def test_access_that_is_lost_on_the_way(hub: HubServer, tmp_path: Path) -> None:
    """The files are refused once the small ones were downloaded."""
    publish(hub, write_llama(tmp_path / "llama"))
    model_folder("org/llama")
    for status, headers, code in (
        (401, {"X-Error-Code": "GatedRepo"}, "hub-gated"),
        (403, {}, "hub-refused"),
        (404, {"X-Error-Code": "EntryNotFound"}, "hub-no-file"),
        (418, {}, "access-refused"),
    ):
        refusal = Trouble(status, headers)
        hub.trouble = lambda method, path, refusal=refusal: refusal if "safetensors" in path else None  # type: ignore[misc]
        before = len(hub.requests)
        assert fault("org/llama")[0] == code
        assert len([one for one in hub.requests[before:] if "safetensors" in one.path]) == 1, "asked once"


def test_an_overloaded_hub_is_asked_again(hub: HubServer, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", num_files=3)
    publish(hub, folder)
    failed: dict[str, int] = {}

    def trouble(method: str, path: str) -> Trouble | None:
        failed[path] = failed.get(path, 0) + 1
        if method == "HEAD" or failed[path] > 3:
            return None
        return (Trouble(429, {"Retry-After": "0"}), Trouble(503), Trouble(cut=5))[failed[path] - 1]

    hub.trouble = trouble
    assert compile_plan("org/llama", tp_size=2).fingerprint == compile_plan(folder, tp_size=2).fingerprint
    assert min(count for path, count in failed.items() if "safetensors" in path) > 3


def test_a_hub_that_never_answers(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, write_llama(tmp_path / "llama"))
    monkeypatch.setattr(persistence, "ATTEMPTS", 3)
    hub.trouble = lambda method, path: Trouble(500) if path.startswith("/link") else None
    code, text = fault("org/llama")
    assert code == "server-unreachable"
    assert "500" in text
    assert len([one for one in hub.requests if one.path.startswith("/link")]) == 3


def test_offline_with_and_without_cache(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `hf download` has put into the cache is enough, by the name of the branch and by the commit."""
    import huggingface_hub

    folder = write_llama(tmp_path / "llama", num_files=3)
    publish(hub, folder)
    local = compile_plan(folder, tp_size=2)
    cache = tmp_path / "cache"

    def offline(place: str = "org/llama") -> Plan:
        with monkeypatch.context() as patch:
            point_to("http://127.0.0.1:9", cache, patch, offline=True)
            return compile_plan(place, tp_size=2)

    with pytest.raises(CheckpointError) as nothing:
        offline()
    (found,) = nothing.value.faults
    assert found.code == "hub-not-cached"
    assert "HF_HUB_OFFLINE" in found.got and "hf download org/llama" in found.next
    compile_plan("org/llama", tp_size=2)
    with pytest.raises(CheckpointError) as headers:
        offline()
    assert headers.value.faults[0].code == "hub-not-cached"
    assert "safetensors" in headers.value.faults[0].got
    huggingface_hub.snapshot_download("org/llama")
    before = len(hub.requests)
    for place in ("org/llama", f"org/llama@{COMMIT}"):
        assert offline(place).to_json() == compile_plan(place, tp_size=2).to_json()
    assert offline().fingerprint == local.fingerprint
    assert not [one for one in hub.requests[before:] if "safetensors" in one.path], "the cache comes first"
    with monkeypatch.context() as patch:
        point_to("http://127.0.0.1:9", cache, patch)  # nobody listens there
        patch.setattr(persistence, "FIRST_WAIT", 0.01)
        assert compile_plan("org/llama", tp_size=2).fingerprint == local.fingerprint
    shutil.rmtree(cache)
