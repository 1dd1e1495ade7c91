"""Everything that a plan says, by name: the facts of each parameter, tie, attribute and module, in the words of `show`.

Names are single ones: how a plan folds its layers, names its layouts and orders its entries is no fact.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from autotp_plan.planner.diff.differences import Fact
from autotp_plan.planner.plan_table import elements_per_rank, human_bytes, share_words, style_words
from autotp_plan.schemas.codec import encode
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Crossing, Parameter, Plan, PlannedModule
from autotp_plan.schemas.plan.rule_ref import Origin, RuleRef
from autotp_plan.schemas.plan.rules import Rules
from autotp_plan.schemas.storage.safetensors_header import item_size


class Stated(NamedTuple):
    """The facts of one name, and for a parameter the tensors on disk: None for the one of its name.

    `scope` tells names apart that read the same.
    """

    name: str
    facts: tuple[Fact, ...]
    on_disk: tuple[str, ...] | None = None
    stacked: int = 1
    scope: Any = None


def fact(key: str, value: Any, words: str | None = None, title: str | None = None) -> Fact:
    """A fact whose words are its JSON, and whose title is its key, where no others are given."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return Fact(key=key, title=key if title is None else title, json=text, words=text if words is None else words)


def parameters(plan: Plan) -> Iterator[Stated]:
    """Every parameter; the ones of an entry share their facts."""
    layouts = {name: layout_facts(layout, plan.tp_size) for name, layout in plan.layouts.items()}
    sizes: dict[tuple[str, str], Fact] = {}
    for entry in plan.parameters:
        size = sizes.get((entry.layout, entry.dtype))
        if size is None:
            layout = plan.layouts[entry.layout]
            size = bytes_fact(max(elements_per_rank(layout, plan.tp_size)) * item_size(entry.dtype))
            sizes[entry.layout, entry.dtype] = size
        facts = (*_entry_facts(plan, entry), *layouts[entry.layout], size, rule_fact(entry.rule, plan.rules))
        if entry.transposed:
            facts = (*facts, fact("transposed", True, "yes", "transposed on disk"))
        names = expand(entry.name)
        if entry.sources is None and entry.source is None:
            for name in names:
                yield Stated(name, facts)
            continue
        if entry.source is not None:
            on_disk: Any = zip(expand(entry.source))
        else:
            assert entry.sources is not None
            on_disk = zip(*map(expand, entry.sources.names))
        count = 1 if entry.sources is None else entry.sources.count
        for name, held in zip(names, on_disk):
            yield Stated(name, facts, None if held == (name,) else held, count)


def _entry_facts(plan: Plan, entry: Parameter) -> Iterator[Fact]:
    shape = plan.shape_of(entry)
    yield shape_fact(shape)
    yield dtype_fact(entry.dtype)
    words = style_words(entry)
    yield fact("style", words, words)
    view = plan.layouts[entry.layout].shape
    if view != shape:
        yield fact("view", list(view), shape_words(view), "sharded in the view")


def shape_fact(shape: tuple[int, ...]) -> Fact:
    """The shape of a parameter."""
    return fact("shape", list(shape), shape_words(shape))


def dtype_fact(dtype: str) -> Fact:
    """The dtype of a parameter."""
    return fact("dtype", dtype, dtype)


def rule_fact(ref: RuleRef, rules: Rules | None) -> Fact:
    """The rule that decided, and what it says where it is one of a spec file that the plan remembers."""
    found = fact("rule", str(ref), str(ref))
    specs = [] if rules is None or ref.origin is not Origin.SPEC else rules.specs
    for number, spec in enumerate(specs, 1):
        if ref.name == (spec.get("name") or ("file" if len(specs) == 1 else f"file {number}")):
            lists = (spec.get(key) for key in ("layer_specs", "vocabulary_specs"))
            said = [one for items in lists if isinstance(items, list) for one in items]
            if ref.index <= len(said):
                content = json.dumps(said[ref.index - 1], sort_keys=True)
                return dataclasses.replace(found, content=content)
    return found


def layout_facts(layout: Layout, tp_size: int) -> tuple[Fact, ...]:
    """What each rank holds, and in which units."""
    share = share_words(layout, tp_size)
    if layout.dim is None:
        return (fact("held", {"dim": None}, share, "each rank holds"),)
    size = layout.shape[layout.dim]
    units = ", ".join(f"{sub.size} by {sub.unit}" for sub in layout.sub_parameters)
    held = {"dim": layout.dim, "size": size, "intervals": encode(layout.intervals)}
    return (
        fact("held", held, share, "each rank holds"),
        fact("sub_parameters", encode(layout.sub_parameters), units, "in units of"),
    )


def bytes_fact(count: int) -> Fact:
    """What the rank that holds most holds, of one parameter or of several layers."""
    return fact("bytes_per_rank", count, human_bytes(count), "per rank")


def on_disk_fact(names: tuple[str, ...], stacked: int) -> Fact:
    """The tensors on disk that a parameter is made of."""
    words = " + ".join(names) + (f", * from 0 to {stacked - 1}" if stacked > 1 else "")
    return fact("on_disk", {"names": list(names), "count": stacked}, words, "on disk")


def shape_words(shape: tuple[int, ...]) -> str:
    """`4096 x 1024`, as `show` has it."""
    return " x ".join(map(str, shape)) or "scalar"


def ties(plan: Plan) -> Iterator[Stated]:
    """Every second name of a parameter."""
    for tie in plan.tied:
        style = f"{tie.style}, gathered" if tie.gather_output else tie.style
        facts = (fact("to", tie.to, tie.to, "is"), fact("style", style, style, "run as"))
        yield Stated(tie.name, (*facts, rule_fact(tie.rule, plan.rules)))


def attributes(plan: Plan) -> Iterator[Stated]:
    """Every attribute that is set on each rank; one value where all ranks have the same."""
    for entry in plan.module_attributes:
        same = len(set(entry.values)) == 1
        value: Any = entry.values[0] if same else list(entry.values)
        facts = (fact("value", value, title="set on each rank"),)
        for module in expand(entry.module):
            yield Stated(f"{module}.{entry.attribute}", facts, scope=entry.attribute)


def modules(plan: Plan) -> Iterator[Stated]:
    """Every module with collectives at its inputs and output."""
    for entry in plan.modules:
        facts = tuple(_module_facts(entry, plan.tp_size))
        for module in expand(entry.module):
            yield Stated(module, facts)


def _module_facts(module: PlannedModule, tp_size: int) -> Iterator[Fact]:
    crossings = [(f"inputs.{name}", name, crossing) for name, crossing in module.inputs.items()]
    if module.output is not None:
        crossings.append(("output", "output", module.output))
    for key, name, crossing in crossings:
        yield fact(key, encode(crossing), _crossing_words(crossing, tp_size), name)
    for buffer, leaf in module.buffers.items():
        yield fact(f"buffers.{buffer}", leaf, f"split as {leaf}", buffer)
    if module.mean_over_ranks:
        yield fact("mean_over_ranks", True, "over all ranks", "means")
    if not (crossings or module.buffers or module.mean_over_ranks):
        yield fact("collectives", None, "none")


def _crossing_words(crossing: Crossing, tp_size: int) -> str:
    if crossing.operation == "reduce":
        return "summed"
    if crossing.operation == "copy":
        return f"gradient{'' if crossing.interval is None else f' of {list(crossing.interval)}'} summed"
    assert crossing.size is not None
    assert crossing.dim is not None
    things = (SubParameter(size=crossing.size, unit=1),)
    layout = Layout(shape=(crossing.size,), dim=0, sub_parameters=things, intervals=crossing.intervals)
    share = share_words(layout, tp_size)
    return f"split, {share.replace('dim 0', f'{crossing.size} in dim {crossing.dim}')}"


def stream_places(plan: Plan) -> Iterator[Stated]:
    """Every module at which something happens to a stream that is sharded along the sequence."""
    planned = plan.sequence_parallel
    if planned is None:
        return
    said: dict[str, list[Fact]] = {}
    for key, words, patterns in (
        ("layer", "a layer of the sharded stream", planned.layers),
        ("gather", "all-gather before it", planned.gather),
        ("scatter", "each rank has its tokens behind it", planned.scatter),
        ("end", "all-gather behind it", (planned.end,)),
    ):
        for name in itertools.chain.from_iterable(map(expand, patterns)):
            said.setdefault(name, []).append(fact(key, True, words, "sequence parallel"))
    for name, facts in said.items():
        yield Stated(name, tuple(facts))


def ignored(plan: Plan) -> Iterator[Stated]:
    """Every tensor that a checkpoint may hold and that is no parameter."""
    facts = (fact("ignored", True, "yes"),)
    for name in dict.fromkeys(itertools.chain.from_iterable(map(expand, plan.ignored))):
        yield Stated(name, facts)


def notes(plan: Plan) -> Iterator[Stated]:
    """Every note."""
    for note in plan.notes:
        yield Stated(note, ())
