"""`compile_plan`: from a model and rules to a plan. Describe, resolve, fold, check; nothing is written here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autotp_plan.dequantize.plain_checkpoint import DTYPES
from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.planner.deepspeed.notes import notes_on_partition_config, notes_on_the_rest
from autotp_plan.planner.deepspeed.read_config import TensorParallelSection
from autotp_plan.planner.fallback.prove import Prover, fallback_rules, proven
from autotp_plan.planner.fallback.tp_plan import OWN_NAME
from autotp_plan.planner.fallback.unused_tensors import with_unused_tensors
from autotp_plan.planner.fallback.with_tower import with_vision_tower
from autotp_plan.planner.fallback.wrapped_preset import wrapped_preset
from autotp_plan.planner.fold_plan import fold_plan
from autotp_plan.planner.model.inventory import Inventory, take_inventory
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.proven_stream import with_proven_stream
from autotp_plan.planner.remembered_rules import remembered
from autotp_plan.planner.rules.preset_checks import notes_on_gradients
from autotp_plan.planner.rules.preset_files import AUTO, INFER
from autotp_plan.planner.rules.resolution import resolve
from autotp_plan.planner.rules.resolver import UNDECIDED
from autotp_plan.planner.rules.rule_set import RuleSet, collect_rules
from autotp_plan.planner.rules.symbols import Symbols
from autotp_plan.schemas.collection import paused
from autotp_plan.schemas.errors import CheckpointError, CompileError, Fault, MissingDependencyError, OptionError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import MAX_TP_SIZE, RuntimeOptions
from autotp_plan.schemas.plan.rule_ref import Origin
from autotp_plan.schemas.spec import SpecFile
from autotp_plan.sources.model_folder import ModelFolder, model_folder


def compile_plan(
    model: str | os.PathLike[str] | Any,
    *,
    tp_size: int | None = None,
    preset: str = AUTO,
    specs: Sequence[SpecFile] = (),
    uneven: bool = False,
    deepspeed: TensorParallelSection | None = None,
    prove: Prover | None = None,
    strict: bool = False,
    infer: Callable[[Any], SpecFile] | None = None,
    factory: ModuleFactory | None = None,
    cut_vision: bool = False,
    sequence_parallel: bool = False,
    dtype: str | None = None,
) -> Plan:
    """The plan for `model` at `tp_size`.

    Args:
        model: a folder with safetensors files or a bare config.json, an id of the hub (`org/name`), a URL, or a live
            `torch.nn.Module` (on meta is fine). With a `factory` None will do.
        tp_size: number of TP ranks; None takes `autotp_size` of `deepspeed`.
        preset: `auto` (by the config's model_type), `none`, `infer`, or the name of a preset.
        specs: spec files, the first has the highest precedence.
        uneven: give ranks shares of unequal size where `tp_size` does not divide.
        deepspeed: the `tensor_parallel` section of a DeepSpeed config; its rules come after `specs`.
        prove: tries a plan on a twin (`autotp_plan.runtime.try_plan`); a model without a preset is planned only with
            it.
        strict: hold the `partition_config` of `deepspeed`, and a `tp_plan` of the model's own, to what a spec file is
            held to: a weight that no rule names and a pattern that matches nothing are errors. Otherwise they are as in
            DeepSpeed, with a note in the plan.
        infer: makes rules for a folder's model, or for the factory's (`autotp_plan.inference.infer.infer_rules`). A
            model without a preset is planned by them, and without them by its own `tp_plan`.
        factory: makes a model that is not from transformers
            (`autotp_plan.factories.module_factory.ModuleFactory`); what the specs leave open is inferred.
        cut_vision: shard the vision tower's attention and MLPs too, where that is proven with images.
        sequence_parallel: shard the residual stream along the sequence too. A preset's plan is taken as it is; any
            other is proven with the stream sharded. At TP=1 nothing is sharded, and the plan remembers the option.
        dtype: what weights become that are quantised on disk: BF16, F16 or F32; None for BF16.

    Returns:
        a plan that passes `check_plan`.

    Raises:
        OptionError: no tp_size, or two that differ; or the factory cannot be called.
        CompileError: rules, model and tp_size do not make a plan; with every fault found.
        CheckpointError: the folder or its files cannot be read.
        DocumentError: config.json or the index is not JSON.
        MissingDependencyError: a bare config.json needs transformers, and it is not installed.
    """
    given = ModelInput(
        model_folder(model) if isinstance(model, str | os.PathLike | ModelFolder) else model, factory, dtype
    )
    _check_dtype(given)
    options = _Options(
        tp_size=_tp_size(tp_size, deepspeed),
        uneven=uneven,
        deepspeed=deepspeed,
        strict=strict,
        inferred=preset == INFER,
    )
    rules = collect_rules(given, preset, specs, deepspeed, strict)
    if cut_vision:
        plan = with_vision_tower(
            given, options.tp_size, prove, lambda tower: _planned(given, rules.with_tower(tower), options, prove, infer)
        )
    else:
        plan = _planned(given, rules, options, prove, infer)
    if sequence_parallel:
        known = _is_of_preset_alone(given, rules, options) and not (specs or cut_vision)
        plan = with_proven_stream(plan, prove, known=known, where=given.where)
    kept = remembered(
        preset=preset,
        specs=specs,
        uneven=uneven,
        deepspeed=deepspeed,
        strict=strict,
        cut_vision=cut_vision,
        sequence_parallel=sequence_parallel,
        factory=factory,
    )
    return dataclasses.replace(plan, rules=kept)


def _planned(
    given: ModelInput,
    rules: RuleSet,
    options: _Options,
    prove: Prover | None,
    infer: Callable[[Any], SpecFile] | None,
) -> Plan:
    """The plan by `rules`, and by what can be found out where they leave something open."""
    if options.inferred:
        return _by_inference(given, rules, options, prove, infer)
    try:
        return _compile(given, rules, options)
    except CompileError as error:
        undecided = {fault.code == UNDECIDED for fault in error.faults}
        if not rules.may_fall_back or True not in undecided:
            raise
        if given.factory is not None:
            return _by_inference(given, rules, options, prove, infer)
        faults: tuple[Fault, ...] = ()
        try:
            wrapped = _by_wrapped_preset(given, rules, options, prove)
            if wrapped is not None:
                return wrapped
        except CompileError as refused:
            faults = refused.faults
        if infer is not None and given.is_folder and given.model_type:
            try:
                return _by_inference(given, rules, options, prove, infer)
            except MissingDependencyError:
                pass
            except (CompileError, CheckpointError) as refused:
                faults = (*faults, *refused.faults)
        try:
            plan = _by_fallback(given, rules, options, prove)
        except CompileError as refused:
            if not rules.may_leave_rest:
                if False in undecided:  # what is wrong in the user's rules comes first
                    raise error from None
                raise CompileError([*faults, *refused.faults]) from None
            plan = None
        if plan is not None:
            return plan
        if not rules.may_leave_rest:  # what the user's rules leave open is what the user must know
            raise error from None
    return _compile(given, rules.leaving_rest_whole(), options)


def _by_inference(
    given: ModelInput,
    rules: RuleSet,
    options: _Options,
    prove: Prover | None,
    infer: Callable[[Any], SpecFile] | None,
) -> Plan:
    """The plan by rules that are inferred from the model. Raises CompileError, also where they prove wrong."""
    if infer is None or not (given.is_folder or given.factory):
        raise CompileError(
            Fault(
                code="cannot-infer",
                what="there is no way to infer rules",
                where=given.where,
                got="a model that is not a folder" if infer is not None else "compile_plan without `infer`",
                expected="a folder with a config.json, and a function that infers rules",
                next="use `autotp-plan compile`, or compile_plan(folder, infer=infer_rules, ...) with "
                "autotp_plan.inference.infer.infer_rules",
            )
        )
    inferred = infer(given.factory or given.folder.folder)
    if given.factory is None:
        inferred = with_unused_tensors(inferred, given)
    return proven(
        lambda made: _compile(given, rules.with_fallback(made, Origin.INFERENCE), options),
        inferred,
        prove,
        given.where,
        Origin.INFERENCE,
    )


def _by_wrapped_preset(given: ModelInput, rules: RuleSet, options: _Options, prove: Prover | None) -> Plan | None:
    """The plan by the preset of the language model inside of the model, after `rules`; None where there is none."""
    found = wrapped_preset(given)
    if found is None:
        return None
    return proven(
        lambda made: _compile(given, rules.with_wrapped(found.wrapper, made), options),
        found.preset,
        prove,
        given.where,
        Origin.PRESET,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    tp_size: int
    uneven: bool
    deepspeed: TensorParallelSection | None
    strict: bool
    inferred: bool


def _is_of_preset_alone(given: ModelInput, rules: RuleSet, options: _Options) -> bool:
    """Whether a folder's model is planned by the preset of its family and nothing else, and is not in a wrapper."""
    by_preset = rules.preset is not None and rules.wrapper is None and not rules.user_files
    section = options.deepspeed
    return by_preset and given.is_folder and (section is None or section.written.keys() <= {"autotp_size"})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Description:
    """The model in the words of the rules. `ignored` are tensors on disk that the plan has no use for."""

    symbols: Symbols
    num_layers: int | None
    inventory: Inventory
    ignored: tuple[str, ...]


def _by_fallback(given: ModelInput, rules: RuleSet, options: _Options, prove: Prover | None) -> Plan | None:
    """The plan by the model's own `tp_plan`, after `rules`; None when it has none that can be read."""
    asked = given.model_type or not given.is_folder
    found = fallback_rules(given, options.tp_size, rules.decide) if asked else None
    if found is None:
        return None
    own = found.name == OWN_NAME
    if own and not options.strict:
        rules = rules.leaving_rest_whole()
    origin = Origin.OWN_TP_PLAN if own else Origin.TP_PLAN
    return proven(
        lambda made: _compile(given, rules.with_fallback(made, origin), options), found, prove, given.where, origin
    )


@paused()
def _compile(given: ModelInput, rules: RuleSet, options: _Options) -> Plan:
    model = _describe(given, rules)
    resolution = resolve(model.inventory, rules, model.symbols, model.num_layers, options.tp_size, options.uneven)
    folded = fold_plan(model.inventory, resolution, options.tp_size)
    notes = (*rules.notes, *model.inventory.notes, *resolution.notes, *notes_on_gradients(resolution.undecided))
    plan = dataclasses.replace(
        folded,
        model=dataclasses.replace(folded.model, repository=given.repository),
        ignored=model.ignored,
        dequantize=given.dequantize,
        runtime=_runtime_options(options.deepspeed),
        notes=notes,
    )
    if options.deepspeed is not None and options.deepspeed.partition_config is not None and rules.preset is not None:
        added = notes_on_partition_config(plan, str(rules.preset.name))
        plan = dataclasses.replace(plan, notes=(*plan.notes, *added))
    plan = dataclasses.replace(plan, notes=(*plan.notes, *notes_on_the_rest(plan)))
    faults = check_plan(plan)
    if faults:
        raise CompileError(faults)
    return plan


def _describe(given: ModelInput, rules: RuleSet) -> _Description:
    symbols = rules.symbols(given.config)
    num_layers = rules.num_layers(symbols)
    names = rules.disk_names(symbols, num_layers)
    inventory = take_inventory(given, names)
    tied_on_disk = sorted(disk for disk, name in names.renamed.items() if name in inventory.tied)
    return _Description(
        symbols=symbols, num_layers=num_layers, inventory=inventory, ignored=(*names.ignored, *tied_on_disk)
    )


def _check_dtype(given: ModelInput) -> None:
    """Raise OptionError where a dtype is asked for, and no checkpoint has weights that would become it."""
    if given.dtype is None or (given.dtype in DTYPES and given.is_folder and given.checkpoint and given.dequantize):
        return
    raise OptionError(
        Fault(
            code="dtype-of-nothing",
            what="a dtype is given for weights that are quantised, and there are none",
            where="--dtype",
            got=f"{given.dtype}, and {given.where}",
            expected=f"one of {', '.join(DTYPES)}, and a checkpoint with quantised weights: others keep their dtype",
            next="leave out --dtype; a plan's model is converted when it is loaded: load_model(path, dtype=...)",
        )
    )


def _runtime_options(deepspeed: TensorParallelSection | None) -> RuntimeOptions:
    if deepspeed is None:
        return RuntimeOptions()
    return RuntimeOptions(dtype=deepspeed.dtype, tp_overlap_comm=deepspeed.tp_overlap_comm)


def _tp_size(tp_size: int | None, deepspeed: TensorParallelSection | None) -> int:
    configured = deepspeed.tp_size if deepspeed else None
    if tp_size is not None and configured is not None and tp_size != configured:
        raise OptionError(
            Fault(
                code="two-tp-sizes",
                what="two different TP sizes are asked for",
                where="--tp",
                got=f"--tp {tp_size}, and autotp_size {configured} in the DeepSpeed config",
                expected="one TP size",
                next="leave out --tp, or change autotp_size",
            )
        )
    chosen = tp_size if tp_size is not None else configured
    if chosen is None or not 1 <= chosen <= MAX_TP_SIZE:
        raise OptionError(
            Fault(
                code="no-tp-size" if chosen is None else "tp-size-out-of-range",
                what="the TP size is missing" if chosen is None else "the TP size makes no sense",
                where="--tp",
                got="none" if chosen is None else str(chosen),
                expected=f"a positive integer, at most {MAX_TP_SIZE}",
                next="give --tp N, or autotp_size in the DeepSpeed config's tensor_parallel section",
            )
        )
    return chosen
