"""What came of a fault: whether the job goes on from what was saved, and whether the ranks said the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.shards.folder import is_unfinished, read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from benchmarks.job_faults.bench import Bench, Outcome, contents
from benchmarks.job_faults.ranks import Answer


def problem_of(answers: Sequence[Answer]) -> str:
    """What is wrong with the answers to an order whatever came of it."""
    kinds = {answer.kind for answer in answers}
    if "hung" in kinds:
        return "hung"
    return "silent" if "done" in kinds and kinds & {"refused", "raised"} else ""


def said(answers: Sequence[Answer]) -> str:
    return "; ".join(f"rank {rank} {answer.kind} {str(answer.value)[:300]}" for rank, answer in enumerate(answers))


def judge_written(bench: Bench, how: str, folder: Path, saved: bool, again: bool = True) -> Outcome:
    """What is in a folder after a save, which may have failed; then it is saved again."""
    if how == "save":
        found = judge_job(bench, folder, ("three",) if saved else ("two", "three"))
    elif how == "save_shards":
        found = judge_shards(bench, folder, saved)
    else:
        found = judge_pretrained(bench, folder, saved)
    if found.problem or not again:
        return found
    bench.go_to("three")
    if how == "save":
        answers = bench.save(folder, "four")
    elif how == "save_shards" and (folder / MANIFEST_NAME).exists():
        return found
    else:
        answers = bench.write(how, folder)
    bench.restart(answers)
    if any(answer.kind != "done" for answer in answers):
        problem = "hung" if any(answer.kind == "hung" for answer in answers) else "lost"
        return Outcome(problem=problem, why=f"it cannot be saved again: {said(answers)}")
    after = judge_written(bench, how, folder, saved=True, again=False)
    return after if after.problem else found


def judge_job(bench: Bench, folder: Path, right: Sequence[str], none_yet: bool = False) -> Outcome:
    """The latest checkpoint is one of those that are right."""
    state, answers = bench.load(folder, None, "one" if "one" not in right else "three")
    if state in right:
        return Outcome(resumed=True)
    if state == "refused" and none_yet:
        return Outcome(refused=True)
    problem = {"refused": "lost", "hung": "hung", "dead": "hung"}.get(state, "silent")
    return Outcome(problem=problem, why=f"loading gives {state}, not {' or '.join(right)}: {said(answers)}")


def judge_shards(bench: Bench, folder: Path, saved: bool) -> Outcome:
    """Finished shards are those of an undisturbed save; unfinished ones are not taken for shards."""
    finished = (folder / MANIFEST_NAME).exists() and not is_unfinished(folder)
    if not finished:
        return Outcome(problem="lost" if saved else "", why="save_shards said that it was done")
    try:
        read_shards(folder).verify()
    except AutoTPError as error:
        return Outcome(problem="lost" if saved else "", why=str(error))
    now, expected = contents(folder), contents(bench.gold_shards)
    if {name: data for name, data in now.items() if not name.startswith(".")} != expected:
        return Outcome(problem="silent", why="sound shards are not what was saved")
    return Outcome(resumed=True)


def judge_pretrained(bench: Bench, folder: Path, saved: bool) -> Outcome:
    """A plain checkpoint that transformers would read is one that was saved, not parts of two."""
    found = contents(folder)
    now = _weights(found)
    index = json.loads(now.get("model.safetensors.index.json", b'{"weight_map": {"": "nothing"}}'))
    readable = "model.safetensors" in now or now.keys() >= {*index["weight_map"].values()}
    states = [state for state, known in bench.pretrained.items() if now == _weights(known)]
    if states == ["two"] and saved:
        return Outcome(problem="lost", why="save_pretrained said that it was done")
    if states:
        known = bench.pretrained[states[0]]
        wrong = [name for name in known if found.get(name) != known[name]]
        return Outcome(problem="lost", why=f"{wrong}") if wrong else Outcome(resumed=True)
    if readable or saved:
        return Outcome(problem="silent", why=f"{sorted(now)} are of no save")
    return Outcome()


def _weights(files: dict[str, bytes]) -> dict[str, bytes]:
    endings = (".safetensors", ".index.json")
    return {name: data for name, data in files.items() if name.endswith(endings) and not name.startswith(".")}
