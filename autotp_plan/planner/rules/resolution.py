"""Everything that rules decide about one model: its parameters, its modules' attributes and their collectives.

All faults of a model are collected over these and raised together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from autotp_plan.planner.model.inventory import Inventory
from autotp_plan.planner.rules.matching import Decision
from autotp_plan.planner.rules.module_boundaries import module_attributes, planned_modules
from autotp_plan.planner.rules.preset_checks import refuse_undecided, undecided_among_sharded
from autotp_plan.planner.rules.preset_files import preset_names
from autotp_plan.planner.rules.resolver import Resolver
from autotp_plan.planner.rules.rule_set import RuleSet
from autotp_plan.planner.rules.symbols import Symbols
from autotp_plan.schemas.errors import CompileError
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.names import is_index
from autotp_plan.schemas.plan.entries import PlannedModule
from autotp_plan.schemas.plan.rule_ref import DEFAULT_RULE, REST_RULE, Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """What was decided, one entry for each name of the model.

    `attributes` are `(module, attribute, value on each rank)`; `modules` are `(module, its collectives)`. `undecided`
    are parameters among sharded weights that no rule decides. `notes` are on rules of a DeepSpeed config that do not do
    what they seem to.
    """

    decisions: dict[str, Decision]
    attributes: tuple[tuple[str, str, tuple[int, ...]], ...]
    modules: tuple[tuple[str, PlannedModule], ...]
    undecided: tuple[str, ...]
    notes: tuple[str, ...] = ()


def resolve(
    inventory: Inventory, rules: RuleSet, symbols: Symbols, num_layers: int | None, tp_size: int, uneven: bool
) -> Resolution:
    """What `rules` decide about a model.

    Args:
        inventory: the model.
        rules: every rule that may decide.
        symbols: what names in rules mean for the model.
        num_layers: how many layers the model has, if a spec file says how to know it.
        tp_size: number of TP ranks.
        uneven: allow shares of unequal size where `tp_size` does not divide.

    Raises:
        CompileError: with every fault found.
    """
    resolver = Resolver(
        inventory=inventory,
        symbols=symbols,
        tp_size=tp_size,
        uneven=uneven,
        rest_stays_whole=rules.rest_stays_whole,
        heads=rules.heads,
    )
    faults = resolver.faults
    decisions = resolver.resolve(rules.lists)
    if num_layers is not None:
        in_model = {name: decision for name, decision in decisions.items() if not rules.is_of_tower(name)}
        _check_layers(inventory, num_layers, in_model, faults, resolver.optional(rules.lists))
    _check_ties(inventory, decisions, faults)
    undecided = undecided_among_sharded(decisions)
    if rules.preset is not None and rules.preset.name in preset_names():
        refuse_undecided(undecided, f"preset {rules.preset.name}", faults)
    elif any(one.origin is Origin.OWN_TP_PLAN for one in rules.lists):
        refuse_undecided(undecided, "the model's own tp_plan", faults)
    elif rules.preset is None:
        undecided = undecided_among_sharded(decisions, (DEFAULT_RULE, REST_RULE))
    attributes = tuple(module_attributes(rules.lists, decisions, symbols, tp_size, faults))
    modules = tuple(planned_modules(rules.lists, decisions, symbols, tp_size, faults))
    faults.raise_if_any(CompileError)
    return Resolution(
        decisions=decisions,
        attributes=attributes,
        modules=modules,
        undecided=tuple(undecided),
        notes=tuple(resolver.notes),
    )


def _check_layers(
    inventory: Inventory,
    num_layers: int,
    decisions: Mapping[str, Decision],
    faults: FaultBook,
    optional: Collection[str],
) -> None:
    """Every layer is there, and holds the parameters that the others hold.

    What an optional rule decides may be in some layers only: a mixture of experts has dense layers too. Lists of layers
    in which nothing is sharded are others than those that the config counts, such as a vision tower's.
    """
    found: dict[str, set[int]] = defaultdict(set)
    counted = {_list_of_layers(name) for name in inventory.parameters
               if name in decisions and decisions[name].layout.dim is not None}  # fmt: skip
    for name in inventory.parameters:
        if _list_of_layers(name) not in counted:
            continue
        parts = name.split(".")
        at = next((place for place, part in enumerate(parts) if is_index(part)), None)
        if at is not None:
            found[".".join([*parts[:at], "{}", *parts[at + 1 :]])].add(int(parts[at]))
    expected = set(range(num_layers))
    for template, layers in found.items():
        missing = expected - layers
        if template.replace("{}", str(min(layers))) in optional:
            missing = set()
        for layer in sorted(missing):
            faults.add(
                "layer-without-parameter",
                "the model lacks a parameter that its other layers have",
                template.replace("{}", str(layer)),
                got=f"it in {len(layers)} of {num_layers} layers",
                expected="it in every layer",
                next="the checkpoint is incomplete, or config.json is another model's",
            )
        for layer in sorted(layers - expected):
            faults.add(
                "layer-too-many",
                "the model has more layers than its config says",
                template.replace("{}", str(layer)),
                got=f"{max(layers) + 1} layers",
                expected=f"layers 0 to {num_layers - 1}, as config.json says",
                next="config.json is another model's, or the checkpoint holds more than the model",
            )


def _list_of_layers(name: str) -> str | None:
    """`model.layers` of `model.layers.3.mlp.up_proj.weight`; None for a name outside of layers."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if is_index(part)), None)
    return None if at is None else ".".join(parts[:at])


def _check_ties(inventory: Inventory, decisions: Mapping[str, Decision], faults: FaultBook) -> None:
    for name, target in inventory.tied.items():
        if name not in decisions or target not in decisions:
            continue  # undecided: already a fault
        one, other = decisions[name], decisions[target]
        if (one.layout.dim, one.layout.intervals) != (other.layout.dim, other.layout.intervals):
            faults.add(
                "tied-names-differ",
                "two names of one tied parameter are sharded differently",
                name,
                got=f"{one.layout.name} by {one.rule}; {target}: {other.layout.name} by {other.rule}",
                expected="the same layout under both names",
                next="give both names the same kind of rule (vocab and column by vocabulary, or skip)",
                mentions=(target,),
            )
