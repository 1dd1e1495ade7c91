"""Shards from a stranger: refused with an error of ours, in little memory; nothing outside the folder is touched."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.planner import check_shards, compile_plan, merge, presplit, reshard
from autotp_plan.runtime.loading import read_weights, weights
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME, PLAN_NAME
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.safetensors_header import read_header
from tests.helpers.checkpoints import write_llama
from tests.helpers.random_shards import files_of

pytestmark = pytest.mark.sweep

ATTACKS = Path(__file__).parents[2] / "attacks"
FILES = sorted(ATTACKS.glob("*.safetensors"))
NAMES = json.loads((ATTACKS / "names.json").read_text())
SHARD = "tp-00-of-02.00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sound")
    original = write_llama(work / "original", num_files=2)
    presplit(compile_plan(original, tp_size=2), original, work / "shards")
    return work / "shards"


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "in" / "shards")


@pytest.fixture(autouse=True)
def nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was loaded")

    for home, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(home, name, refuse)


def everything(folder: Path, out: Path) -> list[Callable[[], object]]:
    plan = json.loads((folder / PLAN_NAME).read_text()) if (folder / PLAN_NAME).is_file() else {}

    def load() -> None:
        source = weights.open_weights(folder, Plan.from_dict(plan), verify_checksums=True)
        for weight in source.of_rank(0):
            read_weights.read_weight(weight, torch.device("cpu"), None)

    return [
        lambda: check_shards(folder),
        lambda: merge(folder, out / "merged"),
        lambda: reshard(folder, out / "resharded", tp_size=1),
        load,
    ]


def refused(folder: Path, tmp_path: Path, *, also_by_merge: bool = True) -> None:
    """Every command refuses the folder, and writes nothing anywhere."""
    out = tmp_path / "out"
    out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for number, run in enumerate(everything(folder, out)):
        if number in (1, 2) and not also_by_merge:
            continue
        with pytest.raises(AutoTPError):
            run()
    assert sorted(tmp_path.rglob("*")) == before


def with_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(signed(data)))


def signed(data: Any) -> Any:
    """A document with the fingerprint that a stranger would give it."""
    if not isinstance(data, dict):
        return data
    rest = {key: value for key, value in data.items() if key not in ("fingerprint", "verified")}
    return {**data, "fingerprint": documents.fingerprint(rest)}


def told_in_manifest(folder: Path, name: str) -> None:
    """The manifest has the right size and checksum of a file: only its contents are wrong."""
    raw = (folder / name).read_bytes()

    def change(data: dict[str, Any]) -> None:
        for file in data["files"]:
            if file["name"] == name:
                file.update(size=len(raw), crc32=checksum.text(checksum.of_bytes(raw)))

    with_manifest(folder, change)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_shards_with_headers_that_lie_are_refused(shards: Path, tmp_path: Path, file: Path) -> None:
    with pytest.raises(AutoTPError):
        read_header(file)
    shutil.copyfile(file, shards / SHARD)
    told_in_manifest(shards, SHARD)
    refused(shards, tmp_path)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_checkpoint_with_headers_that_lie(tmp_path: Path, file: Path) -> None:
    original = write_llama(tmp_path / "original")
    plan = compile_plan(original, tp_size=2)
    shutil.copyfile(file, original / "model.safetensors")
    with pytest.raises(AutoTPError):
        presplit(plan, original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_file_names_that_lead_out_of_the_folder_are_refused(shards: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "in" / "outside").write_text("{}")

    def as_shard(data: dict[str, Any]) -> None:
        data["files"][0]["name"] = name

    def as_source(data: dict[str, Any]) -> None:
        data["source"]["files"][0]["name"] = name

    text = (shards / MANIFEST_NAME).read_text()
    with_manifest(shards, as_shard)
    refused(shards, tmp_path)
    (shards / MANIFEST_NAME).write_text(text)
    (tmp_path / "out").rmdir()
    with_manifest(shards, as_source)
    refused(shards, tmp_path)


@pytest.mark.parametrize("name", [SHARD, "config.json", PLAN_NAME, MANIFEST_NAME])
@pytest.mark.parametrize("kind", ["link", "link to nowhere", "pipe", "folder"])
def test_pipes_folders_and_links_in_place_of_files_are_refused(
    shards: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = shards / name
    path.rename(tmp_path / "in" / "outside")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "in" / "outside" if kind == "link" else "/nowhere")
    plan = tmp_path / "in" / "outside"
    assert plan.exists()
    refused(shards, tmp_path)


def test_a_source_file_named_as_one_that_is_copied(shards: Path, tmp_path: Path) -> None:
    with_manifest(shards, lambda data: data["source"]["files"][0].update(name="config.json"))
    out = tmp_path / "out"
    with pytest.raises(AutoTPError, match="two files of this name"):
        merge(shards, out)
    assert not out.exists()


def test_an_output_that_is_a_link(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("keep")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AutoTPError, match="not empty"):
        merge(shards, tmp_path / "out")
    assert (tmp_path / "elsewhere" / "precious").read_text() == "keep"


def test_temporaries_that_are_links(shards: Path, tmp_path: Path) -> None:
    """In a folder that was begun, by someone else: nothing is written through a link."""
    merge(shards, tmp_path / "whole")
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.write_text("keep")
    (out / ".model-00001-of-00002.safetensors.tmp").symlink_to(outside)
    (out / ".autotp-unfinished").write_text("")
    merge(shards, out)
    assert outside.read_text() == "keep"
    assert files_of(out) == files_of(tmp_path / "whole")
    shutil.rmtree(out)
    out.mkdir()
    (out / ".autotp-unfinished").symlink_to(outside)
    with pytest.raises(AutoTPError):
        merge(shards, out)
    assert outside.read_text() == "keep"


def test_little_memory_is_taken(shards: Path) -> None:
    """A header and a manifest that promise exabytes, in a process that may have 512 MiB of address space more."""
    code = """
import resource, sys
from pathlib import Path
from autotp_plan.planner import check_shards, merge
from autotp_plan.schemas.errors import AutoTPError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
for run in (check_shards, lambda folder: merge(folder, Path(sys.argv[2]))):
    try:
        run(Path(sys.argv[1]))
    except AutoTPError:
        continue
    raise AssertionError("accepted")
"""
    for file in ("header_of_16_exabytes", "header_of_99_megabytes", "empty_file_of_lies", "shape_that_overflows"):
        shutil.copyfile(ATTACKS / f"{file}.safetensors", shards / SHARD)
        told_in_manifest(shards, SHARD)
        subprocess.run([sys.executable, "-c", code, str(shards), str(shards.parent / "out")], check=True)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def mutated(value: Any, at: list[int], new: Any) -> Any:
    """`value` with something in it, chosen by the numbers `at`, replaced by `new`."""
    if not at or not isinstance(value, (dict, list)) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[at[0] % len(keys)]
    changed = mutated(value[key], at[1:], new)
    if isinstance(value, dict):
        return {**value, key: changed}
    return [*value[:key], changed, *value[key + 1 :]]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.just([]), st.just({}),
    st.sampled_from([2**62, 2**64, 1.5, "", "x", "../x", "/etc/passwd", SHARD]),
)  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    at=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    new=SCALARS,
    which=st.sampled_from(["manifest", "plan", "header"]),
)
def test_changed_documents_raise_only_our_errors(sound: Path, at: list[int], new: Any, which: str) -> None:
    """Manifest, plan or an original's header with anything in the place of anything: only errors of ours."""
    work = Path(tempfile.mkdtemp())
    folder = shutil.copytree(sound, work / "shards")
    path = folder / (PLAN_NAME if which == "plan" else MANIFEST_NAME)
    data = json.loads(path.read_text())
    if which == "header":
        source = data["source"]["files"][0]
        source["header"] = json.dumps(mutated(json.loads(source["header"]), at, new))
    else:
        data = mutated(data, at, new)
    path.write_text(json.dumps(signed(data)))
    for run in everything(folder, work):
        try:
            run()
        except AutoTPError:
            continue
    shutil.rmtree(work)
