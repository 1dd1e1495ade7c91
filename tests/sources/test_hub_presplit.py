"""presplit and loading of models on the hub: streamed, continued, and held to the hub's checksums."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotp_plan.planner import Plan, check_shards, compile_plan, merge, presplit
from autotp_plan.schemas.errors import CheckpointError
from tests.helpers.checkpoints import write_llama
from tests.helpers.hub_client import loopback_hub
from tests.helpers.hub_server import HubServer, Repository, Trouble, folder_files

FILE_BYTES = 1_500_000
"""Several files for each rank."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with loopback_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Path]:
    """A checkpoint of 9 MB in three files, a plan of it, and its shards as presplit writes them from the folder."""
    work = tmp_path_factory.mktemp("original")
    folder = write_llama(work / "llama", num_files=3, hidden_size=512, intermediate_size=1024, vocab_size=512)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    plan = compile_plan(folder, tp_size=2)
    presplit(plan, folder, work / "shards", max_file_bytes=FILE_BYTES)
    return folder, plan, work / "shards"


def publish(hub: HubServer, folder: Path) -> Repository:
    hub.repositories["org/llama"] = Repository(folder_files(folder))
    return hub.repositories["org/llama"]


def same_files(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files, to the byte."""
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_each_byte_is_fetched_once(hub: HubServer, tmp_path: Path, original: tuple[Path, Plan, Path]) -> None:
    folder, plan, shards = original
    publish(hub, folder)
    presplit(plan, "org/llama", tmp_path / "shards", max_file_bytes=FILE_BYTES)
    assert same_files(tmp_path / "shards", shards)
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "the source is not stored"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < hub.sent("/link") < size * 1.05, "headers and samples are fetched besides"
    assert check_shards(tmp_path / "shards").plan == plan
    merge(tmp_path / "shards", tmp_path / "merged")
    assert same_files(tmp_path / "merged", folder)


def test_cut_connections_and_busy_servers(hub: HubServer, tmp_path: Path, original: tuple[Path, Plan, Path]) -> None:
    folder, plan, shards = original
    publish(hub, folder)
    chance = random.Random(0)
    happened = {429: 0, 503: 0, 403: 0, 0: 0}

    def trouble(method: str, path: str) -> Trouble | None:
        with hub.lock:
            kind = chance.choice([0, 0, 0, 0, 429, 503, 403, None, None, None, None]) if "/link" in path else None
            if kind is None:
                return None
            happened[kind] += 1
            if kind == 403:  # the link has expired
                hub.links += 1
                return None
            return Trouble(kind, {"Retry-After": "0"}) if kind else Trouble(cut=chance.randrange(400_000))

    hub.trouble = trouble
    presplit(plan, "org/llama", tmp_path / "shards", max_file_bytes=FILE_BYTES)
    assert same_files(tmp_path / "shards", shards)
    assert min(happened.values()) > 0, happened
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert hub.sent("/link") < size * 1.6, "a range goes on where it broke off"


def test_a_wrong_checksum_is_found(hub: HubServer, tmp_path: Path, original: tuple[Path, Plan, Path]) -> None:
    """The bytes are not those that the hub has a checksum of; once they are, the same command completes the folder."""
    folder, plan, shards = original
    repository = publish(hub, folder)
    name = "model-00002-of-00003.safetensors"
    right = (folder / name).read_bytes()
    wrong = bytearray(right)
    wrong[len(wrong) // 3] ^= 1  # in no sample
    repository.digest(name)
    repository.files[name] = bytes(wrong)
    with pytest.raises(CheckpointError) as raised:
        presplit(plan, "org/llama", tmp_path / "shards", max_file_bytes=FILE_BYTES)
    (fault,) = raised.value.faults
    assert (fault.code, fault.where) == ("wrong-sha256", name)
    assert not (tmp_path / "shards" / "autotp_shards.json").exists()
    repository.files[name] = right
    before = hub.sent("/link")
    presplit(plan, "org/llama", tmp_path / "shards", max_file_bytes=FILE_BYTES)
    assert same_files(tmp_path / "shards", shards)
    assert hub.sent("/link") - before < sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_access_that_is_lost_ends_it_and_it_goes_on(
    hub: HubServer, tmp_path: Path, original: tuple[Path, Plan, Path]
) -> None:
    folder, plan, shards = original
    repository = publish(hub, folder)
    asked = 0

    def trouble(method: str, path: str) -> Trouble | None:
        nonlocal asked
        asked += "/link" in path
        if asked > 40:
            hub.links += 1  # no link holds any more
            repository.gated = "a token"
        return None

    hub.trouble = trouble
    with pytest.raises(CheckpointError) as raised:
        presplit(plan, "org/llama", tmp_path / "shards", max_file_bytes=FILE_BYTES)
    assert raised.value.faults[0].code == "hub-gated"
    complete = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("tp-*")}
    hub.trouble = lambda method, path: None
    repository.gated = ""
    presplit(plan, "org/llama", tmp_path / "shards", max_file_bytes=FILE_BYTES)
    assert same_files(tmp_path / "shards", shards)
    assert all((tmp_path / "shards" / name).stat().st_mtime_ns == time for name, time in complete.items())


def test_killed_it_goes_on_from_complete_files(
    hub: HubServer, tmp_path: Path, original: tuple[Path, Plan, Path]
) -> None:
    folder, plan, shards = original
    publish(hub, folder)
    (tmp_path / "plan.json").write_text(plan.to_json())
    command = (
        "import sys; from autotp_plan.planner import Plan, presplit;"
        f"presplit(Plan.read(sys.argv[1]), 'org/llama', sys.argv[2], max_file_bytes={FILE_BYTES}, workers=1)"
    )

    def slowly(method: str, path: str) -> None:
        time.sleep(0.02 if "/link" in path else 0)

    hub.trouble = slowly
    output = tmp_path / "shards"
    process = subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "plan.json"), str(output)])
    while process.poll() is None and len(list(output.glob("tp-*"))) < 6:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    complete = {path.name: path.stat().st_mtime_ns for path in output.glob("tp-*")}
    assert 6 <= len(complete) < len(list(shards.glob("tp-*")))
    assert not (output / "autotp_shards.json").exists()
    hub.trouble = lambda method, path: None
    before = hub.sent("/link")
    presplit(plan, "org/llama", output, max_file_bytes=FILE_BYTES)
    assert same_files(output, shards)
    assert all((output / name).stat().st_mtime_ns == time for name, time in complete.items())
    assert hub.sent("/link") - before < 0.8 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_file_in_the_cache_is_read_from_there(
    hub: HubServer, tmp_path: Path, original: tuple[Path, Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    folder, plan, shards = original
    publish(hub, folder)
    hf_hub_download("org/llama", "model-00001-of-00003.safetensors")
    before = len(hub.requests)
    presplit(plan, "org/llama", tmp_path / "shards", max_file_bytes=FILE_BYTES)
    assert same_files(tmp_path / "shards", shards)
    assert not [one for one in hub.requests[before:] if "model-00001" in one.path]


def test_a_rank_reads_its_ranges(hub: HubServer, tmp_path: Path, original: tuple[Path, Plan, Path]) -> None:
    import torch

    from autotp_plan.runtime.loading.read_weights import read_weights
    from autotp_plan.runtime.loading.weights import open_weights

    folder, plan, _ = original
    publish(hub, folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    far = open_weights("org/llama", plan)
    before = hub.sent("/link")
    for rank in range(2):
        near = list(read_weights(open_weights(folder, plan).of_rank(rank), torch.device("cpu"), {}))
        found = list(read_weights(far.of_rank(rank), torch.device("cpu"), {}))
        assert [weight.name for weight, _ in near] == [weight.name for weight, _ in found]
        assert all(
            torch.equal(one.view(torch.int16), other.view(torch.int16)) for (_, one), (_, other) in zip(near, found)
        )
    assert far.fingerprint() == open_weights(folder, plan).fingerprint()
    # of weights that are sharded by columns each rank fetches all rows: they are shorter than a request is worth
    assert hub.sent("/link") - before < 1.4 * size


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_quantised_weights_are_computed_while_they_arrive(hub: HubServer, tmp_path: Path, kind: str) -> None:
    from tests.dequantize.test_checkpoints import written

    folder = written(tmp_path / "model", kind).folder
    publish(hub, folder)
    plan = compile_plan("org/llama", tp_size=4)
    assert plan.dequantize is not None
    presplit(plan, "org/llama", tmp_path / "shards")
    presplit(plan, folder, tmp_path / "local")
    assert same_files(tmp_path / "shards", tmp_path / "local")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
