"""Weaknesses that are planted in the ranks, one at a time: the campaign must find each."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from autotp_plan.schemas.jobs.job_manifest import LATEST_NAME
from benchmarks.job_faults import calls

PLANTED = ("no sync", "no checksum", "no lock", "latest first")


def plant(name: str) -> None:
    """Plant a weakness in this process; an empty name for none."""
    if name == "no sync":
        calls.leave_out(syncs=True)
    elif name == "no lock":
        calls.leave_out(locks=True)
    elif name == "no checksum":
        resume: Any = importlib.import_module("autotp_plan.runtime.checkpoint.resume")
        resume.file_faults = lambda *arguments: ()
    elif name == "latest first":
        job: Any = importlib.import_module("autotp_plan.runtime.checkpoint.job")
        begin = job._begin

        def begin_and_name(target: Path, take_over: bool) -> None:
            begin(target, take_over)
            (target.parent / LATEST_NAME).write_text(target.name)

        job._begin = begin_and_name
    else:
        assert not name, name
    assert "LD_PRELOAD" in os.environ
