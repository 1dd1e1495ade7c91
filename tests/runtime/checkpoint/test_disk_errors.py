"""A disk that fails, or a file that is shortened, while a job is read on another mesh: an error, and not a signal."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.runtime.checkpoint.test_flat_groups import saved_job

JOB = ROOT / "tests" / "golden" / "version_0_1" / "job" / "step2"
FILES = {
    "optimizer": "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    "model": "mp_rank_00_model_states.pt",
}


def every_number(job: Any) -> dict[tuple[str, str], Any]:
    from autotp_plan.schemas.layout import Layout

    return {
        (name, key): job.shard(name, key, Layout(shape=job.plan.shape_of(parameter)), 0)
        for name, parameter in job.parameters.items()
        for key in job.keys(name)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(JOB, tmp_path / "step2")
    return tmp_path / "step2"


def test_what_is_read_is_what_torch_loads(folder: Path) -> None:
    import torch

    from autotp_plan.runtime.checkpoint import zero_files

    found = every_number(saved_job(folder))
    trusted = saved_job(folder)
    trusted.trust = True  # its files are mapped
    expected = every_number(trusted)
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert all(trusted.scalars(name) == saved_job(folder).scalars(name) for name in trusted.parameters)
    whole = torch.load(folder / FILES["model"], weights_only=False)
    strided = torch.arange(6.0).reshape(2, 3).t()[1:]
    extra = {"buffer": strided, "none": torch.zeros(0, 3), "bits": torch.tensor([True, False]).repeat(9000)}
    whole["module"].update(extra)
    torch.save({**whole, "ema": [{"large": torch.arange(9000)}]}, folder / FILES["model"])
    for bytes_read_at_once in (zero_files._SMALL_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero_files, "_SMALL_BYTES", bytes_read_at_once)
            job = saved_job(folder)
            assert all(torch.equal(job.buffer(name), one) for name, one in extra.items())
            assert job.buffer("nothing") is None
            assert torch.equal(job.engine_state["ema"][0]["large"], torch.arange(9000))
            assert job.engine_state["global_steps"] == 2


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_shortened_after_it_was_checked(folder: Path, kind: str) -> None:
    """Of a mapped file the kernel would send SIGBUS, and within its last page give zeros."""
    from autotp_plan.schemas.errors import CheckpointError

    sound = saved_job(folder)
    sound.check()
    path = folder / FILES[kind]
    os.truncate(path, 8192)
    with pytest.raises(CheckpointError, match=f"{path.name} ended .* bytes early"):
        every_number(sound) if kind == "optimizer" else every_weight(sound)


def every_weight(job: Any) -> list[Any]:
    """The weights in the file of the model, as they are read where they were frozen."""
    states = job._model_states(0)["module"]
    return [job.buffer(name) for name in states]


def test_a_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp_plan.schemas.errors import CheckpointError

    job = saved_job(folder)
    job.check()

    def fail(descriptor: int, buffers: Sequence[Any], position: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="a file of the saved job cannot be read") as caught:
        every_number(job)
    assert caught.value.faults[0].got == "[Errno 5] Input/output error"


def test_a_torch_that_does_not_say_where_tensors_lie(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from autotp_plan.runtime.checkpoint import zero_files

    found = every_number(saved_job(folder))
    monkeypatch.setattr(zero_files, "says_where_tensors_lie", lambda: False)
    mapped = every_number(saved_job(folder))
    assert all(torch.equal(found[key], mapped[key]) for key in mapped)
