"""Rules for a model without a preset, made from transformers' `tp_plan`: a complete set, or a fault.

A `tp_plan` names modules and styles (transformers/distributed/tensor_parallel.py), but no head sizes, and it does not
say what it leaves out. So a parameter that it does not name must be one that is always replicated (a norm, a router, a
table of positions), and what is compiled from it must be proven before it is used.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from autotp_plan.huggingface.disk_names import NamesOnDisk, known_disk_names, ties
from autotp_plan.huggingface.internals import tensor_parallel_plan
from autotp_plan.planner.fallback.own_model import counting_attributes, is_of_transformers, with_full_names
from autotp_plan.planner.fallback.skeleton import differentiable_inputs, name_pattern, spec_skeleton
from autotp_plan.planner.fallback.unused_tensors import unused_tensors
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.names import starred
from autotp_plan.schemas.spec import AttributeSpec, CrossingSpec, Indivisible, ModuleSpec, Spec, SpecFile

NAME = "tp_plan of transformers"
OWN_NAME = "tp_plan of the model"
MAX_REPLICATED = 0.1
"""The largest share of a model that may be replicated because its `tp_plan` does not name it."""

_GROUPS = "num_key_value_groups"

_SILENT = {"local_params", "replicate", "replicated"}
_GATHERED = {"colwise_gather_output", "colwise_rep"}
_SPLIT_INPUT = {"rowwise_split_input", "rowwise_rep"}
_COLUMN = {"colwise", "packed_colwise"}
_ROW = {"rowwise", "packed_rowwise"}
_PACKED = {"packed_colwise", "packed_rowwise"}
_VOCABULARY = {"embedding_rowwise", "embedding_colwise"}
_MODULES = {"moe_tp_experts", "mla_kv_a_proj", "all_reduce"}
"""Styles of collectives at a module's inputs and output."""
_KNOWN = _SILENT | _GATHERED | _SPLIT_INPUT | _COLUMN | _ROW | _VOCABULARY | _MODULES | {
    "replicated_with_grad_allreduce"
}  # fmt: skip


def rules_of_model(
    model: Any,
    tp_size: int,
    where: str,
    *,
    decided: Callable[[str], bool] = lambda name: False,
    on_disk: Collection[str] = (),
) -> SpecFile:
    """The rules for a model by its `tp_plan`.

    Args:
        model: a model with a config; its parameters may be on meta. The `tp_plan` of one that is not of transformers is
            read as DeepSpeed reads it: what it does not name stays whole.
        tp_size: number of TP ranks.
        where: what faults point to.
        decided: whether a parameter has a rule of the user's, and needs none here.
        on_disk: the names of the checkpoint's tensors, if there is one.

    Raises:
        CompileError: the model has no `tp_plan`, or one that is not complete or not understood. The fault shows a spec
            file to fill in.
    """
    own = not is_of_transformers(model)
    plan = with_full_names(tensor_parallel_plan(model), model) if own else tensor_parallel_plan(model)
    translation = _Translation(model, plan, tp_size, decided, own)
    translation.run()
    unknown = sorted({style for key, style in plan.items() if style not in _KNOWN and not translation.is_settled(key)})
    nothing_known = not plan and not any(map(decided, translation.parameters))
    if nothing_known or unknown or translation.undecided:
        raise CompileError(_refusal(translation, unknown, where))
    names = NamesOnDisk({}, {}, {}, []) if own else known_disk_names(model, where)
    return SpecFile(
        name=OWN_NAME if own else NAME,
        model_types=() if own else (model.config.model_type,),
        layer_specs=tuple(translation.specs()),
        module_attributes=tuple(translation.attributes()),
        modules=tuple(translation.modules),
        tied=tuple(ties(model)),
        renamed_tensors=names.renamed,
        assembled_tensors=names.assembled,
        transposed_tensors=dict(names.transposed),
        ignored_tensors=() if own else tuple(unused_tensors(model, names.renamed, names.assembled, on_disk)),
    )


class _Translation:
    """One rule for each parameter, grouped; what no rule could be found for."""

    def __init__(
        self, model: Any, plan: Mapping[str, str], tp_size: int, decided: Callable[[str], bool], own: bool
    ) -> None:
        self.model, self.plan, self.tp_size, self.decided, self.own = model, plan, tp_size, decided, own
        self.config = _text_config(model)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.by_module = dict(model.named_modules())
        self.language_model = _language_model(model)
        self.found: dict[str, Spec] = {}
        self.modules: list[ModuleSpec] = []
        self.undecided: list[str] = []
        vocabulary = ("get_input_embeddings", "get_output_embeddings")
        self.embedding, self.head = (getattr(model, get)() if hasattr(model, get) else None for get in vocabulary)

    def run(self) -> None:
        for name, parameter in self.parameters.items():
            if self.decided(name):
                continue
            style = self._style(name)
            owner, _, leaf = name.rpartition(".")
            spec = self._planned(owner, leaf, parameter, style) if style else self._unplanned(name, owner, parameter)
            if spec is not None:
                self.found[name] = spec
        if not self.own:
            self._limit_replicated()
        self._collectives()

    def is_settled(self, key: str) -> bool:
        """Whether the user's rules decide all that a key of the `tp_plan` is about."""
        about = [name for name in self.parameters if key in (starred(name), starred(name).rpartition(".")[0])]
        return bool(about) and all(map(self.decided, about))

    def specs(self) -> Iterator[Spec]:
        """The rules, a pattern for each group of parameters that differ in numbers only."""
        by_template: dict[str, dict[Spec, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name, spec in self.found.items():
            by_template[starred(name)][spec].append(name)
        patterns: dict[Spec, list[str]] = defaultdict(list)
        for template, groups in by_template.items():
            for spec, names in groups.items():
                alone = len(groups) == 1 and all(starred(n) != template or n in self.found for n in self.parameters)
                patterns[spec] += [name_pattern(template)] if alone else [re.escape(name) + "$" for name in names]
        for spec, matching in patterns.items():
            yield dataclasses.replace(spec, patterns=tuple(matching))

    def _style(self, name: str) -> str | None:
        """The style that the `tp_plan` gives to a parameter, or to its module."""
        generic = starred(name)
        return self.plan.get(generic) or self.plan.get(generic.rpartition(".")[0])

    def _planned(self, owner: str, leaf: str, parameter: Any, style: str) -> Spec | None:
        module, dims = self.by_module[owner], parameter.dim()
        weight = self.parameters.get(f"{owner}.weight")
        is_layer = hasattr(module, "in_features") or (self.own and weight is not None and weight.dim() == 2)
        linear = leaf == "weight" and dims == 2 and is_layer
        if leaf == "bias" and is_layer:
            return None  # goes with its weight
        if style == "replicated_with_grad_allreduce":
            return Spec(patterns=(), partition_type="skip", grad_allreduce=True)
        if style in _VOCABULARY:
            return Spec(patterns=(), partition_type="vocab", indivisible="uneven")
        if style in _MODULES | _SILENT:
            return self._unplanned(f"{owner}.{leaf}", owner, parameter, named=True)
        if linear and style in _GATHERED:
            return Spec(patterns=(), partition_type="column", gather_output=True, indivisible="uneven")
        if linear and style in _SPLIT_INPUT:
            return Spec(patterns=(), partition_type="row", split_input=True, indivisible="uneven")
        packed = style in _PACKED
        if linear and style in _COLUMN:
            if packed:
                return Spec(patterns=(), partition_type="column", shape=(2, -1))
            unit, shared = self._unit(owner, parameter.shape[0])
            indivisible: Indivisible = "replicate" if shared else "error"
            return Spec(patterns=(), partition_type="column", unit=unit, indivisible=indivisible)
        if linear and style == "rowwise":
            return Spec(patterns=(), partition_type="row", unit=self._unit(owner, parameter.shape[1])[0])
        if not is_layer and style in _COLUMN | _ROW:
            dim = max(dims - 2, 0) if style in _COLUMN else dims - 1
            shape = tuple(2 if packed and at == dim else -1 for at in range(dims))
            return Spec(patterns=(), partition_type="shard", shape=shape if packed else None, partition_dim=dim)
        self.undecided.append(f"{owner}.{leaf}")
        return None

    def _unplanned(self, name: str, owner: str, parameter: Any, named: bool = False) -> Spec | None:
        """A parameter that the `tp_plan` does not name: replicated if its kind always is, else undecided."""
        module = self.by_module[owner]
        replicated = Spec(patterns=(), partition_type="skip")
        if parameter.dim() < 2:
            return replicated if named and self.own else None  # by default
        if module is self.embedding or (self.own and self._is_tied_to_head(parameter)):
            return Spec(patterns=(), partition_type="vocab", indivisible="uneven")
        if module is self.head and hasattr(module, "in_features"):
            return Spec(patterns=(), partition_type="column", gather_output=True, indivisible="uneven")
        if self.own and not named:
            return None  # stays whole, and is counted
        if named or not hasattr(module, "in_features") or self._is_router(owner, module) or self._is_outside(name):
            return replicated
        self.undecided.append(name)
        return None

    def _is_tied_to_head(self, parameter: Any) -> bool:
        """Whether a head whose output is gathered has the same weight."""
        return any(other is parameter and self._style(name) in _GATHERED for name, other in self.parameters.items())

    def _is_outside(self, name: str) -> bool:
        """Whether a parameter is outside of the language model, as those of a vision tower are."""
        return self.language_model is not None and not name.startswith(f"{self.language_model}.")

    def _is_router(self, owner: str, module: Any) -> bool:
        """Whether a linear layer has one output for each expert of its module, or fewer outputs than ranks."""
        if module.out_features < max(2, self.tp_size):
            return True
        inside = owner.rpartition(".")[0]
        around = [f"{inside}."] + ([f"{inside.rpartition('.')[0]}."] if "router" in inside.rpartition(".")[2] else [])
        return any(
            name.startswith(tuple(around)) and parameter.dim() == 3 and parameter.shape[0] == module.out_features
            for name, parameter in self.parameters.items()
        )

    def _limit_replicated(self) -> None:
        """What is replicated only because the `tp_plan` does not name it must be a small share of the model."""
        unnamed = [
            name
            for name, spec in self.found.items()
            if spec.partition_type == "skip" and self._style(name) is None and not self._is_outside(name)
        ]
        total = sum(parameter.numel() for parameter in self.parameters.values())
        if sum(self.parameters[name].numel() for name in unnamed) > MAX_REPLICATED * total:
            self.undecided += unnamed

    def _unit(self, owner: str, size: int) -> tuple[int | None, bool]:
        """The unit of an attention module's projection, a head or more, and whether ranks may share a unit.

        Ranks share KV heads where there are fewer of them than ranks, if the module takes the number of query heads
        per KV head from an attribute, which is then set. The query heads of one KV head stay together.
        """
        attention = self.by_module[owner.rpartition(".")[0]]
        heads = _count(self.config, "num_attention_heads")
        head_dim = getattr(attention, "head_dim", None)
        if heads is None or not (_is_attention(attention) or (self.own and head_dim is not None)):
            return None, False
        kv_heads = _count(self.config, "num_key_value_heads") or heads
        if type(head_dim) is int and size % head_dim == 0 and size // head_dim in (heads, kv_heads):
            shares = _GROUPS in vars(attention) and kv_heads < self.tp_size
            if size // head_dim == kv_heads < heads:
                return head_dim, shares
            return head_dim * (heads // math.gcd(heads, max(kv_heads, self.tp_size)) if shares else 1), False
        return (size // heads if size % heads == 0 else None), False

    def attributes(self) -> Iterator[AttributeSpec]:
        """The number of query heads per KV head, where ranks share KV heads; all counts of a model of one's own."""
        if self.own:
            column_parallel = {
                name.rpartition(".")[0]
                for name, spec in self.found.items()
                if spec.partition_type == "column" and not spec.gather_output
            }
            yield from counting_attributes(self.model, column_parallel)
        heads, kv_heads = _count(self.config, "num_attention_heads"), _count(self.config, "num_key_value_heads")
        if heads is None or kv_heads is None or not kv_heads < self.tp_size:
            return
        owners = {starred(name.rpartition(".")[0].rpartition(".")[0])
                  for name, spec in self.found.items() if spec.indivisible == "replicate"}  # fmt: skip
        if owners:
            patterns = tuple(map(name_pattern, sorted(owners)))
            yield AttributeSpec(patterns=patterns, attributes={_GROUPS: f"{heads} // max({kv_heads}, tp_size)"})

    def _collectives(self) -> None:
        """The collectives at modules' inputs and outputs."""
        for key, style in self.plan.items():
            pattern = name_pattern(key)
            matched = [name for name in self.by_module if re.match(pattern, name)]
            if not matched:
                continue
            module = self.by_module[matched[0]]
            if style == "moe_tp_experts":
                inputs = {name: CrossingSpec(operation="copy") for name in differentiable_inputs(module)}
                self.modules.append(
                    ModuleSpec(patterns=(pattern,), inputs=inputs, output=CrossingSpec(operation="reduce"))
                )
            elif style == "all_reduce":
                self.modules.append(ModuleSpec(patterns=(pattern,), output=CrossingSpec(operation="reduce")))
            elif style == "mla_kv_a_proj":
                start = module.out_features - self.config.qk_rope_head_dim
                crossing = CrossingSpec(operation="copy", interval=(start, module.out_features))
                self.modules.append(ModuleSpec(patterns=(pattern,), output=crossing))


def _text_config(model: Any) -> Any:
    """The config of a model's language model, which may be inside another; None for a model without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _language_model(model: Any) -> str | None:
    """The name of the language model inside a model of several; None for a model that is one itself."""
    if _text_config(model) is getattr(model, "config", None) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def _count(config: Any, key: str) -> int | None:
    """An integer of the config that holds for all layers."""
    try:
        found = getattr(config, key, None)
    except RuntimeError:  # what differs between layers: transformers' AmbiguousGlobalPerLayerAttributeError
        return None
    return found if type(found) is int and found > 0 else None


def _is_attention(module: Any) -> bool:
    """Whether a module's forward masks positions and its attributes describe heads, as all attention modules' do."""
    heads = hasattr(module, "head_dim") or hasattr(module, "is_causal")
    return heads and "attention_mask" in inspect.signature(type(module).forward).parameters


def _refusal(translation: _Translation, unknown: Sequence[str], where: str) -> list[Fault]:
    reasons = []
    if not translation.plan:
        reasons.append("it has no tp_plan" if translation.own else "transformers has no tp_plan for it")
    if unknown:
        reasons.append(f"its tp_plan has styles that are not understood: {', '.join(unknown)}")
    if translation.plan and translation.undecided:
        reasons.append("its tp_plan does not name weights that other models shard")
    undecided = ", ".join(dict.fromkeys(starred(name) for name in translation.undecided))
    model_type = getattr(getattr(translation.model, "config", None), "model_type", None)
    return [
        Fault(
            code="no-preset",
            what="there is no preset for this model, and it cannot be planned without one",
            where=where,
            got=f"model_type {model_type}: {'; '.join(reasons)}" + (f"; undecided: {undecided}" if undecided else ""),
            expected="a preset, a complete tp_plan, or a spec file",
            next="fill in a spec file, give it with --spec, and prove the plan with `autotp-plan verify`:\n"
            + spec_skeleton(translation.model, translation.found, translation.decided),
        )
    ]
