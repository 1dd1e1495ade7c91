"""Planning a model whose residual stream is sharded along the sequence: as found, and proven where that is due.

The places are found from names, styles and shapes. Of a preset that is enough: its family is known, and its plan was
proven with the stream sharded. Any other plan is tried on a twin.
"""

from __future__ import annotations

from autotp_plan.planner.fallback.prove import Prover
from autotp_plan.planner.sequence_parallel import OPTION, WITHOUT, with_sequence_parallel
from autotp_plan.schemas.errors import AutoTPError, CompileError, Fault, MissingDependencyError
from autotp_plan.schemas.plan.document import Plan


def with_proven_stream(plan: Plan, prove: Prover | None, *, known: bool, where: str) -> Plan:
    """`plan` with its residual stream sharded along the sequence.

    Args:
        plan: a plan without sequence parallelism. At TP=1 it stays as it is.
        prove: tries a plan on a twin.
        known: whether a preset alone made the plan, so that it need not be tried.
        where: what faults point to.

    Raises:
        CompileError: the plan has no stream that could be sharded; or it must be tried, and there is no way to, or it
            turned out wrong.
        MissingDependencyError: trying it takes packages that are not installed.
    """
    sharded = with_sequence_parallel(plan)
    if known or sharded.sequence_parallel is None:
        return sharded
    if prove is None:
        raise CompileError(
            Fault(
                code="unproven-sequence-parallel",
                what="where the stream of a model is sharded along the sequence needs proof, unless a preset made all "
                "of its plan",
                where=where,
                got="no way to try the plan",
                expected="a function that proves a plan",
                next="use `autotp-plan compile`, or compile_plan(..., prove=autotp_plan.runtime.try_plan)",
            )
        )
    problem = _problem(sharded, prove)
    if problem is not None:
        raise CompileError(
            Fault(
                code="wrong-sequence-parallel",
                what=f"with {OPTION}, a twin of this model does not compute what the dense one does",
                where=where,
                got=problem,
                expected="a sharded twin that computes what the dense one computes",
                next=WITHOUT,
            )
        )
    return sharded


def _problem(plan: Plan, prove: Prover) -> str | None:
    """What is wrong with a plan by its twin; None for one that is right."""
    try:
        findings = prove(plan)
    except MissingDependencyError:
        raise
    except AutoTPError as error:
        fault = error.faults[0]
        return f"it cannot be tried: {fault.what}" + (f" ({fault.got})" if fault.got else "")
    if findings.problem is None and findings.partial_gradients:
        return f"gradients that stay partial: {', '.join(findings.partial_gradients)}"
    return findings.problem
