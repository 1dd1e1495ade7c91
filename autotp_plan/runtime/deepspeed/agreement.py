"""What all ranks must find alike before they change anything: errors, and what their files say.

A rank that fails by itself leaves the others waiting in the next collective. So each rank first does what it can do
alone, and then tells the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed
from deepspeed.utils import logger

from autotp_plan.runtime.deepspeed.attendance import watched
from autotp_plan.schemas.errors import AutoTPError, FailedRankError, Fault, MismatchError, OutputError

_T = TypeVar("_T")
Value = str | Mapping[str, str] | None
_SHOWN = 8
"""Entries of a document that differ, and are named."""


def are_several() -> bool:
    """Whether this process is one of several ranks, whose process groups may not have been made yet."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_rank() -> bool:
    """Whether this process is the first of all ranks, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


_AGAIN = "free space or correct what is wrong, and save again"


def together(work: Callable[[], _T], what: str, next_step: str = _AGAIN) -> _T:
    """What `work` returns; when it fails on any rank, one error on all of them. Every rank calls it.

    Where there are several ranks, `torch.distributed` is initialised.

    Args:
        work: what this rank does. It communicates with no other rank.
        what: what could not be done, for errors that are not ours: "the checkpoint could not be written".
        next_step: what to do then.

    Raises:
        AutoTPError: what `work` raised on the first rank on which it failed; OutputError for an error of the operating
            system, FailedRankError for any other. Where every rank fails with an error of another kind, each raises
            its own.
    """
    found, error, cause = _attempt(work, what, next_step)
    _raise_first(_of_all_ranks(error), cause)
    result: _T = found
    return result


def gathered(work: Callable[[], _T], what: str, next_step: str = _AGAIN) -> list[_T]:
    """As `together`, and what `work` returned on each rank, by rank: something small that can be pickled."""
    found, error, cause = _attempt(work, what, next_step)
    everyone = _of_all_ranks((found, error))
    _raise_first([error for _, error in everyone], cause)
    return [found for found, _ in everyone]


def in_step(work: Callable[[], _T], what: str, next_step: str = _AGAIN) -> _T:
    """As `together`, for work that communicates with the other ranks: they may wait for a rank that failed in it.

    Such a rank cannot be called back. It is told through the store of the process group, and ends its process when it
    is not out of its collective half a minute later.

    Args:
        work: what every rank does.
        what: what could not be done.
        next_step: what to do then.

    Raises:
        FailedRankError: `work` failed on some rank, and not on all. An error of ours is raised as it is.
    """
    with watched(what) as watch:
        found, error, cause = _attempt(work, what, next_step, of_system=False)
        if error is not None:
            watch.tell(f"{error}")
        try:
            everyone = _of_all_ranks(error)
        except FailedRankError:
            if error is not None:
                raise error from cause
            raise
    _raise_first(everyone, cause)
    result: _T = found
    return result


def _attempt(
    work: Callable[[], _T], what: str, next_step: str, of_system: bool = True
) -> tuple[Any, AutoTPError | None, Exception | None]:
    """What `work` returns, or the error for all ranks and the exception that it stands for."""
    try:
        return work(), None, None
    except AutoTPError as raised:
        return None, raised, raised
    except Exception as raised:  # memory that is full, or a mistake: whatever it is, the other ranks wait
        if not (of_system and isinstance(raised, (OSError, EOFError))):
            if not are_several():
                raise
            return None, FailedRankError(_unexpected(raised, what, next_step)), raised
        fault = Fault(
            code="operating-system",
            what=what,
            where=str(getattr(raised, "filename", None) or "the folder"),
            got=getattr(raised, "strerror", None) or str(raised),
            expected="a folder that all ranks can write to",
            next=next_step,
        )
        return None, OutputError(fault), raised


def _unexpected(raised: Exception, what: str, next_step: str) -> Fault:
    lines = traceback.extract_tb(raised.__traceback__)
    return Fault(
        code="rank-failed",
        what=what,
        where=f"{lines[-1].filename}:{lines[-1].lineno}",
        got="".join(traceback.format_exception_only(raised)).strip(),
        expected="no error on any rank",
        next=next_step,
    )


def _raise_first(errors: Sequence[AutoTPError | None], cause: Exception | None) -> None:
    """Raise the error of the first rank that failed, with the ranks that have it where others do not."""
    first = next((error for error in errors if error is not None), None)
    if first is None:
        return
    if cause is not None and all(isinstance(error, FailedRankError) for error in errors):
        raise cause
    failed = [rank for rank, error in enumerate(errors) if error is not None and error.faults == first.faults]
    if len(failed) < len(errors):
        ranks = f"{'ranks' if len(failed) > 1 else 'rank'} {', '.join(map(str, failed))}"
        first = type(first)([dataclasses.replace(one, where=f"{one.where} ({ranks})") for one in first.faults])
    raise first from cause if not isinstance(cause, AutoTPError) else None


def check_same(
    values: Mapping[str, Value], *, what: str, where: str, next_step: str, warn_of: Mapping[str, Value] | None = None
) -> None:
    """Compare what each rank has found, in one small collective. Every rank calls it.

    Args:
        values: by a name for people, what this rank has found; of a mapping only a digest is sent, and its entries
            where they differ.
        what: what is wrong when a value differs between ranks.
        where: in which call, or where the values come from.
        next_step: what to do then.
        warn_of: values that may differ, of which the first rank then warns.

    Raises:
        MismatchError: a value differs between ranks. The same on every rank.
    """
    both = {**values, **(warn_of or {})}
    mine = {name: _digest(value) for name, value in both.items()}
    found = _of_all_ranks(mine)
    different = [name for name in mine if len({one[name] for one in found}) > 1]
    documents = {name: both[name] for name in different if isinstance(both[name], Mapping)}
    in_full = _of_all_ranks(documents) if documents else []
    faults = []
    for name in different:
        shown = _entries(name, found, in_full if name in documents else None)
        found_here = [
            Fault(
                code="ranks-differ",
                what=what,
                where=f"{where}: {entry}",
                got=_by_rank(of_ranks),
                expected=f"the same {entry} on all ranks",
                next=next_step,
            )
            for entry, of_ranks in shown
        ]
        if name in values:
            faults += found_here
        elif torch.distributed.get_rank() == 0:
            for one in found_here:
                logger.warning(f"{one.where} differs between ranks: {one.got}")
    if faults:
        raise MismatchError(faults)


def _digest(value: Value) -> str | None:
    if value is None or isinstance(value, str):
        return value
    lines = "\n".join(f"{name} = {text}" for name, text in sorted(value.items()))
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()


def _entries(
    name: str, found: Sequence[Mapping[str, str | None]], in_full: Sequence[Mapping[str, Any]] | None
) -> list[tuple[str, list[str | None]]]:
    """What differs of a value, with what each rank has."""
    if in_full is None:
        return [(name, [one[name] for one in found])]
    documents = [one[name] for one in in_full]
    entries = sorted({entry for document in documents for entry in document})
    different = [entry for entry in entries if len({document.get(entry) for document in documents}) > 1]
    shown = [(f"{name}: {entry}", [document.get(entry) for document in documents]) for entry in different[:_SHOWN]]
    if len(different) > _SHOWN:
        shown.append((f"{name}: {len(different) - _SHOWN} more", [f"as rank {rank}" for rank in range(len(found))]))
    return shown


def _of_all_ranks(value: Any) -> list[Any]:
    """What each rank gives, by rank; a collective where there are several."""
    if not are_several():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(found, value)
    except RuntimeError as error:
        raise FailedRankError(
            Fault(
                code="rank-ended",
                what="a rank has ended, or cannot be reached any more",
                where=f"the process group of all {len(found)} ranks",
                got=str(error).strip().partition("\n")[0],
                expected="every rank to make the same calls until the last one",
                next="look at the output of the other ranks for the one that ended first, and start the job again",
            )
        ) from error
    return found


def _by_rank(values: Sequence[str | None]) -> str:
    """`rank 0, 1, 2: step4; rank 3: step2`."""
    ranks: dict[str | None, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(f"rank {', '.join(of)}: {value if value is not None else 'none'}" for value, of in ranks.items())
