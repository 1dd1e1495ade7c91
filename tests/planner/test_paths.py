"""Paths are given as `str` or as `Path` to everything that a user calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import (
    Plan,
    SpecFile,
    check_checkpoint,
    check_shards,
    compile_plan,
    inventory_of_folder,
    merge,
    presplit,
    reshard,
)
from tests.helpers.checkpoints import write_llama
from tests.helpers.paths import PRESETS


class Somewhere:
    """A path that is neither."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Somewhere])
def test_every_call_takes_paths_of_every_kind(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    checkpoint = write_llama(tmp_path / "llama")
    plan = compile_plan(kind(checkpoint), tp_size=2)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert Plan.read(kind(file)) == plan
    assert SpecFile.read(kind(PRESETS / "llama.json")).layer_specs
    assert check_checkpoint(plan, kind(checkpoint)) == []
    assert inventory_of_folder(kind(checkpoint)).parameters
    presplit(plan, kind(checkpoint), kind(tmp_path / "shards"))
    assert check_shards(kind(tmp_path / "shards")).plan == plan
    reshard(kind(tmp_path / "shards"), kind(tmp_path / "four"), tp_size=4)
    assert merge(kind(tmp_path / "four"), kind(tmp_path / "merged")) > 0
    merged = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert merged == (checkpoint / "model.safetensors").read_bytes()
    assert isinstance(kind(tmp_path), (str, os.PathLike))
