"""What a test starts does not outlive it, whatever sessions its children are in."""

from __future__ import annotations

import subprocess

import pytest

from tests.helpers.programs import output_of, started
from tests.runtime.verify.test_workers import is_running

LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(1000)
"""


def test_children_in_sessions_of_their_own_are_killed_too() -> None:
    with started(["python", "-c", LAUNCHER]) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert is_running(child)
    assert not is_running(process.pid) and not is_running(child)


def test_a_program_that_does_not_end_in_time_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        output_of(["python", "-c", "import time; time.sleep(1000)"], timeout=0.5)


def test_the_exit_status_is_the_expected_one() -> None:
    assert output_of(["python", "-c", "print('said')"], timeout=30) == "said\n"
    with pytest.raises(AssertionError, match="said"):
        output_of(["python", "-c", "print('said'); raise SystemExit(3)"], timeout=30)
    with pytest.raises(AssertionError, match="said"):
        output_of(["python", "-c", "print('said')"], timeout=30, fails=True)
