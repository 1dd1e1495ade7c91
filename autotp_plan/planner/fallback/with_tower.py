"""Planning a model whose vision tower is sharded too: by rules for the tower, and only with proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from autotp_plan.planner.fallback.prove import Prover
from autotp_plan.planner.fallback.vision_tower import TowerRules, tower_rules
from autotp_plan.planner.fallback.wrapped_preset import wrapper_of
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile

_OPTION = "--cut-vision"


def with_vision_tower(
    model: ModelInput, tp_size: int, prove: Prover | None, compile_with: Callable[[SpecFile], Plan]
) -> Plan:
    """The plan whose vision tower is sharded where that is proven with images.

    Args:
        model: as it was given.
        tp_size: number of TP ranks.
        prove: tries a plan on a twin.
        compile_with: makes a plan with rules for the tower.

    Raises:
        CompileError: the model has no vision tower, nothing of it can be sharded, there is no way to prove the plan, or
            it is wrong.
        CheckpointError, MissingDependencyError: the model cannot be built on meta.
    """
    wrapper = wrapper_of(model.module, model.model_type or "")
    if wrapper is None:
        raise _refusal(model, "a model without a language model inside", "a vision-language model")
    if prove is None:
        raise _refusal(
            model,
            "no way to try the plan",
            "a function that proves a plan",
            "use `autotp-plan compile`, or compile_plan(..., prove=autotp_plan.runtime.try_plan)",
        )
    inside = (wrapper.language_model, wrapper.head)
    tower = tower_rules(model.module, inside, tp_size)
    while True:
        if not tower.modules:
            got = "; ".join(f"{name}: {reason}" for name, reason in tower.reasons.items())
            raise _refusal(model, got or "no attention and no MLP of a known form", "a tower that can be sharded")
        plan = compile_with(tower.rules)
        findings: Any = prove(plan)
        if findings.problem is not None or findings.partial_gradients:
            got = findings.problem or f"gradients that stay partial: {', '.join(findings.partial_gradients)}"
            raise _refusal(model, got, "a sharded twin that computes what the dense one computes")
        unseen: Sequence[str] = getattr(findings, "ungraded", ())
        again = tower_rules(model.module, inside, tp_size, unseen)
        if again == tower:
            return dataclasses.replace(plan, notes=(*plan.notes, _note(tower)))
        tower = again


def _note(tower: TowerRules) -> str:
    sharded = ", ".join(f"{name} ({count})" for name, count in tower.modules.items())
    replicated = "".join(f" {name} stays replicated: {reason}." for name, reason in tower.reasons.items())
    return f"{_OPTION}: sharded, and proven with images, are {sharded}.{replicated}"


def _refusal(model: ModelInput, got: str, expected: str, next_step: str = "") -> CompileError:
    return CompileError(
        Fault(
            code="unsharded-vision-tower",
            what="the vision tower cannot be sharded",
            where=model.where,
            got=got,
            expected=expected,
            next=next_step or f"leave out {_OPTION}: the tower is then replicated",
        )
    )
