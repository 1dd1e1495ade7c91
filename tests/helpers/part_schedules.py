"""python -m tests.helpers.part_schedules SCENARIO FOLDER SEEDS [PLANTED]

Processes that write parts of one shards folder, under a scheduler: each stops before every call that changes or reads
the folder, and this process decides by random numbers who goes on, and who is killed. FOLDER is what `faults.prepare`
made. The processes are forked from this one, which has no threads: that takes milliseconds each.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from autotp_plan.planner import presplit
from autotp_plan.schemas.errors import OutputError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from autotp_plan.schemas.shards.output_folder import FinishedFile, journal_line
from autotp_plan.schemas.shards.part_folder import PartFolder
from tests.helpers.random_shards import files_of

_Calls = tuple[tuple[Any, str], ...]
_CHANGES: _Calls = (
    *((os, name) for name in ("pwritev", "write", "fsync", "truncate")),
    *((Path, name) for name in ("replace", "unlink")),
)
_LOOKS: _Calls = ((os, "listdir"), (Path, "read_bytes"))
_ANEW = 3
"""Exit status of a process that found that another has begun its part anew."""


class Folder:
    """A shards folder that is being written in `count` parts, and what it must become."""

    def __init__(self, work: Path, output: Path, count: int) -> None:
        self.plan, self.original, self.output, self.count = (
            Plan.read(work / "plan.json"),
            work / "original",
            output,
            count,
        )
        self.most = 9000
        self.expected = files_of(work / "presplit")

    def start(self, number: int, before_call: Callable[[], None] = lambda: None, calls: _Calls = ()) -> int:
        """Fork a process that writes a part, and calls `before_call` before each of `calls`; its id."""
        process = os.fork()
        if process == 0:
            status = 1
            try:
                for home, name in calls:
                    setattr(home, name, _after(before_call, getattr(home, name)))
                presplit(
                    self.plan,
                    self.original,
                    self.output,
                    max_file_bytes=self.most,
                    workers=1,
                    part=(number, self.count),
                )
                status = 0
            except OutputError as error:
                print(error, file=sys.stderr)
                status = _ANEW if "another process has begun this part anew" in str(error) else 2
            finally:
                os._exit(status)
        return process

    def run(self, number: int) -> None:
        """Write a part, undisturbed."""
        _, status = os.waitpid(self.start(number), 0)
        assert status == 0

    def check(self) -> None:
        """Every file with a final name is as it will be; where there is a manifest, nothing is missing."""
        if not self.output.exists():
            return
        found = {path.name: path.read_bytes() for path in self.output.iterdir() if not path.name.startswith(".")}
        wrong = [name for name, data in found.items() if data != self.expected[name]]
        assert not wrong, f"{wrong} are not complete"
        if MANIFEST_NAME in found:
            assert found.keys() == self.expected.keys(), f"a manifest without {self.expected.keys() - found.keys()}"

    def check_finished(self) -> None:
        """It is what one process writes, to the byte, and nothing is left over."""
        assert files_of(self.output) == self.expected, "the finished folder is not what one process writes"
        read_shards(self.output).verify()


def _after(before: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    return run


def at_call(number: int, signal_number: int) -> Callable[[], None]:
    """What sends the process itself a signal when it is called for the `number`-th time."""
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal_number)

    return count


def kill_at_every_call(new: Callable[[], Folder]) -> None:
    """The last part or the first is killed at its k-th call that changes anything, for every k, and started again."""
    begun = new()
    for part in (1, 3):
        begun.run(part)
    number = hit = 1
    while hit:
        hit = 0
        for last in (True, False) if number % 4 == 0 else (True,):
            folder = new()
            if last:
                shutil.copytree(begun.output, folder.output)
            process = folder.start(2, at_call(number, signal.SIGKILL), _CHANGES)
            hit += os.WIFSIGNALED(os.waitpid(process, 0)[1])
            folder.check()
            for part in (2,) if last else (2, 1, 3):
                folder.run(part)
            folder.check_finished()
        number += 1
    print(f"{number - 2} calls")


def interleave(new: Callable[[], Folder], seeds: Sequence[int], *, kills: float, twice: bool = False) -> None:
    """All parts at once, a call at a time, in random order; some are killed, and start again."""
    live: dict[int, int] = {}
    try:
        found = [_interleave(new(), Random(seed), live, kills, twice) for seed in seeds]
    finally:
        for process in live:
            os.kill(process, signal.SIGKILL)
    killed, anew = map(sum, zip(*found))
    print(f"{len(seeds)} schedules, {killed} killed, {anew} begun anew by another")


def _interleave(folder: Folder, random: Random, live: dict[int, int], kills: float, twice: bool) -> tuple[int, int]:
    """One schedule; how many processes were killed, and how many found that another had begun their part anew.

    One process runs at a time and all others are stopped, so that a schedule depends on its random numbers alone.
    """
    killed = anew = 0
    eager = random.choice((0.1, 0.9))  # in starting processes
    waiting = [part for part in range(1, folder.count + 1) for _ in range(1 + twice)]
    random.shuffle(waiting)

    def ended(process: int) -> bool:
        """Wait until a process that runs stops before a call, or ends."""
        nonlocal anew
        _, status = os.waitpid(process, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return False
        part, code = live.pop(process), os.waitstatus_to_exitcode(status)
        assert code in ((0, _ANEW) if twice else (0,)), f"exit status {code}"
        anew += code == _ANEW
        waiting.extend([part] if code else [])
        return True

    while waiting or live:
        if waiting and (not live or random.random() < eager):
            part = waiting.pop()
            process = folder.start(part, lambda: os.kill(os.getpid(), signal.SIGSTOP), (*_CHANGES, *_LOOKS))
            live[process] = part
            ended(process)
        folder.check()
        if not live:
            continue
        process = random.choice(list(live))
        for _ in range(random.choice((1, 1, 3, 30))):
            if random.random() < kills:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                waiting.insert(random.randint(0, len(waiting)), live.pop(process))
                killed += 1
                break
            os.kill(process, signal.SIGCONT)
            if ended(process):
                break
    folder.check_finished()
    return killed, anew


def kill_at_any_moment(new: Callable[[], Folder], seeds: Sequence[int]) -> None:
    """All parts at once, killed after some milliseconds, wherever they are then; again, with more time, to the end."""
    killed = 0
    for seed in seeds:
        random, folder, longest = Random(seed), new(), 0.01
        left = set(range(1, folder.count + 1))
        while left:
            live = {part: folder.start(part) for part in left}
            for part in random.sample(sorted(left), len(left)):
                time.sleep(random.uniform(0, longest))
                os.kill(live[part], signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(live[part], 0)[1])
                assert code in (0, -signal.SIGKILL), f"exit status {code}"
                left -= {part} if code == 0 else set()
                killed += code != 0
                folder.check()
            longest *= 1.2
        folder.check_finished()
    print(f"{len(seeds)} folders, {killed} killed")


def _without_locks() -> None:
    fcntl.flock = lambda *_: None


def _plant(error: str) -> None:
    """Make an error that the scenarios must find."""
    if error == "a record before the files are complete":
        real = PartFolder.resume

        def resume(self: PartFolder, *args: Any) -> None:
            real(self, *args)
            share = self.shares[self.part.number - 1]
            record = [journal_line(FinishedFile(size, 0).entry(name)) for name, size in share.items()]
            (self.path / self.part.record_name).write_bytes(journal_line(self.task) + b"".join(record))

        PartFolder.resume = resume  # type: ignore[method-assign, assignment]
    elif error == "files without a note are removed":
        real_remove = PartFolder._remove_unfinished

        def remove(self: PartFolder) -> None:
            real_remove(self)
            for name in self.shares[self.part.number - 1].keys() - self.finished.keys():
                (self.path / name).unlink(missing_ok=True)

        PartFolder._remove_unfinished = remove  # type: ignore[method-assign]
    else:
        assert not error, error


def main(scenario: str, work: Path, seeds: int, planted: str = "") -> None:
    """Run a scenario; it ends in an AssertionError where the folder is not what it must be."""
    _plant(planted)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        warm = Folder(work, Path(scratch) / "0", count=3)
        presplit(warm.plan, warm.original, warm.output)  # so that the processes have imported everything
        number = 0

        def new() -> Folder:
            nonlocal number
            number += 1
            return Folder(work, Path(scratch) / str(number), count=3)

        if scenario == "kill":
            kill_at_every_call(new)
        elif scenario == "killed at any moment":
            kill_at_any_moment(new, range(seeds))
        elif scenario == "at once":
            interleave(new, range(seeds), kills=0)
        elif scenario == "at once and killed":
            interleave(new, range(seeds), kills=0.02)
        elif scenario == "two writers of a part without locks":
            _without_locks()
            interleave(new, range(seeds), kills=0.005, twice=True)
        else:
            sys.exit(f"no scenario {scenario}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
