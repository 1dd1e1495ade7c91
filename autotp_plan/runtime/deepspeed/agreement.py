"""What all ranks must find alike before they change anything: errors, and what their files say.

A rank that fails by itself leaves the others waiting in the next collective. So each rank first does what it can do
alone, and then tells the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed

from autotp_plan.schemas.errors import AutoTPError, Fault, MismatchError, OutputError

_T = TypeVar("_T")


def are_several() -> bool:
    """Whether this process is one of several ranks, whose process groups may not have been made yet."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def together(
    work: Callable[[], _T], what: str, next_step: str = "free space or correct what is wrong, and save again"
) -> _T:
    """What `work` returns; when it fails on any rank, the error of the first of them, on all. Every rank calls it.

    Where there are several ranks, `torch.distributed` is initialised.

    Args:
        work: what this rank does. It communicates with no other rank.
        what: what could not be done, for errors of the operating system: "the checkpoint could not be written".
        next_step: what to do then.

    Raises:
        AutoTPError: what `work` raised on some rank; OutputError for an error of the operating system.
    """
    found, error = _attempt(work, what, next_step)
    for one in _of_all_ranks(error):
        if one is not None:
            raise one
    result: _T = found
    return result


def gathered(
    work: Callable[[], _T], what: str, next_step: str = "free space or correct what is wrong, and save again"
) -> list[_T]:
    """As `together`, and what `work` returned on each rank, by rank: something small that can be pickled."""
    everyone = _of_all_ranks(_attempt(work, what, next_step))
    for _, error in everyone:
        if error is not None:
            raise error
    return [found for found, _ in everyone]


def _attempt(work: Callable[[], _T], what: str, next_step: str) -> tuple[Any, AutoTPError | None]:
    """What `work` returns, or the error that it ends in."""
    try:
        return work(), None
    except AutoTPError as raised:
        return None, raised
    except (OSError, EOFError) as raised:
        return None, OutputError(
            Fault(
                code="operating-system",
                what=what,
                where=str(getattr(raised, "filename", None) or "the folder"),
                got=getattr(raised, "strerror", None) or str(raised),
                expected="a folder that all ranks can write to",
                next=next_step,
            )
        )


def check_same(values: Mapping[str, str | None], *, what: str, where: str, next_step: str) -> None:
    """Compare what each rank has found. Every rank calls it.

    Args:
        values: by a name for people, what this rank has found.
        what: what is wrong when a value differs between ranks.
        where: in which call, or where the values come from.
        next_step: what to do then.

    Raises:
        MismatchError: a value differs between ranks. The same on every rank.
    """
    found = _of_all_ranks(dict(values))
    faults = [
        Fault(
            code="ranks-differ",
            what=what,
            where=f"{where}: {name}",
            got=_by_rank([one[name] for one in found]),
            expected=f"the same {name} on all ranks",
            next=next_step,
        )
        for name in values
        if len({one[name] for one in found}) > 1
    ]
    if faults:
        raise MismatchError(faults)


def _of_all_ranks(value: Any) -> list[Any]:
    """What each rank gives, by rank; a collective where there are several."""
    if not are_several():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _by_rank(values: list[str | None]) -> str:
    """`rank 0, 1, 2: step4; rank 3: step2`."""
    ranks: dict[str | None, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(f"rank {', '.join(of)}: {value if value is not None else 'none'}" for value, of in ranks.items())
