"""What the proof of a plan found: the errors of every number, whether they are small enough, and the text of it.

A *twin* is a small model of the same architecture: the plan is proven by running its twin dense and sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from autotp_plan.schemas.documents import fingerprint
from autotp_plan.schemas.names import expand, fold
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.stamp import Stamp

FLOAT64_TOLERANCE = 1e-9
ENGINE_TOLERANCE = 1e-5
ROUNDINGS = 10
"""By so many times the unsharded model's own rounding, of which one sample is known, may the engine be off."""
MOST_ROUNDING = 1e-3
"""But by no more than this."""

Errors = Mapping[str, Mapping[str, float]]
"""Largest error of each number: kind -> pass or parameter -> error. Infinite when it is not a number, or when a shape
is wrong.
"""
OUTPUTS = ("loss", "logits")
"""Kinds with an error for each pass; all other kinds have one for each parameter."""


class Pass(str, Enum):
    """The forward and backward passes of the proof; the value is the name in JSON."""

    FIRST = "pass 1"
    SECOND = "pass 2"  # its gradients are added to those of the first
    AFTER_STEP = "pass 3"  # after an optimizer step, so that a wrong gradient shows in loss and logits

    @property
    def seed(self) -> int:
        """The seed of its tokens."""
        return list(Pass).index(self) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The largest errors of an entry of the plan, over all ranks, layers and attentions; None where there is none."""

    name: str
    gradient: float | None = None
    accumulated: float | None = None
    stepped: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What was compared and what came out.

    Attributes:
        plan: the plan that was proven right or wrong.
        twin: what the twin is: how its sizes follow from the model's, which attentions it has.
        float64: for each attention the errors of `loss`, `logits`, `gradient` (after one backward pass), `accumulated`
            (after two) and `stepped` (parameters after two optimizer steps). They are absolute, and divided by the
            largest magnitude in the tensor where that is above 1.
        engine: the relative errors of losses and gradient norms under the DeepSpeed engine, in float32.
        partial_gradients: replicated parameters whose gradients must be summed over the ranks, and are not.
        operations: floating-point operations of a forward of the twin, by rank; empty when it did not run.
        reads: sharded weights that other code reads than their layers, with that code: collectives are skipped there.
        failure: what a rank raised, or None.
        versions: of the packages that took part.
        seconds: how long it took.
    """

    plan: Plan
    twin: dict[str, Any]
    float64: dict[str, Errors] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)
    partial_gradients: tuple[str, ...] = ()
    operations: tuple[int, ...] = ()
    reads: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def float64_error(self) -> float:
        """The largest error in float64; infinite when nothing was compared."""
        found = [error for kinds in self.float64.values() for names in kinds.values() for error in names.values()]
        return max(found, default=math.inf)

    @property
    def wrong(self) -> list[str]:
        """What is off by more than the tolerance before any optimizer step, sorted: `loss`, `logits`, parameters."""
        found = set()
        for kinds in self.float64.values():
            for kind in OUTPUTS:
                errors = (error for at, error in kinds.get(kind, {}).items() if at != Pass.AFTER_STEP)
                if max(errors, default=0.0) > FLOAT64_TOLERANCE:
                    found.add(kind)
            for kind in ("gradient", "accumulated"):
                found |= {name for name, error in kinds.get(kind, {}).items() if error > FLOAT64_TOLERANCE}
        return sorted(found)

    @property
    def engine_error(self) -> float:
        """The largest relative error of the engine; infinite when it did not run."""
        return max(self.engine.values(), default=math.inf)

    @property
    def engine_tolerance(self) -> float:
        """`ENGINE_TOLERANCE`, or more for a model whose float32 steps are off by more without being sharded.

        Attention without a scale makes rounding grow from step to step. What is measured is how far the unsharded
        model's steps in float32 are from its steps in float64.
        """
        rounding = self.twin.get("rounding") or 0.0
        return max(ENGINE_TOLERANCE, min(MOST_ROUNDING, ROUNDINGS * rounding))

    @property
    def compute_share(self) -> float | None:
        """The largest rank's floating-point operations of a forward over the dense model's; None when not counted.

        Of the twin, by `torch.utils.flop_counter`: matrix products, convolutions and attention. 1 / tp_size is
        everything sharded, 1.0 is every rank computing everything.
        """
        dense = self.twin.get("operations")
        return max(self.operations) / dense if self.operations and dense else None

    @property
    def proven(self) -> bool:
        """Whether every attention and the engine ran, no error is above its tolerance, and every layer is called."""
        complete = (
            self.failure is None and not self.reads and set(self.float64) == set(self.twin.get("attention", ("none",)))
        )
        return complete and self.float64_error <= FLOAT64_TOLERANCE and self.engine_error <= self.engine_tolerance

    def stamp(self) -> Stamp:
        """The stamp of a plan that is proven; only a proof that holds may be asked."""
        assert self.proven
        return self.plan.sealed(
            Stamp(
                plan=self.plan.fingerprint,
                versions=self.versions,
                attention=tuple(self.float64),
                float64_error=self.float64_error,
                engine_error=self.engine_error,
                twin=fingerprint(self.twin),
            )
        )

    def largest(self, kind: str) -> float | None:
        """The largest error of `loss` or `logits`."""
        found = [error for kinds in self.float64.values() for error in kinds.get(kind, {}).values()]
        return max(found, default=None)

    def rows(self) -> Iterator[Row]:
        """A row for each entry of the plan that the twin has parameters of."""
        for entry in self.plan.parameters:
            names = set(expand(entry.name))
            worst = {kind: self._worst(kind, names) for kind in ("gradient", "accumulated", "stepped")}
            if any(error is not None for error in worst.values()):
                yield Row(name=entry.name, **worst)

    def _worst(self, kind: str, names: set[str]) -> float | None:
        found = [
            error
            for kinds in self.float64.values()
            for name, error in kinds.get(kind, {}).items()
            if name in names
        ]  # fmt: skip
        return max(found, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON value; an error that is not finite is null."""
        return {
            "proven": self.proven,
            "plan": self.plan.fingerprint,
            "tp_size": self.plan.tp_size,
            "sequence_parallel": self.plan.sequence_parallel is not None,
            "failure": self.failure,
            "partial_gradients": list(self.partial_gradients),
            "read_elsewhere": dict(self.reads),
            "float64": {
                "tolerance": FLOAT64_TOLERANCE,
                "largest": _finite(self.float64_error),
                "errors": {
                    attention: {kind: {name: _finite(error) for name, error in names.items()}
                                for kind, names in kinds.items()}
                    for attention, kinds in self.float64.items()
                },
            },
            "engine": {
                "tolerance": self.engine_tolerance,
                "largest": _finite(self.engine_error),
                "errors": {name: _finite(error) for name, error in self.engine.items()},
            },
            "compute": {
                "share": self.compute_share,
                "dense": self.twin.get("operations"),
                "ranks": list(self.operations),
            },
            "twin": self.twin,
            "versions": self.versions,
            "seconds": round(self.seconds, 1),
        }  # fmt: skip

    def read_elsewhere(self) -> list[str]:
        """A line for each piece of code that reads the weights of sharded layers and does not call these layers."""
        by_reader: dict[str, list[str]] = {}
        for name, reader in self.reads.items():
            by_reader.setdefault(reader, []).append(name)
        return [
            f"{', '.join(fold(names))} is read by {reader}, which does not call the layer: what the ranks have to do "
            "together is skipped there, if not on this machine then with other kernels"
            for reader, names in by_reader.items()
        ]

    def headline(self) -> str:
        """What was run: the model, the TP size, and by how much the twin is smaller."""
        arguments = self.twin.get("arguments")
        if arguments is not None:
            smaller = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            return (
                f"{self.twin['name']} at TP={self.plan.tp_size}, {smaller or 'in its size'}, "
                f"{self.twin['num_parameters']} parameters"
            )
        model = self.plan.model.architecture or self.plan.model.model_type
        counts = {"layers": self.twin.get("layers"), "experts": self.twin.get("experts")}
        sizes = [f"widths divided by {self.twin['divisor']}", *(f"{n} {what}" for what, n in counts.items() if n)]
        return (
            f"{model} at TP={self.plan.tp_size}, as a small model of the same architecture: {', '.join(sizes)}, "
            f"{self.twin['num_parameters']} parameters"
        )

    def conclusions(self) -> list[str]:
        """What the table of parameters does not show, a line each; the last one is the verdict."""
        lines = [f"{kind} attention was not run: {why}" for kind, why in self.twin["refused"].items()]
        if self.plan.sequence_parallel is not None:
            lines.append(
                "the stream was sharded along the sequence: each rank held its tokens alone between the blocks"
            )
        if self.twin.get("no_images"):
            lines.append(f"run without images, so that only the language model was compared: {self.twin['no_images']}")
        if self.twin["ungraded"]:
            lines.append(f"without a gradient in the unsharded model too: {', '.join(fold(self.twin['ungraded']))}")
        if self.float64:
            logits, loss = error_text(self.largest("logits")), error_text(self.largest("loss"))
            kinds = " and ".join(self.float64)
            lines.append(f"logits {logits}, loss {loss} (float64, {kinds} attention; at most {FLOAT64_TOLERANCE:.0e})")
        if self.engine:
            loss, norm = (
                error_text(max(error for name, error in self.engine.items() if name.startswith(what)))
                for what in ("loss", "gradient norm")
            )
            lines.append(
                f"DeepSpeed engine: losses {loss}, gradient norms {norm} (float32, relative; at most "
                f"{self.engine_tolerance:.0e})"
            )
        if self.compute_share is not None:
            lines.append(
                f"compute share {self.compute_share:.2f}: the largest rank's floating-point operations of a forward "
                f"over the dense model's ({1 / self.plan.tp_size:.2f} if everything is sharded)"
            )
        lines += [
            f"each rank has only a part of the gradient of {name}, and the plan does not sum the parts: its rule needs "
            "grad_allreduce"
            for name in fold(self.partial_gradients)
        ]
        lines += self.read_elsewhere()
        if self.failure is not None:
            lines.append(f"the sharded model did not run: {self.failure}")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [*lines, f"{'proven' if self.proven else 'NOT PROVEN'} in {self.seconds:.0f} s with {versions}"]


def error_text(error: float | None) -> str:
    """`1.5e-15`, or nothing for none."""
    return "" if error is None else f"{error:.1e}"


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
