"""What `autotp-plan estimate --format json` wrote, as far as it is drawn. The file may be anyone's: it is checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.planner.pictures.markup import plain
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import DocumentError, Fault, MismatchError
from autotp_plan.schemas.estimate.document import Part, RankEstimate, Traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateFile:
    """An estimate. `memory` are the bytes of one device, where it was asked whether they are enough."""

    settings: tuple[tuple[str, str], ...]
    memory: int | None
    measured: bool
    missing: tuple[str, ...]
    ranks: tuple[RankEstimate, ...]

    @property
    def fullest(self) -> RankEstimate:
        """The kind of rank that holds most."""
        return max(self.ranks, key=lambda rank: rank.peak)


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
    _check_sums(path, data["ranks"])
    return EstimateFile(
        settings=tuple((plain(name.replace("_", " ")), _said(value)) for name, value in data["settings"].items()),
        memory=data["memory"]["bytes"] if data.get("memory") is not None else None,
        measured=data["measured"],
        missing=tuple(map(plain, data.get("missing", ()))),
        ranks=tuple(_rank(one) for one in data["ranks"]),
    )


def _rank(data: dict[str, Any]) -> RankEstimate:
    return RankEstimate(
        tp_ranks=tuple(sorted(data["tp_ranks"])),
        peak=data["peak"],
        when=plain(data.get("when", "")),
        at_peak=_parts(data["at_peak"]),
        phases=_parts(data.get("phases", ())),
        host=_parts(data.get("host", ())),
        traffic=tuple(
            Traffic(
                operation=plain(one["operation"]), group=plain(one["group"]), count=one["count"], bytes=one["bytes"]
            )
            for one in data.get("traffic", ())
        ),
        forward_operations=data.get("forward_operations", 0),
        backward_operations=data.get("backward_operations", 0),
    )


def _parts(data: Iterable[dict[str, Any]]) -> tuple[Part, ...]:
    return tuple(Part(what=plain(part["what"]), bytes=part["bytes"]) for part in data)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else plain(str(value))


def _check_sums(path: Path, ranks: Sequence[dict[str, Any]]) -> None:
    sums = [sum(part["bytes"] for part in rank["at_peak"]) for rank in ranks]
    faults = [
        Fault(
            code="estimate-does-not-add-up",
            what="the parts of a peak are not its bytes",
            where=f"{path}: ranks[{at}].at_peak",
            got=str(held),
            expected=str(rank["peak"]),
            next="run `autotp-plan estimate --format json` again",
        )
        for at, (held, rank) in enumerate(zip(sums, ranks))
        if held != rank["peak"]
    ]
    if faults:
        raise DocumentError(faults)
