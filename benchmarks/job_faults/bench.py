"""A job of one ZeRO stage and one number of ranks, its states, and what its folders hold when nothing is disturbed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.job_faults.calls import Disturbance
from benchmarks.job_faults.ranks import STATES, Answer, Ranks, Server, Setting, new_store

UNDISTURBED = Disturbance()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a fault.

    Attributes:
        refused: a rank said that it did not do what it was asked for.
        resumed: the job went on from a state that had been saved.
        problem: empty; or `lost`, `silent`, `hung`.
        why: what was seen.
    """

    refused: bool = False
    resumed: bool = False
    problem: str = ""
    why: str = ""


class Bench:
    """A job, and its undisturbed folders. Use it in a `with` block.

    Args:
        server: what starts ranks.
        work: a new folder.
        setting: of the job, without a store.
        seconds: a rank that does not answer for so long hangs.
    """

    def __init__(self, server: Server, work: Path, setting: Setting, seconds: float) -> None:
        self.server, self.work, self.setting, self.seconds = server, work, setting, seconds
        self.gold, self.base, self.gold_shards = work / "gold", work / "base", work / "gold-shards"
        self.digests: dict[str, list[str]] = {}
        self.pretrained: dict[str, dict[str, bytes]] = {}
        self.number = 0
        self.state = ""
        self.logs: dict[str, Any] = {}
        self.ranks: Ranks

    def __enter__(self) -> Bench:
        self.work.mkdir()
        self._start()
        self.calls: dict[str, list[int]] = {}
        for state in STATES:
            if state == "three":
                shutil.copytree(self.gold, self.base)
                self.pretrained["two"] = self._pretrained()
            self.digests[state] = _values(self.order("step"))
            self.calls["save"] = _values(self.save(self.gold, state))
        self.state = "three"
        self.calls["save_shards"] = _values(self.save_shards(self.gold_shards))
        self.pretrained["three"] = self._pretrained()
        self.go_to("two")
        found = _values(self.order("load", self.base, None, replace(UNDISTURBED, reads=True), self.ranks.ids))
        self.calls["load"] = [count for _, count in found]
        return self

    def __exit__(self, *_: object) -> None:
        self.ranks.__exit__()

    def _pretrained(self) -> dict[str, bytes]:
        folder = self.new_folder()
        self.calls["save_pretrained"] = _values(self.save_pretrained(folder))
        return contents(folder)

    def _start(self) -> None:
        self.ranks = self.server.start(replace(self.setting, store=new_store(self.server.work)))
        self.state = ""

    def restart(self, answers: Sequence[Answer]) -> bool:
        """Start new ranks where one does not answer any more, or a call failed in the middle."""
        ended = any(answer.kind in ("dead", "hung", "raised") for answer in answers)
        if ended:
            self.ranks.__exit__()
            self._start()
        return ended

    def new_folder(self) -> Path:
        """The name of a folder that there is not yet."""
        self.number += 1
        return self.work / f"{self.number}"

    def copy_of(self, folder: Path) -> Path:
        """A copy of a folder, in a folder of its own, which may be logged."""
        parent = self.new_folder()
        parent.mkdir()
        return shutil.copytree(folder, parent / "job")

    def go_to(self, state: str) -> None:
        """Put the ranks into a state, from the undisturbed job."""
        if self.state != state:
            found = self.order("load", self.gold, state, UNDISTURBED, self.ranks.ids)
            assert all(answer.kind == "done" for answer in found), found
            assert [answer.value[0] for answer in found] == self.digests[state], f"{state} is not what was saved"
            self.state = state

    # orders

    def order(self, name: str, *arguments: Any, by_rank: Sequence[tuple[Any, ...]] = ()) -> list[Answer]:
        """An order to all ranks."""
        return self.ranks.order(name, *arguments, by_rank=by_rank, seconds=self.seconds)

    def disturbed(self, what: Disturbance, rank: int | None) -> list[tuple[Any, ...]]:
        """The last arguments of an order: one rank is disturbed, or each."""
        ids = self.ranks.ids
        return [(what if rank in (None, one) else UNDISTURBED, ids) for one in range(len(ids))]

    def write(
        self, how: str, folder: Path, what: Disturbance = UNDISTURBED, rank: int | None = None, log: Path | None = None
    ) -> list[Answer]:
        """Save: `how` is `save`, `save_shards` or `save_pretrained`."""
        arguments = (folder, "three") if how == "save" else (folder,)
        return self._write(how, arguments, what, rank, log, folder.parent)

    def save(self, folder: Path, tag: str) -> list[Answer]:
        """Save a checkpoint."""
        return self._write("save", (folder, tag), UNDISTURBED, None, None, folder.parent)

    def save_shards(self, folder: Path) -> list[Answer]:
        """Save shards."""
        return self._write("save_shards", (folder,), UNDISTURBED, None, None, folder.parent)

    def save_pretrained(self, folder: Path) -> list[Answer]:
        """Save a plain checkpoint."""
        return self._write("save_pretrained", (folder,), UNDISTURBED, None, None, folder.parent)

    def _write(
        self, how: str, arguments: tuple[Any, ...], what: Disturbance, rank: int | None, log: Path | None, root: Path
    ) -> list[Answer]:
        rest = [(*one, log, root) for one in self.disturbed(what, rank)]
        return self.order(how, *arguments, by_rank=rest)

    def load(self, folder: Path, tag: str | None, before: str) -> tuple[str, list[Answer]]:
        """Load a checkpoint into ranks that are in the state `before`: the state that it gives, and the answers.

        The state is `refused` where all ranks refuse, `mixed` where some do, `other` for one that was never saved.
        """
        self.go_to(before)
        found = self.order("load", folder, tag, UNDISTURBED, self.ranks.ids)
        self.state = ""
        kinds = {answer.kind for answer in found}
        if "hung" in kinds or "dead" in kinds:
            state = "hung" if "hung" in kinds else "dead"
        elif kinds == {"done"}:
            digests = [answer.value[0] for answer in found]
            state = next((name for name, known in self.digests.items() if known == digests), "other")
            self.state = state if state in STATES else ""
        elif any("CHANGED" in str(answer.value) for answer in found):
            state = "changed"
        elif "done" in kinds:
            state = "mixed"
        else:
            state = "refused"
            if kinds == {"refused"}:
                self.state = before
        self.restart(found)
        return state, found


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _values(answers: Sequence[Answer]) -> list[Any]:
    assert all(answer.kind == "done" for answer in answers), answers
    return [answer.value for answer in answers]
