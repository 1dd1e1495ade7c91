"""Planning a model without a preset: by transformers' `tp_plan`, and only with proof.

A `tp_plan` says little of gradients that are partial, and some forget other things too. So the plan is tried on a
small twin of the model; parameters whose gradients turn out to be partial are marked, and what is not right is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from autotp_plan.huggingface.internals import tensor_parallel_plan
from autotp_plan.planner.fallback.own_model import NOTE, is_of_transformers
from autotp_plan.planner.fallback.tp_plan import NAME, OWN_NAME, rules_of_model
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.schemas.errors import CheckpointError, CompileError, Fault, MissingDependencyError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.rule_ref import Origin
from autotp_plan.schemas.spec import Spec, SpecFile


class Findings(Protocol):
    """What trying a plan on a twin showed.

    `partial_gradients` are patterns of parameters that are replicated while each rank computes part of their
    gradient; `problem` says what else is wrong, None when nothing is.
    """

    @property
    def partial_gradients(self) -> Sequence[str]: ...
    @property
    def problem(self) -> str | None: ...


Prover = Callable[[Plan], Findings]


def fallback_rules(model: ModelInput, tp_size: int, decided: Callable[[str], bool]) -> SpecFile | None:
    """The rules of the model's `tp_plan`; None for a model that transformers does not know and that has none itself.

    Args:
        model: as it was given.
        tp_size: number of TP ranks.
        decided: whether a parameter has a rule of the user's.

    Raises:
        CompileError: the model has no `tp_plan`, or one that is not complete or not understood.
    """
    try:
        module = model.module
    except (CheckpointError, MissingDependencyError):
        return None
    if getattr(module, "config", None) is None or not hasattr(module, "named_parameters"):
        return None
    if not is_of_transformers(module) and not tensor_parallel_plan(module):
        return None
    on_disk = () if model.checkpoint is None else tuple(model.checkpoint.tensors)
    return rules_of_model(module, tp_size, model.where, decided=decided, on_disk=on_disk)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where rules without a preset come from: what messages call them, and the note that a plan gets."""

    name: str
    code: str
    wrong: str
    note: str


TP_PLAN = Source(
    name=f"the {NAME}, which does not say which gradients are partial",
    code="wrong-tp-plan",
    wrong="transformers' tp_plan of this model is wrong",
    note="There is no preset for this model: its rules are transformers' own tp_plan, and a twin of the model computed "
    "by them what the whole one does.",
)
INFERENCE = Source(
    name="rules that were inferred from the model",
    code="wrong-inference",
    wrong="the rules that were inferred for this model are wrong",
    note="The rules were inferred from the model itself (`autotp-plan infer` writes them), and a twin of the model "
    "computed by them what the whole one does.",
)
WRAPPED = Source(
    name="the preset of the language model inside of a model",
    code="wrong-wrapper",
    wrong="a preset that was applied to the language model inside of this model is wrong",
    note="This model has no preset, and its language model has one: a twin of the model computed by it what the whole "
    "one does.",
)
_SOURCES = {Origin.INFERENCE: INFERENCE, Origin.PRESET: WRAPPED}


def proven(
    compile_with: Callable[[SpecFile], Plan], rules: SpecFile, prove: Prover | None, where: str, origin: Origin
) -> Plan:
    """The plan that rules without a preset make, once a twin has shown that it is right.

    There is no twin of a model that is not of transformers: its plan has a note instead.

    Args:
        compile_with: makes a plan of such rules.
        rules: from `fallback_rules`, inferred, or a preset for the place of a language model inside the model.
        prove: tries a plan on a twin.
        where: what faults point to.
        origin: where the rules come from.

    Raises:
        CompileError: there is no way to prove the plan, or it is wrong.
    """
    if rules.name == OWN_NAME:
        plan = compile_with(rules)
        return dataclasses.replace(plan, notes=(NOTE, *plan.notes))
    source = _SOURCES.get(origin, TP_PLAN)
    if prove is None:
        raise CompileError(
            Fault(
                code="unproven-tp-plan",
                what="a plan without a preset needs proof",
                where=where,
                got=source.name,
                expected="a way to try the plan",
                next="use `autotp-plan compile`, or compile_plan(..., prove=autotp_plan.runtime.try_plan)",
            )
        )
    plan = compile_with(rules)
    findings = prove(plan)
    if findings.partial_gradients and origin is not Origin.PRESET:  # a preset knows its own
        summed = Spec(patterns=tuple(findings.partial_gradients), partition_type="skip", grad_allreduce=True)
        plan = compile_with(dataclasses.replace(rules, layer_specs=(summed, *rules.layer_specs)))
        findings = prove(plan)
    if findings.problem is not None or findings.partial_gradients:
        raise CompileError(
            Fault(
                code=source.code,
                what=source.wrong,
                where=where,
                got=findings.problem or "gradients that stay partial",
                expected="a sharded twin that computes what the dense one computes",
                next="write a spec file and give it with --spec; `autotp-plan verify` proves it",
            )
        )
    return dataclasses.replace(plan, notes=(source.note, *plan.notes))
