"""The plan document: which intervals of which parameter each TP rank holds, and how each module runs.

A `Plan` that was read is consistent: its schema, version, fingerprint, references and interval arithmetic were checked.
Whether it fits a checkpoint, a model or a training job is for others to say. Whoever works with plans imports them, and
their entries, from here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.codec import decode, encode
from autotp_plan.schemas.errors import DocumentError, Fault
from autotp_plan.schemas.plan.entries import (
    MAX_TP_SIZE,
    NOT_READ,
    VERSION,
    Crossing,
    Dequantization,
    ModelIdentity,
    ModuleAttribute,
    Operation,
    Parameter,
    PlanEntries,
    PlannedModule,
    Repository,
    RuntimeOptions,
    SequenceParallel,
    Sources,
    Style,
    Tie,
)
from autotp_plan.schemas.plan.stamp import Stamp
from autotp_plan.schemas.plan.validate import plan_faults

__all__ = [
    "FORMAT",
    "MAX_TP_SIZE",
    "VERSION",
    "Crossing",
    "Dequantization",
    "ModelIdentity",
    "ModuleAttribute",
    "Operation",
    "Parameter",
    "Plan",
    "PlannedModule",
    "Repository",
    "RuntimeOptions",
    "SequenceParallel",
    "Sources",
    "Style",
    "Tie",
]

FORMAT = "autotp-plan"
_NOT_COVERED = ("fingerprint", "rules", "verified")


@dataclass(frozen=True, kw_only=True)
class Plan(PlanEntries):
    """A plan. Reading and writing it are its only methods beyond those of its entries."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in the file `path`.

        Raises:
            DocumentError: with every fault found, as `from_dict`.
        """
        return cls.from_dict(documents.read_json(Path(path), "plan"))

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan that the JSON value `data` is.

        Raises:
            DocumentError: another format version, a breach of the schema, a wrong fingerprint, or entries that
                contradict each other; with every fault found.
        """
        _check_version(data)
        documents.validate(data, "plan", "plan")
        plan = decode(cls, {key: value for key, value in data.items() if key not in ("format", "fingerprint")})
        faults = _fingerprint_faults(data) + list(itertools.islice(plan_faults(plan), documents.MOST_FAULTS))
        if faults:
            raise DocumentError(faults)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of the plan, with what its fingerprint does not cover."""
        data = {key: value for key, value in self._data.items() if key not in _NOT_COVERED}
        data["fingerprint"] = self.fingerprint
        added = {"rules": self.rules, "verified": self.verified}
        return {**data, **{key: encode(value) for key, value in added.items() if value is not None}}

    def to_json(self) -> str:
        """The text of a plan file: the same plan gives the same bytes.

        Raises:
            DocumentError: it would be larger than what `read` reads.
        """
        return documents.refuse_unreadable(documents.format_json(self.to_dict(), width=220), "plan")

    def sealed(self, stamp: Stamp) -> Stamp:
        """The stamp, bound to what this plan says and to its rules."""
        rules = None if self.rules is None else encode(self.rules)
        return dataclasses.replace(stamp, seal=_seal(self.fingerprint, rules, encode(stamp)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """`sha256:` and the hash over all but the repository, the rules, the stamp and notes on what was not read."""
        return documents.fingerprint(_covered(self._data))

    @property
    def _data(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": self.version, **encode(self)}


def _covered(data: dict[str, Any]) -> dict[str, Any]:
    """What the fingerprint covers: what the plan says, and not how it was compiled or that it was proven.

    Nor what else lay in the folder: the same model has the same plan, wherever it is.
    """
    kept = {key: value for key, value in data.items() if key not in (*_NOT_COVERED, "notes")}
    notes = [note for note in data.get("notes", ()) if NOT_READ not in note]
    if notes:
        kept["notes"] = notes
    return {**kept, "model": {key: value for key, value in data["model"].items() if key != "repository"}}


def _seal(plan: str, rules: Any, stamp: dict[str, Any]) -> str:
    """The hash that binds a stamp to its plan."""
    kept = {key: value for key, value in stamp.items() if key != "seal"}
    return documents.fingerprint({"plan": plan, "rules": rules, "stamp": kept})


def _check_version(data: Any) -> None:
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, str) or version.split(".")[0] == VERSION.split(".")[0]:
        return  # the schema says the rest
    raise DocumentError(
        Fault(
            code="plan-version",
            what="the plan is of another format version",
            where="version",
            got=version,
            expected=f"{VERSION.split('.')[0]}.x",
            next="compile the plan again with this version of autotp-plan, or install the version that wrote it",
        )
    )


def _seal_faults(plan: str, rules: Any, stamp: dict[str, Any]) -> list[Fault]:
    """A stamp whose seal is of other numbers, or of a plan by other rules. One of version 0.1 has no seal."""
    seal = stamp.get("seal")
    if seal is None or seal == _seal(plan, rules, stamp):
        return []
    return [
        Fault(
            code="stamp-changed",
            what="the stamp, or the rules that the plan was compiled by, was changed after the proof",
            where="verified.seal",
            got=seal,
            expected=_seal(plan, rules, stamp),
            next="remove the key `verified`, then run `autotp-plan verify`",
        )
    ]


def _fingerprint_faults(data: dict[str, Any]) -> list[Fault]:
    actual = documents.fingerprint(_covered(data))
    stamp = data.get("verified", {})
    proved = stamp.get("plan", actual)
    if actual == data["fingerprint"] == proved:
        return _seal_faults(actual, data.get("rules"), stamp)
    if actual == data["fingerprint"]:
        return [
            Fault(
                code="stamp-of-another-plan",
                what="the plan bears the stamp of another plan",
                where="verified.plan",
                got=proved,
                expected=actual,
                next="remove the key `verified`, then run `autotp-plan verify`",
            )
        ]
    return [
        Fault(
            code="plan-fingerprint",
            what="the plan was changed after it was compiled",
            where="fingerprint",
            got=data["fingerprint"],
            expected=actual,
            next="change the spec, not the plan, and compile again",
        )
    ]
