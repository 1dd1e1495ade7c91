"""Code that does not run without data, or takes too long, is an error that says what still works."""

from __future__ import annotations

import time

import pytest

from autotp_plan.runtime.estimate.processes import run_without_data
from autotp_plan.schemas.errors import CompileError
from tests.helpers.told import check_told


def reads_data() -> None:
    raise ValueError("the model reads a tensor's values")


def takes_long() -> None:
    time.sleep(600)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_what_does_not_run_without_data_is_said() -> None:
    for function, timeout, said in ((reads_data, 60.0, "reads a tensor's values"), (takes_long, 1.0, "1 s")):
        with pytest.raises(CompileError) as caught:
            run_without_data(function, 1, where="TP rank 0 of 2", what="two steps", timeout=timeout)
        (fault,) = caught.value.faults
        assert (fault.code, fault.where) == ("estimate-stopped", "TP rank 0 of 2")
        assert said in fault.got and "--no-run" in fault.next


@pytest.mark.parametrize(
    "told", [[{"a": "one two"}, {"a": "one"}], [{"a": "two one"}] * 2, [{"a": "one"}] * 2, [{"b": "one two"}] * 2]
)
def test_what_ranks_should_not_be_told_is_found(told: list[dict[str, str]]) -> None:
    check_told([{"a": "one two"}] * 2, {"a": ("one", "two")})
    with pytest.raises(AssertionError):
        check_told(told, {"a": ("one", "two")})
