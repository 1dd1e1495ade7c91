"""What a preset knows about an architecture, held against rules of one's own and against a whole model's decisions.

A rule of one's own may keep whole what a preset cuts, a module at a time; it may not run a weight another way, misread
what is fused in it, or forget that a gradient is partial.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from autotp_plan.planner.rules import partition as pt
from autotp_plan.planner.rules.matching import DEFAULT, Decision, Rule
from autotp_plan.planner.rules.symbols import SymbolError
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.names import fold, parent_module
from autotp_plan.schemas.spec import Spec


def check_way(where: str, spec: Spec, known: Rule, faults: FaultBook) -> None:
    """A user's rule may keep whole what the preset cuts, a module at a time, but not run it another way."""
    own, truth = ((one.partition_type, one.gather_output) for one in (spec, known.spec))
    if own == truth or spec.partition_type == "skip":
        return
    faults.add(
        "a rule runs a weight in a way that does not fit its module",
        where,
        got=_way(own),
        expected=f"{_way(truth)}, as {known.name} knows the weight; or skip",
        next="remove the rule: the preset has the right one",
    )


def misreads(
    where: str, shape: tuple[int, ...], spec: Spec, known: Rule, cut_of: Callable[[Spec], pt.Cut], faults: FaultBook
) -> bool:
    """Whether `spec` takes other matrices to be fused in the weight than the preset's rule `known` does."""
    try:
        own, truth = (pt.partition(shape, dataclasses.replace(cut_of(one), unit=1), 1) for one in (spec, known.spec))
    except (SymbolError, pt.PartitionError):
        return False  # the rule says so itself; or the config does not fit, and then the preset's does
    got, expected = ([sub.size for sub in one.sub_parameters] for one in (own, truth))
    if (own.shape, own.dim, got) == (truth.shape, truth.dim, expected):
        return False
    faults.add(
        "a rule cuts a fused weight in the wrong place",
        where,
        got=f"sub-parameters {got} along dim {own.dim} of {list(own.shape)}",
        expected=f"{expected} along dim {truth.dim} of {list(truth.shape)}, as {known.name} knows the weight",
        next="remove the rule (the preset has the right one), or give it the shape that is expected",
    )
    return True


def check_whole_modules(decisions: Mapping[str, Decision], trusted: Sequence[Rule], faults: FaultBook) -> None:
    """What a preset cuts in one module is cut or kept whole together: a head count cannot be both."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in decisions:
        known = next((rule for rule in trusted if rule.matches(name)), None)
        if known and known.spec.partition_type in ("column", "row", "shard") and not known.spec.gather_output:
            groups[_module_of(name, known.spec.partition_type)].append(name)
    for names in groups.values():
        cut = [name for name in names if decisions[name].style != "replicated"]
        for name in names:
            if cut and decisions[name].style == "replicated":
                faults.add(
                    "a weight is kept whole where the rest of its module is cut",
                    f"{name} ({decisions[name].rule})",
                    got=f"{', '.join(one.rpartition('.')[0].rpartition('.')[2] for one in cut)} cut",
                    expected="all of them cut, or all of them whole",
                    next="give the others the same kind of rule, or remove this one",
                )


def settle_partial_gradients(
    decisions: Mapping[str, Decision], trusted: Sequence[Rule], faults: FaultBook
) -> dict[str, Decision]:
    """A gradient is partial only beside weights that are cut; summed elsewhere, it would be tp_size times too much."""
    cut = _cut_modules(decisions)
    settled = dict(decisions)
    for name, decision in decisions.items():
        if not decision.partial_gradient or parent_module(name) in cut or name.rpartition(".")[0] in cut:
            continue
        if any(rule.matches(name) and (rule.spec.grad_allreduce or rule.spec.add_once) for rule in trusted):
            settled[name] = dataclasses.replace(decision, partial_gradient=False, add_once=False)
            continue
        faults.add(
            "a gradient is summed where every rank has all of it",
            f"{name} ({decision.rule})",
            got="grad_allreduce, and no weight beside it is cut",
            expected="grad_allreduce only for parameters that act on cut activations",
            next="remove grad_allreduce, or cut the weights of the module",
        )
    return settled


def undecided_among_cut(decisions: Mapping[str, Decision]) -> list[str]:
    """The parameters that no rule decides, in modules whose weights are cut: their gradients may be partial."""
    cut = _cut_modules(decisions)
    return fold(name for name, one in decisions.items() if one.rule == DEFAULT and parent_module(name) in cut)


def notes_on_gradients(names: Sequence[str]) -> list[str]:
    """What the user must know better than us of parameters that rules of one's own leave open."""
    return [
        f"{name} is whole on every rank, in a module whose weights are cut. If it acts on cut activations, as a norm "
        'of each head does, its gradient is partial: say "grad_allreduce": true in a skip rule.'
        for name in names
    ]


def refuse_undecided(names: Sequence[str], preset: str, faults: FaultBook) -> None:
    """A preset knows all parameters of its family; one that it does not know is of a variant that it is not for."""
    for name in names:
        faults.add(
            "the preset does not know a parameter among weights that are cut",
            name,
            got=f"preset {preset} has no rule for it",
            expected="to know whether it acts on cut activations, and so has a partial gradient",
            next='decide it in a spec file: {"patterns": ["..."], "partition_type": "skip", "grad_allreduce": true}, '
            "or false; `autotp-plan verify` shows which is right",
        )


def _cut_modules(decisions: Mapping[str, Decision]) -> set[str]:
    """The modules that hold column- or row-parallel layers whose activations stay cut between them."""
    return {_module_of(name, decision.style) for name, decision in decisions.items() if decision.inside_cut}


def _module_of(name: str, style: str) -> str:
    """The module inside which the activations of a parameter are cut: that of its layer, or its own."""
    return name.rpartition(".")[0] if style == "shard" else parent_module(name)


def _way(partition: tuple[str, bool]) -> str:
    return partition[0] + (" with gather_output" if partition[1] else "")
