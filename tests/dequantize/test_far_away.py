"""Quantised checkpoints on the hub: planned from their headers, and pre-split while they are streamed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.shards.merge import merge
from autotp_plan.planner.shards.presplit import presplit
from tests.dequantize.test_checkpoints import merged, same, written
from tests.dequantize.test_published import deepseek
from tests.helpers.hub_client import loopback_hub
from tests.helpers.hub_server import HubServer, Repository, folder_files
from tests.helpers.sparse import write_sparse_checkpoint


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with loopback_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_presplit_from_the_hub_is_that_of_the_folder(hub: HubServer, tmp_path: Path, kind: str) -> None:
    made = written(tmp_path / "model", kind)
    hub.repositories["org/model"] = Repository(folder_files(made.folder))
    plan = compile_plan("org/model", tp_size=2)
    local = compile_plan(made.folder, tp_size=2)
    assert (plan.parameters, plan.dequantize, plan.fingerprint) == (
        local.parameters,
        local.dequantize,
        local.fingerprint,
    )
    presplit(plan, "org/model", tmp_path / "far")
    presplit(plan, made.folder, tmp_path / "near")
    for path in sorted((tmp_path / "near").iterdir()):
        assert (tmp_path / "far" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "the source is not stored"
    merge(tmp_path / "far", tmp_path / "merged")
    assert same(merged(tmp_path / "merged"), made.plain)


@pytest.mark.timeout(120)
def test_deepseek_v3_is_planned_from_its_headers(hub: HubServer, tmp_path: Path) -> None:
    config, tensors, num_files = deepseek()
    folder = tmp_path / "model"
    folder.mkdir()
    write_sparse_checkpoint(folder, config, tensors, num_files)
    hub.repositories["deepseek-ai/DeepSeek-V3"] = Repository(folder_files(folder), has_checksums=False)
    started = time.process_time()
    plan = compile_plan("deepseek-ai/DeepSeek-V3", tp_size=16)
    assert time.process_time() - started < 20, "the server's time is in it"
    assert plan.dequantize is not None
    assert plan.dequantize.method == "fp8"
    headers = sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors"))
    assert hub.sent("/link") < headers * 1.2, "the rest of a file is a hole"
