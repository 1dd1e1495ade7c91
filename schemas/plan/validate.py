"""What can be wrong in a plan by itself: references that lead nowhere, cuts that do not cover, words that clash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from autotp_plan.schemas import documents
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault
from autotp_plan.schemas.layout import Layout, group_view
from autotp_plan.schemas.names import MAX_NAMES, expand, num_names

if TYPE_CHECKING:
    from autotp_plan.schemas.plan.document import Crossing, Parameter, Plan


def plan_faults(plan: Plan) -> Iterator[Fault]:
    """Everything in which a plan contradicts itself."""
    for name, layout in plan.layouts.items():
        for problem in _layout_problems(layout, plan.tp_size):
            yield Fault(
                what="a layout does not cut its dimension properly",
                where=f"layouts.{name}",
                got=problem,
                expected="intervals inside the dimension that cover it, cut between units",
                next="compile the plan again; plans are not written by hand",
            )
    seen: set[str] = set()
    num_tensors = 0
    for index, entry in enumerate(plan.parameters):
        where = f"parameters[{index}]"
        if entry.layout not in plan.layouts:
            yield _reference_fault(f"{where}.layout", entry.layout, "a layout of this plan", plan.layouts)
        elif entry.shape is not None and group_view(entry.shape, plan.layouts[entry.layout].shape) is None:
            view = plan.layouts[entry.layout].shape
            yield _reference_fault(
                f"{where}.shape", f"{list(entry.shape)}", f"a shape that {list(view)} is a view of", ()
            )
        elif (entry.style == "replicated") != (plan.layouts[entry.layout].dim is None):
            yield _reference_fault(f"{where}.style", entry.style, "replicated, exactly where the layout has no dim", ())
        if entry.gather_output and entry.style != "column":
            yield _reference_fault(
                f"{where}.gather_output", entry.style, "column, the only style with outputs to gather", ()
            )
        if entry.split_input and entry.style != "row":
            yield _reference_fault(f"{where}.split_input", entry.style, "row, the only style with inputs to split", ())
        if entry.add_once and not entry.partial_gradient:
            yield _reference_fault(f"{where}.add_once", "true", "partial_gradient beside it", ())
        if entry.partial_gradient and entry.style != "replicated":
            yield _reference_fault(f"{where}.partial_gradient", entry.style, "replicated", ())
        names = expand(entry.name)
        if len(seen) + len(names) > MAX_NAMES:
            yield _reference_fault(f"{where}.name", entry.name, f"at most {MAX_NAMES} parameters in all", ())
            return
        if entry.source is not None and num_names(entry.source) != len(names):
            yield _reference_fault(f"{where}.source", entry.source, f"as many names as {entry.name}", ())
        if entry.sources is not None:
            num_tensors += len(names) * len(entry.sources.names) * entry.sources.count
            if num_tensors > MAX_NAMES:
                got = f"{num_tensors} tensors up to here"
                yield _reference_fault(f"{where}.sources", got, f"at most {MAX_NAMES} tensors in all", ())
                return
            yield from _sources_faults(f"{where}.sources", entry, len(names), plan)
        for name in names:
            if name in seen:
                yield _reference_fault(f"{where}.name", name, "each parameter once", ())
            seen.add(name)
    for index, tie in enumerate(plan.tied):
        if tie.to not in seen:
            yield _reference_fault(f"tied[{index}].to", tie.to, "a parameter of this plan", seen)
        if tie.name in seen:
            yield _reference_fault(f"tied[{index}].name", tie.name, "a name that is not a parameter of its own", ())
    for pattern in plan.ignored:
        expand(pattern)
    for index, attribute in enumerate(plan.module_attributes):
        expand(attribute.module)
        if len(attribute.values) != plan.tp_size:
            got = f"{len(attribute.values)} values"
            yield _reference_fault(f"module_attributes[{index}].values", got, f"{plan.tp_size}, one per rank", ())
    for index, module in enumerate(plan.modules):
        expand(module.module)
        crossings = {**{f"inputs.{name}": crossing for name, crossing in module.inputs.items()}}
        if module.output is not None:
            crossings["output"] = module.output
        for name, crossing in crossings.items():
            for problem in _crossing_problems(crossing, plan.tp_size):
                yield _reference_fault(f"modules[{index}].{name}", problem, "an operation with all that it needs", ())


def _crossing_problems(crossing: Crossing, tp_size: int) -> Iterator[str]:
    if crossing.operation != "split":
        if crossing.dim is not None or crossing.size is not None or crossing.intervals:
            yield f"{crossing.operation} with the keys of split"
    elif crossing.dim is None or crossing.size is None or len(crossing.intervals) != tp_size:
        yield f"split with intervals of {len(crossing.intervals)} ranks in a plan of {tp_size}"
    else:
        yield from iv.faults(crossing.intervals, crossing.size)
    if crossing.interval is not None and (crossing.operation != "copy" or crossing.interval[0] >= crossing.interval[1]):
        yield f"{crossing.operation} of {list(crossing.interval)}"


def _sources_faults(where: str, entry: Parameter, count: int, plan: Plan) -> Iterator[Fault]:
    sources = entry.sources
    assert sources is not None
    if entry.source is not None:
        yield _reference_fault(where, f"source {entry.source} too", "either source or sources", ())
    stars = {name.count("*") for name in sources.names}
    if stars != {1} and (stars != {0} or sources.count != 1):
        got = f"{', '.join(sources.names[:3])} with count {sources.count}"
        yield _reference_fault(where, got, "one * in each name, or count 1 and none", ())
    for position, name in enumerate(sources.names):
        if num_names(name) != count:
            yield _reference_fault(f"{where}.names[{position}]", name, f"as many names as {entry.name}", ())
    if entry.layout in plan.layouts and sources.stacked:
        shape = plan.shape_of(entry)
        if shape[:1] != (sources.count,):
            yield _reference_fault(f"{where}.count", str(sources.count), f"dimension 0 of {list(shape)}", ())


def _layout_problems(layout: Layout, tp_size: int) -> Iterator[str]:
    if layout.dim is None:
        return
    if layout.dim >= len(layout.shape):
        yield f"dim {layout.dim} of a shape with {len(layout.shape)} dimensions"
        return
    if len(layout.intervals) != tp_size:
        yield f"intervals of {len(layout.intervals)} ranks in a plan of {tp_size}"
    size = layout.shape[layout.dim]
    yield from iv.faults(layout.intervals, size)
    if sum(sub.size for sub in layout.sub_parameters) != size:
        yield f"sub-parameters of {sum(sub.size for sub in layout.sub_parameters)} in a dimension of {size}"
        return
    start = 0
    for sub in layout.sub_parameters:
        if sub.size % sub.unit:
            yield f"a sub-parameter of {sub.size} with units of {sub.unit}"
        edges = {edge for rank in layout.intervals for interval in rank for edge in interval}
        for edge in sorted(edges):
            if start < edge < start + sub.size and (edge - start) % sub.unit:
                yield f"a cut at {edge}, inside a unit of {sub.unit} that begins at {edge - (edge - start) % sub.unit}"
        start += sub.size


def _reference_fault(where: str, got: str, expected: str, known: Any) -> Fault:
    return Fault(
        what="the plan contradicts itself",
        where=where,
        got=got,
        expected=expected,
        next=documents.did_you_mean(got, known) or "compile the plan again; plans are not written by hand",
    )
