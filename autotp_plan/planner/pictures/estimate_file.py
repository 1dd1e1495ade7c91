"""What `autotp-plan estimate --format json` wrote, as far as it is drawn. The file may be anyone's: it is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.planner.pictures.markup import plain
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import DocumentError, Fault, MismatchError


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """A kind of rank: which TP ranks, its peak in bytes, when, what is there then, and what it sends in a step."""

    tp_ranks: tuple[int, ...]
    peak: int
    when: str
    at_peak: tuple[tuple[str, int], ...]
    traffic: tuple[tuple[str, str, int, int], ...]
    operations: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateFile:
    """An estimate. `memory` are the bytes of one device, where the settings have them."""

    settings: tuple[tuple[str, str], ...]
    memory: int | None
    measured: bool
    missing: tuple[str, ...]
    ranks: tuple[RankEstimate, ...]


def read_estimate(path: Path, fingerprint: str) -> EstimateFile:
    """The estimate in a file.

    Args:
        path: the file.
        fingerprint: of the plan that it must be of.

    Raises:
        DocumentError: it cannot be read, or is no estimate.
        MismatchError: it is of another plan.
    """
    data = documents.read_json(path, "estimate")
    documents.validate(data, "estimate", "estimate")
    if data["plan"] != fingerprint:
        raise MismatchError(
            Fault(
                code="estimate-of-another-plan",
                what="the estimate is of another plan",
                where=str(path),
                got=data["plan"],
                expected=fingerprint,
                next="run `autotp-plan estimate --format json` with this plan",
            )
        )
    ranks = tuple(_rank(one) for one in data["ranks"])
    _check_sums(path, ranks)
    settings = data["settings"]
    return EstimateFile(
        settings=tuple(
            (plain(name.replace("_", " ")), _said(value)) for name, value in settings.items() if name != "memory"
        ),
        memory=settings.get("memory"),
        measured=data["measured"],
        missing=tuple(map(plain, data.get("missing", ()))),
        ranks=ranks,
    )


def _rank(data: dict[str, Any]) -> RankEstimate:
    return RankEstimate(
        tp_ranks=tuple(data["tp_ranks"]),
        peak=data["peak"],
        when=plain(data.get("when", "")),
        at_peak=tuple((plain(part["what"]), part["bytes"]) for part in data["at_peak"]),
        traffic=tuple(
            (plain(one["operation"]), plain(one["group"]), one["count"], one["bytes"])
            for one in data.get("traffic", ())
        ),
        operations=data.get("forward_operations", 0) + data.get("backward_operations", 0),
    )


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else plain(str(value))


def _check_sums(path: Path, ranks: tuple[RankEstimate, ...]) -> None:
    faults = [
        Fault(
            code="estimate-does-not-add-up",
            what="the parts of a peak are not its bytes",
            where=f"{path}: ranks[{at}].at_peak",
            got=str(sum(size for _, size in rank.at_peak)),
            expected=str(rank.peak),
            next="run `autotp-plan estimate --format json` again",
        )
        for at, rank in enumerate(ranks)
        if sum(size for _, size in rank.at_peak) != rank.peak
    ]
    if faults:
        raise DocumentError(faults)
