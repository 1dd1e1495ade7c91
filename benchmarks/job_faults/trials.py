"""One function for each kind of fault: it makes the fault, lets the job go on, and says what came of it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.jobs.job_lock import LOCK_NAME
from autotp_plan.schemas.jobs.job_manifest import UNFINISHED_NAME
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME
from benchmarks.job_faults import disk
from benchmarks.job_faults.bench import Bench, Outcome
from benchmarks.job_faults.calls import Disturbance
from benchmarks.job_faults.damage import DAMAGES, Damage
from benchmarks.job_faults.judge import judge_job, judge_shards, judge_written, problem_of, said

Trial = Callable[[Bench, Random], Outcome]

WRITES = ("save", "save", "save", "save_shards", "save_pretrained")


def _a_call(bench: Bench, random: Random, how: str) -> tuple[int, int]:
    """A random rank that calls anything, and the number of one of its calls."""
    rank = random.choice([rank for rank, count in enumerate(bench.calls[how]) if count])
    return rank, random.randint(1, bench.calls[how][rank])


# while a job is saved


def while_saving(bench: Bench, random: Random, action: str, error: int = 0) -> Outcome:
    """A save of some kind is disturbed at a random call of a random rank."""
    how = random.choice(WRITES)
    rank, number = _a_call(bench, random, how)
    what = Disturbance(action=action, number=number, error=error)
    folder = _folder_to_write(bench, how)
    bench.go_to("three")
    answers = bench.write(how, folder, what, rank)
    name = f"{how}, rank {rank}, call {number}"
    killed = action.startswith("kill")
    problem = "hung" if any(answer.kind == "hung" for answer in answers) else "" if killed else problem_of(answers)
    bench.restart(answers)
    if problem:
        return Outcome(problem=problem, why=f"{name}: {said(answers)}")
    saved = all(answer.kind == "done" for answer in answers)
    found = judge_written(bench, how, folder, saved=saved)
    return replace(found, refused=not saved, why=f"{name}: {said(answers)}: {found.why}")


def _folder_to_write(bench: Bench, how: str) -> Path:
    """What there is before: two checkpoints; no shards; an earlier plain checkpoint."""
    if how == "save":
        return bench.copy_of(bench.base)
    folder = bench.new_folder() / "out"
    folder.parent.mkdir()
    if how == "save_pretrained":
        folder.mkdir()
        for name, data in bench.pretrained["two"].items():
            (folder / name).write_bytes(data)
    return folder


# the power goes


def power_loss(bench: Bench, random: Random) -> Outcome:
    """A save was logged; the disk has what it may have after a random one of its calls."""
    how = random.choice(WRITES)
    first = how == "save" and random.random() < 0.3
    name = "first saves" if first else how
    if name not in bench.logs:
        bench.logs[name] = _logged(bench, how, first)
    before, root, logged = bench.logs[name]
    cut = len(logged) if random.random() < 0.2 else random.randrange(len(logged) + 1)
    lost = random.choice(("all", "synced", "names", "random", "random"))
    found = disk.Disk(before)
    found.root = root
    marks = []
    for event in logged[:cut]:
        if event.kind == disk.MARK:
            marks.append(event.path)
        else:
            found.apply(event)
    after = bench.new_folder()
    found.write(after, lost, random)
    folder = after / ("job" if how == "save" else "out")
    why = f"{name}, after {cut} of {len(logged)} calls, {lost}: "
    if not folder.exists():
        problem = "lost" if how != "save_shards" or marks else ""
        return Outcome(problem="" if first and not marks else problem, why=f"{why}no folder")
    if how == "save":
        states = ["one", "two"] if first else ["two", "three"]
        right = states[states.index(marks[-1]) :] if marks else states
        judged = judge_job(bench, folder, right, none_yet=first and not marks)
    else:
        judged = judge_written(bench, how, folder, saved=bool(marks), again=random.random() < 0.3)
    return replace(judged, why=why + judged.why)


def _logged(bench: Bench, how: str, first: bool) -> tuple[Path, Path, list[disk.Event]]:
    """Saves that are not disturbed: the folder before them, the folder that was logged, and the log."""
    log = bench.new_folder()
    folder = bench.new_folder() / "job" if first else _folder_to_write(bench, how)
    if first:
        folder.parent.mkdir()
    before = shutil.copytree(folder.parent, bench.new_folder())
    for state in ("one", "two") if first else ("three",):
        bench.go_to(state)
        if first:
            answers = bench._write("save", (folder, state), Disturbance(), None, log, folder.parent)
        else:
            answers = bench.write(how, folder, log=log)
        assert all(answer.kind == "done" for answer in answers), answers
        disk.mark(log, state)
    return before, folder.parent, list(disk.events(log))


# while a job is loaded


def while_loading(bench: Bench, random: Random, action: str, error: int = 0) -> Outcome:
    """Loading is disturbed at a random call of a random rank that reads; then it is loaded again."""
    rank, number = _a_call(bench, random, "load")
    what = Disturbance(action=action, number=number, error=error, reads=True)
    folder = bench.copy_of(bench.base)
    bench.go_to("one")
    answers = bench.order("load", folder, None, by_rank=bench.disturbed(what, rank))
    bench.state = ""
    name = f"rank {rank}, call {number}: {said(answers)}"
    problem = "hung" if any(answer.kind == "hung" for answer in answers) else ""
    if action != "kill" and not problem:
        problem = problem_of(answers)
    digests = [answer.value[0] for answer in answers if answer.kind == "done"]
    if len(digests) == len(answers) and digests != bench.digests["two"]:
        problem = "silent"
    bench.restart(answers)
    if problem:
        return Outcome(problem=problem, why=name)
    found = judge_job(bench, folder, ("two",))
    return replace(found, refused=len(digests) < len(answers), why=f"{name}: {found.why}")


# what lies on the disk


def damaged(bench: Bench, random: Random, damage: Damage) -> Outcome:
    """The latest checkpoint is damaged: it is refused, and the one before is named, and can be loaded."""
    folder = bench.copy_of(bench.base)
    name = damage(folder, random)
    state, answers = bench.load(folder, None, random.choice(("one", "three")))
    why = f"{name}: loading gives {state}: {said(answers)}"
    if state == "two":
        return Outcome(resumed=True, why=why)
    if state in ("hung", "dead"):
        return Outcome(problem="hung", why=why)
    if state != "refused":
        return Outcome(problem="silent", why=why)
    named = {tuple(re.findall(r'tag="(\w+)"', str(answer.value))) for answer in answers}
    if len(named) != 1 or not (tags := named.pop()) or len(set(tags)) != 1 or tags[0] not in ("one", "two"):
        return Outcome(refused=True, problem="lost", why=f"{why}: no sound checkpoint is named")
    state, answers = bench.load(folder, tags[0], "three")
    if state != tags[0]:
        problem = "hung" if state in ("hung", "dead") else "lost" if state == "refused" else "silent"
        return Outcome(refused=True, problem=problem, why=f"{why}: {tags[0]} is {state}: {said(answers)}")
    return Outcome(refused=True, resumed=True, why=why)


def damaged_shards(bench: Bench, random: Random) -> Outcome:
    """Saved shards are damaged: `check` says so."""
    folder = bench.copy_of(bench.gold_shards)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    path = random.choice(paths)
    data = bytearray(path.read_bytes())
    how = random.choice(("flip", "zero", "truncate", "swap"))
    if how == "truncate":
        del data[random.randrange(len(data)) :]
    elif how == "zero":
        data[:] = bytes(len(data))
    elif how == "swap":
        other = random.choice([one for one in paths if one != path and one.read_bytes() != data])
        data[:] = other.read_bytes()
    else:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    try:
        read_shards(folder).verify()
    except AutoTPError as error:
        return Outcome(refused=True, why=str(error)[:200])
    return Outcome(problem="silent", why=f"{path.name}: {how}")


# what others left, and others at work


def stale_lock(bench: Bench, random: Random) -> Outcome:
    """A lock file that nobody holds, whatever it says; on a file system with locks, or without."""
    folder = bench.copy_of(bench.base)
    lock = folder / LOCK_NAME
    owner = '{"host": "%s", "pid": 999999999, "began": 7, "since": "2026-01-01T00:00:00", "job": ""}'
    text = random.choice(("", "{", owner % os.uname().nodename, owner % "elsewhere", '{"host": 3}', "\0" * 90))
    lock.write_text(text)
    error = random.choice((0, 0, errno.ENOTSUP, errno.ENOLCK))
    bench.go_to("three")
    bench.order("without_locks", error)
    answers = bench.write("save", folder)
    bench.order("without_locks", 0)
    why = f"{text!r}, lock error {error}: {said(answers)}"
    saved = all(answer.kind == "done" for answer in answers)
    if problem := problem_of(answers):
        return Outcome(problem=problem, why=why)
    if not saved and not (error and "elsewhere" in text):
        return Outcome(problem="lost", why=f"{why}: it blocks the next save")
    bench.restart(answers)
    found = judge_written(bench, "save", folder, saved=saved, again=False)
    return replace(found, refused=not saved, why=f"{why}: {found.why}")


def remains(bench: Bench, random: Random) -> Outcome:
    """What an earlier save that died may have left: it does not block the next one."""
    how = random.choice(("save", "save_shards"))
    bench.go_to("three")
    if how == "save":
        folder = bench.copy_of(bench.base)
        unfinished = folder / "three"
        unfinished.mkdir()
        (unfinished / UNFINISHED_NAME).touch()
        names = sorted(path.name for path in (folder / "two").iterdir())
        left = random.sample(names, random.randrange(len(names)))
        for name in left:
            data = (folder / "two" / name).read_bytes()
            (unfinished / name).write_bytes(data[: random.randrange(len(data) + 1)])
        (folder / ".latest.12ab34cd.tmp").write_bytes(random.choice((b"", b"thr")))
    else:
        folder = bench.new_folder()
        folder.mkdir()
        journal = random.choice((b"", b'{"comm', b'{"command":"save_shards"}\n', b'{"command":"save_shards"}\n{"na'))
        (folder / JOURNAL_NAME).write_bytes(journal)
        names = [f".{path.name}.tmp" for path in sorted(bench.gold_shards.iterdir())]
        left = random.sample(names, random.randrange(len(names)))
        for name in left:
            (folder / name).write_bytes(b"half")
        left.append(str(journal))
    answers = bench.write(how, folder)
    why = f"{how}: {left}: {said(answers)}"
    bench.restart(answers)
    if any(answer.kind != "done" for answer in answers):
        hung = any(answer.kind == "hung" for answer in answers)
        return Outcome(problem="hung" if hung else "lost", why=f"{why}: it blocks the next save")
    found = judge_written(bench, how, folder, saved=True, again=False)
    return replace(found, why=f"{why}: {found.why}")


def two_jobs(bench: Bench, random: Random, other: Bench) -> Outcome:
    """A job stops at a random call of its save; another one saves to the same folder; the first one goes on."""
    how = random.choice(("save", "save", "save_shards"))
    folder = _folder_to_write(bench, how)
    rank, number = _a_call(bench, random, how)
    bench.go_to("three")
    other.go_to("three")
    stop = Disturbance(action="stop", number=number)
    arguments = (folder, "three") if how == "save" else (folder,)
    rest = [(*one, None, folder.parent) for one in bench.disturbed(stop, rank)]
    bench.ranks.give(how, *arguments, by_rank=rest)
    _wait_until_stopped(bench.ranks.ids[rank])
    theirs = other.write(how, folder) if random.random() < 0.7 or how != "save" else other.save(folder, "four")
    os.kill(bench.ranks.ids[rank], signal.SIGCONT)
    answers = bench.ranks.answers(bench.seconds)
    why = f"{how}, rank {rank}, stopped at call {number}: {said(answers)}; the other: {said(theirs)}"
    bench.restart(answers)
    other.restart(theirs)
    if problem := problem_of(answers) or problem_of(theirs):
        return Outcome(problem=problem, why=why)
    done = [one for one, said in ((bench, answers), (other, theirs)) if all(answer.kind == "done" for answer in said)]
    for one in (bench, other):
        one.order("release", folder)
    if how == "save_shards":
        judged = judge_shards(done[0], folder, saved=True) if done else Outcome()
    elif len(done) == 1:
        known, bench.digests = bench.digests, {**bench.digests, "three": done[0].digests["three"]}
        judged = judge_job(bench, folder, ("three",))
        bench.digests = known
        bench.state = ""
    else:
        judged = judge_job(bench, folder, ("two",))
    if not judged.problem and len(done) > 1:
        judged = Outcome(problem="silent", why="both say that they have saved")
    return replace(judged, refused=len(done) < 2, why=f"{why}: {judged.why}")


def _wait_until_stopped(process: int) -> None:
    for _ in range(2000):
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.002)


TRIALS: dict[str, Trial] = {
    "save: a rank killed": partial(while_saving, action="kill"),
    "save: all ranks killed": partial(while_saving, action="kill all"),
    "save: short write": partial(while_saving, action="short"),
    "save: EIO": partial(while_saving, action="fail", error=errno.EIO),
    "save: ENOSPC on one rank": partial(while_saving, action="fail from there", error=errno.ENOSPC),
    "save: power loss": power_loss,
    "load: a rank killed": partial(while_loading, action="kill"),
    "load: short read": partial(while_loading, action="short"),
    "load: EIO": partial(while_loading, action="fail", error=errno.EIO),
    **{f"job: {name}": partial(damaged, damage=damage) for name, damage in DAMAGES.items()},
    "shards: damaged": damaged_shards,
    "stale lock": stale_lock,
    "remains of a save": remains,
}
"""All but `two_jobs`, which needs another job."""

WEIGHTS = {"save: power loss": 4.0, "job: bit flipped": 2.0, "save: EIO": 2.0, "save: ENOSPC on one rank": 1.5}
"""How often a kind is tried, where it is not once."""
