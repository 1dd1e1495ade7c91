"""All kinds of faults, in all settings, in the order of a random number; and the table of what came of them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.job_faults.bench import Bench, Outcome
from benchmarks.job_faults.ranks import Server, Setting
from benchmarks.job_faults.trials import TRIALS, WEIGHTS, Trial, two_jobs

TWO_JOBS = "two jobs, one folder"


class Table:
    """How often each kind was tried in each setting, and what came of it."""

    def __init__(self, settings: Sequence[tuple[int, int]]) -> None:
        self.settings = settings
        self.tried: Counter[tuple[str, tuple[int, int]]] = Counter()
        self.came: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []

    @property
    def total(self) -> int:
        """How many faults there were."""
        return sum(self.tried.values())

    def add(self, kind: str, setting: tuple[int, int], outcome: Outcome) -> str:
        """Count an outcome; returns what is to be said of it."""
        self.tried[kind, setting] += 1
        self.came[kind, "refused"] += outcome.refused
        self.came[kind, "resumed"] += outcome.resumed
        if not outcome.problem:
            return ""
        self.came[kind, outcome.problem] += 1
        ranks, stage = setting
        said = f"{outcome.problem.upper()}: {kind}, ZeRO {stage}, {ranks} ranks: {outcome.why}"
        self.problems.append(said)
        return said

    def text(self) -> str:
        """The table."""
        kinds = list(dict.fromkeys(kind for kind, _ in self.tried))
        heads = [f"Z{stage}x{ranks}" for ranks, stage in self.settings]
        results = ("refused", "resumed", "lost", "silent", "hung")
        lines = [f"{'':26}" + "".join(f"{head:>6}" for head in (*heads, "all")) + "".join(f"{r:>9}" for r in results)]
        for kind in [*kinds, ""]:
            names = [kind] if kind else kinds
            counts = [sum(self.tried[name, setting] for name in names) for setting in self.settings]
            came = [sum(self.came[name, result] for name in names) for result in results]
            cells = "".join(f"{count:>6}" for count in (*counts, sum(counts))) + "".join(f"{n:>9}" for n in came)
            lines.append(f"{kind or 'all':26}{cells}")
        return "\n".join(lines)


def run(
    work: Path,
    *,
    count: int,
    seconds: float,
    seed: int,
    settings: Sequence[tuple[int, int]],
    kinds: str = "",
    planted: str = "",
    hang: float = 60,
    say: Callable[[str], None] = print,
    until_found: bool = False,
    server: Server | None = None,
) -> Table:
    """Make `count` faults, divided over the settings.

    Args:
        work: an empty folder, best in memory.
        count: how many faults.
        seconds: stop after so long; 0 for never.
        seed: decides every fault.
        settings: pairs of a number of ranks and a ZeRO stage.
        kinds: only those whose name holds this.
        planted: a weakness, of `planted.PLANTED`.
        hang: seconds after which a rank hangs.
        say: called with what is worth saying meanwhile.
        until_found: stop at the first that is lost, silent or hung.
        server: what starts ranks; None for a new one.
    """
    table, started = Table(settings), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:  # what was tried until then is shown
        server = server or stack.enter_context(Server(work))
        model = server.prepare(work / "model")
        for number, (ranks, stage) in enumerate(settings):
            share = count * (number + 1) // len(settings) - count * number // len(settings)
            end = started + seconds * (number + 1) / len(settings) if seconds else float("inf")
            setting = Setting(
                world_size=ranks, zero_stage=stage, model=model, store=work, seed=seed + 1, planted=planted
            )
            _run_setting(server, work, setting, table, share, end, Random(f"{seed} {ranks} {stage}"), kinds, hang, say,
                         until_found)  # fmt: skip
            say(f"ZeRO {stage}, {ranks} ranks: {table.total} faults, {time.monotonic() - started:.0f} s")
            if until_found and table.problems:
                break
    return table


def _run_setting(
    server: Server,
    work: Path,
    setting: Setting,
    table: Table,
    count: int,
    end: float,
    random: Random,
    only: str,
    hang: float,
    say: Callable[[str], None],
    until_found: bool,
) -> None:
    key = (setting.world_size, setting.zero_stage)
    home = work / f"ranks-{key[0]}-stage-{key[1]}"
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(Bench(server, home, setting, hang))
        trials: dict[str, Trial] = dict(TRIALS)
        if only in TWO_JOBS:
            from dataclasses import replace

            other = Bench(server, work / f"{home.name}-other", replace(setting, seed=setting.seed + 1), hang)
            trials[TWO_JOBS] = partial(two_jobs, other=stack.enter_context(other))
        names = [name for name in trials if only in name]
        weights = [WEIGHTS.get(name, 1.0) for name in names]
        order = names[:count] + random.choices(names, weights, k=max(0, count - len(names)))
        for name in order:
            if time.monotonic() > end:
                break
            said = table.add(name, key, trials[name](bench, random))
            if said:
                say(said)
                if until_found:
                    break
            for path in home.glob("[0-9]*"):
                if not any(path in log for log in bench.logs.values()):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    shutil.rmtree(home)
