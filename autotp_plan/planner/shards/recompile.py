"""The plan of a shards folder for another number of ranks, by the rules that made the old one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.fallback.prove import Prover
from autotp_plan.planner.remembered_rules import arguments
from autotp_plan.planner.rules.preset_files import AUTO
from autotp_plan.schemas.errors import AutoTPError, CompileError, Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.rule_ref import Origin
from autotp_plan.schemas.spec import SpecFile

_WRITTEN_BY_USERS = (Origin.SPEC, Origin.DS_CONFIG)
_COULD_NOT_PROVE = ("unproven-tp-plan", "unproven-sequence-parallel", "cannot-infer", "inference-needs-packages")


class Helpers(NamedTuple):
    """What `compile_plan` needs for models without a preset; as its arguments of these names."""

    prove: Prover | None = None
    infer: Callable[[Any], SpecFile] | None = None
    factory: ModuleFactory | None = None


def recompiled(old: Plan, checkpoint: Path, tp_size: int | None, uneven: bool, helpers: Helpers) -> Plan:
    """The plan for `tp_size` by the rules that made the old one: those with which it comes out as it was.

    Args:
        old: the plan of the shards.
        checkpoint: a folder with the headers and the config of the checkpoint.
        tp_size: number of TP ranks.
        uneven: as for `compile_plan`; what the old plan was compiled with stays.
        helpers: for models without a preset. What is inferred is inferred once; each plan is proven by itself.

    Raises:
        MismatchError: the rules are not known, or do not make the old plan again.
        CompileError: they make no plan for `tp_size`.
    """
    infer = None if helpers.infer is None else _once(helpers.infer)
    refused: list[Fault] = []
    for options in _candidates(old):
        options.update(prove=helpers.prove, infer=infer, factory=helpers.factory)
        try:
            again = compile_plan(checkpoint, tp_size=old.tp_size, **options)
        except AutoTPError as error:
            refused += error.faults
            continue
        if replace(again, dequantize=old.dequantize).fingerprint == old.fingerprint:
            options["uneven"] = uneven or options["uneven"]
            plan = compile_plan(checkpoint, tp_size=tp_size, **options)
            model = replace(plan.model, repository=old.model.repository)
            return replace(plan, model=model, dequantize=old.dequantize)
    unproven = next((fault for fault in refused if fault.code in _COULD_NOT_PROVE), None)
    lacks_function = old.rules is not None and old.rules.module is not None and helpers.factory is None
    if unproven is not None and not lacks_function:
        raise CompileError(_not_proven(unproven))
    raise MismatchError(_not_made_again(old, tp_size, helpers.factory))


def _once(infer: Callable[[Any], SpecFile]) -> Callable[[Any], SpecFile]:
    """`infer`, which is called once for the one model here."""
    found: list[SpecFile] = []

    def inferred(given: Any) -> SpecFile:
        if not found:
            found.append(infer(given))
        return found[0]

    return inferred


def _candidates(old: Plan) -> Iterator[dict[str, Any]]:
    """Arguments of `compile_plan` with which the old plan may have been made."""
    if old.rules is not None:
        yield arguments(old.rules)
        return
    origins = {rule.origin for rule in _rules_of(old)}
    if origins.intersection(_WRITTEN_BY_USERS):
        return
    for preset in (AUTO, *sorted({rule.name for rule in _rules_of(old) if rule.origin is Origin.PRESET})):
        for uneven in (False, True):
            yield {"preset": preset, "uneven": uneven, "sequence_parallel": old.sequence_parallel is not None}


def _rules_of(plan: Plan) -> set[Any]:
    return {entry.rule for entry in plan.parameters} | {tie.rule for tie in plan.tied}


def _not_proven(fault: Fault) -> Fault:
    return Fault(
        code="reshard-without-proof",
        what="a plan without a preset needs proof, for each number of ranks",
        where="--tp",
        got=fault.got,
        expected="what `compile` needed for the plan of the shards",
        next="use `autotp-plan reshard`, or reshard(..., prove=autotp_plan.runtime.try_plan, infer=...), with torch, "
        "transformers and DeepSpeed installed",
    )


def _not_made_again(old: Plan, tp_size: int | None, factory: ModuleFactory | None) -> Fault:
    others = sorted(str(rule) for rule in _rules_of(old) if rule.origin not in (Origin.PRESET, Origin.DEFAULT))
    next_step = f"compile a plan with the same rules and --tp {tp_size}, and give it with --plan"
    if old.rules is None:
        got = ", ".join(others[:3]) or "a plan that the preset of this version does not make"
        expected = "a plan that a preset made, or that remembers its rules"
    elif old.rules.module is not None and factory is None:
        got, expected = f"a model that {old.rules.module} made", "the function that makes the model"
        next_step = f"give --module {old.rules.module} as for `compile`: it is imported and run"
    else:
        got, expected = "rules that make another plan with this version", "rules that make the plan of the shards again"
    return Fault(
        code="plan-not-of-a-preset",
        what="the plan of the shards cannot be made again for another TP size",
        where="--tp",
        got=got,
        expected=expected,
        next=next_step,
    )
