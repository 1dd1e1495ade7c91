"""Models in buckets: a real S3 server on loopback, read by s3fs."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import check_checkpoint, compile_plan, presplit
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.sources.model_folder import open_checkpoint
from autotp_plan.sources.places.bucket import BucketFile
from autotp_plan.sources.transfer import persistence
from tests.helpers.checkpoints import write_llama
from tests.sources.test_folder_kinds import tensors_in, write_bin

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of the server, through s3fs, which finds it as users tell it to."""
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(persistence, "FIRST_WAIT", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("models")
    yield system
    system.rm("models", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_model_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", num_files=3)
    (folder / "tokenizer.json").write_text("{}")
    for path in folder.iterdir():
        bucket.put_file(str(path), f"models/org/llama/{path.name}")
    local = compile_plan(folder, tp_size=2)
    plan = compile_plan("s3://models/org/llama", tp_size=2)
    assert plan == local
    assert check_checkpoint(plan, "s3://models/org/llama/") == []
    presplit(plan, "s3://models/org/llama", tmp_path / "shards")
    presplit(plan, folder, tmp_path / "local")
    for path in (tmp_path / "local").iterdir():
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "shards" / "tokenizer.json").exists()


@pytest.mark.parametrize("files", [1, 2])
def test_bin_files_in_a_bucket(bucket: Any, tmp_path: Path, files: int) -> None:
    folder = write_llama(tmp_path / "llama")
    tensors = tensors_in(folder)
    (folder / "model.safetensors").unlink()
    write_bin(folder, tensors, files)
    for path in folder.iterdir():
        bucket.put_file(str(path), f"models/org/bins-{files}/{path.name}")
    place = f"s3://models/org/bins-{files}"
    plan = compile_plan(place, tp_size=2)
    assert plan == compile_plan(folder, tp_size=2)
    presplit(plan, place, tmp_path / "shards")
    presplit(plan, folder, tmp_path / "local")
    for path in (tmp_path / "local").iterdir():
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()


def test_killed_it_goes_on_from_complete_files(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete files are kept, the others written again, and of the bucket only what these need is fetched."""
    folder = write_llama(tmp_path / "llama", num_files=3, hidden_size=512, intermediate_size=1024, vocab_size=512)
    for path in folder.iterdir():
        bucket.put_file(str(path), f"models/org/killed/{path.name}")
    place, output = "s3://models/org/killed", tmp_path / "shards"
    plan = compile_plan(folder, tp_size=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    presplit(plan, folder, tmp_path / "local", max_file_bytes=1_500_000)
    command = (
        "import sys, time; from autotp_plan.planner import Plan, presplit;"
        "from autotp_plan.sources.places import bucket;"
        "fetch = bucket.BucketFile._fetch;"
        "bucket.BucketFile._fetch = lambda *arguments: (time.sleep(0.03), fetch(*arguments));"
        f"presplit(Plan.read(sys.argv[1]), {place!r}, sys.argv[2], max_file_bytes=1_500_000, workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "plan.json"), str(output)])
    while process.poll() is None and len(list(output.glob("tp-*"))) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    complete = {path.name: path.stat().st_mtime_ns for path in output.glob("tp-*")}
    assert 4 <= len(complete) < len(list((tmp_path / "local").glob("tp-*")))
    assert not (output / "autotp_shards.json").exists()
    fetched, fetch = [0], BucketFile._fetch

    def counted(file: BucketFile, start: int, target: memoryview) -> None:
        fetched[0] += len(target)
        fetch(file, start, target)

    monkeypatch.setattr(BucketFile, "_fetch", counted)
    presplit(plan, place, output, max_file_bytes=1_500_000)
    assert all((output / name).stat().st_mtime_ns == time for name, time in complete.items())
    for path in (tmp_path / "local").iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert fetched[0] < 0.9 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_what_a_bucket_refuses(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    def code(place: str) -> str:
        with pytest.raises(AutoTPError) as raised:
            open_checkpoint(place)
        (fault,) = raised.value.faults
        assert fault.where.startswith(place)
        return fault.code

    assert code("s3://models/nothing") == "bucket-not-there"
    assert code("s3://no-such-bucket/x") == "bucket-not-there"
    assert code("nosuch://models/x") == "unknown-place"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    assert code("s3://models/x") == "bucket-refused"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("autotp_plan.sources.places.bucket.ATTEMPTS", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    assert code("s3://models/x") == "server-unreachable"
