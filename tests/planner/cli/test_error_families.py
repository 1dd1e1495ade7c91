"""Errors are of the family that says what is wrong: an output that cannot be written, options that make no sense."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from autotp_plan import planner as library
from autotp_plan.planner import compile_plan
from autotp_plan.planner.cli.export import export
from autotp_plan.planner.cli.main import compile
from autotp_plan.planner.cli.shards import reshard
from autotp_plan.planner.deepspeed.read_config import parse_section
from autotp_plan.schemas.errors import AutoTPError, OptionError, OutputError
from tests.helpers.checkpoints import write_llama


def raised(command: Any, **options: Any) -> AutoTPError:
    """What a command's library call raises, before the command line turns it into exit status 2."""
    with pytest.raises(AutoTPError) as caught:
        inspect.unwrap(command.callback)(**options)
    return caught.value


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tp_size": 2, "preset": "auto", "specs": (), "uneven": False, "ds_config": None, "strict": False,
        "factory": lambda: None,
    }  # fmt: skip
    error = raised(compile, model=write_llama(tmp_path / "llama"), output=tmp_path / "none" / "plan.json", **options)
    assert type(error) is OutputError
    assert [fault.code for fault in error.faults] == ["file-not-written"]


def test_an_export_that_cannot_be_written(tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(compile_plan(write_llama(tmp_path / "llama"), tp_size=2).to_json(), encoding="utf-8")
    output = tmp_path / "none" / "config.json"
    error = raised(export, plan_file=plan_file, target="deepspeed", output=output, partial=False, output_format="table")
    assert type(error) is OutputError


@pytest.mark.parametrize(("tp_size", "plan_file"), [(None, None), (2, Path("plan.json"))])
def test_reshard_without_or_with_both_options(tmp_path: Path, tp_size: int | None, plan_file: Path | None) -> None:
    options = {
        "uneven": False,
        "output": tmp_path / "new",
        "workers": 1,
        "quiet": True,
        "timeout": 600,
        "factory": None,
    }
    error = raised(reshard, shards=tmp_path, tp_size=tp_size, plan_file=plan_file, **options)
    assert type(error) is OptionError
    assert [fault.code for fault in error.faults] == ["tp-or-plan"]


def test_tp_sizes_that_make_no_sense(tmp_path: Path) -> None:
    section = parse_section({"autotp_size": 4})
    for options, code in (
        ({}, "no-tp-size"),
        ({"tp_size": 0}, "tp-size-out-of-range"),
        ({"tp_size": 2, "deepspeed": section}, "two-tp-sizes"),
    ):
        with pytest.raises(OptionError) as caught:
            compile_plan(tmp_path, **options)
        assert [fault.code for fault in caught.value.faults] == [code]


def test_the_library_refuses_both_ways_to_reshard_too(tmp_path: Path) -> None:
    plan = compile_plan(write_llama(tmp_path / "llama"), tp_size=2)
    cases: list[dict[str, Any]] = [{}, {"tp_size": 2, "plan": plan}]
    for options in cases:
        with pytest.raises(OptionError) as caught:
            library.reshard(tmp_path, tmp_path / "new", **options)
        assert [fault.code for fault in caught.value.faults] == ["tp-or-plan"]
