"""Which optimizers a sharded model may have: as they are, with steps on full tensors, or not at all.

What an optimizer looks at is found by a probe. An elementwise one is right on shards. One that looks at a whole tensor
is given it, which takes the parameters themselves: ZeRO 1, 2 and 3 hand an optimizer flat pieces of all parameters, on
which it would not compute what it computes without ZeRO, sharded or not.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from deepspeed.utils import log_dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autotp_plan.runtime.deepspeed.internals import is_deepspeed_muon, stepped_tensors
from autotp_plan.runtime.optimizers.deepspeed_muon import check_deepspeed_muon, orthogonalize_full_matrices
from autotp_plan.runtime.optimizers.full_steps import FullSteps
from autotp_plan.runtime.optimizers.optimizer_copy import flags
from autotp_plan.runtime.optimizers.probe import Finding, LooksAt, probe
from autotp_plan.runtime.optimizers.sharded_weights import ShardedWeight, sharded_weights
from autotp_plan.runtime.parameters.shard_registry import is_shard
from autotp_plan.schemas.errors import Fault, MismatchError

_ELEMENTWISE = ("adam", "adamw", "adagrad", "lion")
"""DeepSpeed's own, by their names in its config."""
_NEXT = (
    'train without ZeRO ("zero_optimization": {"stage": 0}), or take an elementwise optimizer such as AdamW; under '
    'ZeRO 1 and 2 Muon is DeepSpeed\'s ("optimizer": {"type": "Muon"})'
)


def check_optimizer(optimizer: Any, settings: Mapping[str, Any], model: nn.Module) -> Any:
    """Refuse an optimizer that would be wrong on a sharded model, before an engine is made of it. No communication.

    Args:
        optimizer: an optimizer, a function that makes one of parameters, or None where the config names it.
        settings: the DeepSpeed config.
        model: a model from `load_model`, sharded over several ranks.

    Returns:
        The optimizer, or a function that makes and checks it.

    Raises:
        MismatchError: the optimizer looks at more than an element and cannot be given it.
    """
    stage = _zero_stage(settings)
    if optimizer is None:
        _check_named(settings, stage, model)
    elif hasattr(optimizer, "param_groups"):
        _check(optimizer, settings, stage, model)
    elif callable(optimizer):
        make = optimizer

        def made(parameters: Any) -> Any:
            found = make(parameters)
            _check(found, settings, stage, model)
            return found

        return made
    return optimizer


def adapt_engine(engine: Any, settings: Mapping[str, Any], model: nn.Module, split_fused: bool = False) -> None:
    """Let the optimizer of an engine step in full what it looks at as a whole; one that is elementwise stays as it is.

    Args:
        engine: the engine, made with an optimizer that `check_optimizer` passed.
        settings: its DeepSpeed config.
        model: its model.
        split_fused: step each sub-parameter of a fused weight by itself.

    Raises:
        MismatchError: as `check_optimizer`, of an optimizer that the engine has made; or of parts of a weight.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if optimizer is None:
        return
    if _zero_stage(settings) > 0:
        if is_deepspeed_muon(optimizer):
            orthogonalize_full_matrices(engine.optimizer, sharded_weights(model), split_fused)
        return
    tensors = stepped_tensors(engine)
    if tensors is not None:  # else a group is one flat tensor, as only DeepSpeed's fused Adam has it
        adapt_optimizer(optimizer, sharded_weights(model, tensors), split_fused)


def adapt_optimizer(optimizer: Any, weights: Sequence[ShardedWeight], split_fused: bool = False) -> None:
    """As `adapt_engine`, of an optimizer that steps the tensors of `weights` themselves, without ZeRO."""
    _checked.add(optimizer)
    in_full = _stepped_in_full(optimizer, weights, stage=0)
    if in_full:
        _check_parts(optimizer, in_full)
        steps = FullSteps(optimizer, in_full, split_fused)
        optimizer.step = MethodType(lambda _, closure=None: steps.step(closure), optimizer)


def check_every_optimizer() -> None:
    """From now on an optimizer that was not adapted is refused at its first step on a shard, if it needs to be.

    So an optimizer of a loop without an engine is not wrong in silence. One that needs nothing is looked at once.
    """
    global _checks_every_optimizer
    if not _checks_every_optimizer:
        register_optimizer_step_pre_hook(_check_first_step)
        _checks_every_optimizer = True


_checks_every_optimizer = False
_checked: weakref.WeakSet[Any] = weakref.WeakSet()


def _check_first_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if optimizer in _checked:
        return
    for at, group in enumerate(optimizer.param_groups):
        for tensor in {one.dim(): one for one in group["params"] if is_shard(one)}.values():
            if _finding(optimizer, at, tensor).looks_at in (LooksAt.TENSOR, LooksAt.ALL):
                raise MismatchError(
                    Fault(
                        code="optimizer-not-adapted",
                        what="the optimizer looks at a whole matrix or tensor, and would be given one rank's shard",
                        where=f"optimizer {type(optimizer).__name__}",
                        got=f"a shard of shape {tuple(tensor.shape)}",
                        expected="an optimizer that was adapted to the sharded model",
                        next="plan.adapt_optimizer(model, optimizer) before the first step, in a loop without an "
                        "engine; else plan.initialize(model, optimizer=optimizer, ...)",
                    )
                )
    _checked.add(optimizer)


def _zero_stage(settings: Mapping[str, Any]) -> int:
    return int((settings.get("zero_optimization") or {}).get("stage", 0))


def _check_named(settings: Mapping[str, Any], stage: int, model: nn.Module) -> None:
    section = settings.get("optimizer") or {}
    name, options = section.get("type"), dict(section.get("params") or {})
    if name is None or name.lower() in _ELEMENTWISE:
        return
    if name.lower() == "muon":
        check_deepspeed_muon(settings, stage, sharded_weights(model))
    elif name.lower() == "lamb":
        half = any((settings.get(kind) or {}).get("enabled") for kind in ("fp16", "bf16", "bfloat16"))
        if stage > 0 or half:
            raise MismatchError(_fault(name, LooksAt.TENSOR, "ZeRO" if stage else "fp16 or bf16"))
    elif name.lower() in ("muadam", "muadamw", "musgd"):
        raise MismatchError(_fault(name, LooksAt.TENSOR, "muP's learning rates by full width"))
    elif hasattr(torch.optim, name):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _check(getattr(torch.optim, name)(parameters, **options), settings, stage, model)


def _check(optimizer: Any, settings: Mapping[str, Any], stage: int, model: nn.Module) -> None:
    if is_deepspeed_muon(optimizer):
        check_deepspeed_muon(settings, stage, sharded_weights(model))
    else:
        _stepped_in_full(optimizer, sharded_weights(model), stage)


def _stepped_in_full(optimizer: Any, weights: Sequence[ShardedWeight], stage: int) -> list[ShardedWeight]:
    """The weights that `optimizer` looks at as a whole.

    Raises MismatchError where it cannot be given them, and warns where it is not known what it looks at.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MismatchError(_fault(name, LooksAt.ALL, ""))
    findings = _findings(optimizer, weights)
    looks_at = {finding.looks_at for finding in findings.values()}
    if LooksAt.ALL in looks_at:
        raise MismatchError(_fault(name, LooksAt.ALL, ""))
    if LooksAt.TENSOR in looks_at and stage > 0:
        raise MismatchError(_fault(name, LooksAt.TENSOR, f"ZeRO {stage}"))
    unknown = [finding.reason for finding in findings.values() if finding.looks_at is LooksAt.UNKNOWN]
    if unknown:
        log_dist(
            f"It is not known whether {name} is elementwise ({unknown[0]}). It steps each rank's shard of a weight: if "
            "it looks at whole matrices, or takes norms, it is wrong under tensor parallelism.",
            [0],
            logging.WARNING,
        )
    in_full = [weight for weight in weights if findings.get(id(weight), _ELEMENT).looks_at is LooksAt.TENSOR]
    _check_states(optimizer, in_full)
    return in_full


_ELEMENT = Finding(LooksAt.ELEMENT)


def _findings(optimizer: Any, weights: Sequence[ShardedWeight]) -> dict[int, Finding]:
    """What the optimizer looks at in each sharded weight that it steps, by the `id` of the weight."""
    groups = {id(one): at for at, group in enumerate(optimizer.param_groups) for one in group["params"]}
    probed: dict[Any, Finding] = {}
    found = {}
    for weight in weights:
        tensor = weight.tensors[0]
        group = groups.get(id(tensor))
        if group is None:
            continue
        key = group, tensor.dim(), tensor.dtype, *flags(vars(tensor)), *flags(optimizer.state.get(tensor))
        if key not in probed:
            probed[key] = _finding(optimizer, group, tensor)
        found[id(weight)] = probed[key]
    return found


def _finding(optimizer: Any, group: int, tensor: Tensor) -> Finding:
    if is_deepspeed_muon(optimizer):  # known, and the probe would compile its kernels
        return Finding(LooksAt.TENSOR if optimizer.param_groups[group]["use_muon"] else LooksAt.ELEMENT)
    return probe(optimizer, group, tensor.dim(), tensor.device, tensor)


def _check_parts(optimizer: Any, weights: Sequence[ShardedWeight]) -> None:
    """That all tensors of a weight are in one group of the optimizer."""
    groups = {id(one): at for at, group in enumerate(optimizer.param_groups) for one in group["params"]}
    faults = [
        Fault(
            code="split-weight",
            what="the parts of a weight have different hyperparameters",
            where=weight.name,
            got=f"parameter groups {[groups.get(id(tensor)) for tensor in weight.tensors]}",
            expected="the weight and its part called _shared in one parameter group",
            next="choose groups by the beginning of a name, or by dim(), so that both are in the same",
        )
        for weight in weights
        if len({groups.get(id(tensor)) for tensor in weight.tensors}) > 1
    ]
    if faults:
        raise MismatchError(faults)


def _check_states(optimizer: Any, weights: Sequence[ShardedWeight]) -> None:
    """That the optimizer has not made states for shards: before a step, or when it was made."""
    faults = [
        Fault(
            code="optimizer-state-of-shards",
            what="the optimizer has states of shards, and would step full tensors with them",
            where=f"optimizer {type(optimizer).__name__}, {weight.name}",
            got=f"a state of shape {tuple(weight.tensors[0].shape)} for a weight of shape {weight.shape}",
            expected="no states before the first step",
            next="plan.adapt_optimizer(model, optimizer) before the first step; an optimizer whose constructor makes "
            "states is not adapted: take one that makes them in its first step, such as torch.optim.Adafactor",
        )
        for weight in weights
        if weight.tensors[0].shape != weight.shape
        and any(
            isinstance(value, Tensor) and value.dim() > 0 and value.shape == weight.tensors[0].shape
            for value in (optimizer.state.get(weight.tensors[0]) or {}).values()
        )
    ]
    if faults:
        raise MismatchError(faults)


def _fault(name: str, looks_at: LooksAt, under: str) -> Fault:
    if looks_at is LooksAt.ALL:
        return Fault(
            code="optimizer-looks-at-all",
            what="the optimizer cannot be right under tensor parallelism",
            where=f"optimizer {name}",
            got="a step that depends on several parameters at once, on random numbers, or on other processes",
            expected="one that steps each parameter by itself, such as AdamW, Lion, Muon, Adafactor or LAMB",
            next="take one of these; or train an unsharded model with it",
        )
    return Fault(
        code="optimizer-needs-full-tensors",
        what="the optimizer looks at a whole matrix or tensor, and cannot be given it here",
        where=f"optimizer {name}",
        got=under,
        expected="parameters that are not flattened, or an elementwise optimizer",
        next=_NEXT,
    )
