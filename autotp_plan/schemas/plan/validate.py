"""In what the entries of a plan can contradict each other: references that lead nowhere, intervals that do not cover a
dimension, styles that clash. Every check that can be run is run; one that needs what is already wrong is left out.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.documents import did_you_mean
from autotp_plan.schemas.errors import DocumentError, Fault
from autotp_plan.schemas.layout import Layout, group_view
from autotp_plan.schemas.names import MAX_NAMES, expand, num_names
from autotp_plan.schemas.plan.entries import Crossing, Parameter, PlanEntries
from autotp_plan.schemas.plan.stream_faults import SECTION, stream_faults, stream_patterns

MAX_ELEMENTS = 2**62
"""Of a tensor: a file of more bytes is not to be had, and sizes stay numbers that everything can count with."""
_COMPILE_AGAIN = "compile the plan again; plans are not written by hand"


def plan_faults(plan: PlanEntries) -> Iterator[Fault]:
    """Everything in which the entries of `plan` contradict each other."""
    for name, layout in plan.layouts.items():
        if math.prod(layout.shape) > MAX_ELEMENTS:
            what, expected = "a layout has more elements than a tensor can have", f"at most {MAX_ELEMENTS}"
            yield _fault("layout-elements", what, f"layouts.{name}", f"{list(layout.shape)}"[:200], expected)
        for problem in _layout_problems(layout, plan.tp_size):
            yield Fault(
                code="layout-intervals",
                what="a layout does not shard its dimension properly",
                where=f"layouts.{name}",
                got=problem,
                expected="intervals inside the dimension that cover it, with boundaries between units",
                next=_COMPILE_AGAIN,
            )
    unreadable = list(_pattern_faults(plan))
    yield from unreadable
    too_many = list(_total_faults(plan))
    if too_many:
        yield from too_many
        return
    for index, entry in enumerate(plan.parameters):
        where = f"parameters[{index}]"
        yield from _reference_faults(where, entry, plan)
        yield from _style_faults(where, entry)
        yield from _disk_faults(where, entry, plan)
    yield from _name_faults(plan)
    yield from _module_faults(plan)
    if not unreadable and sum(num_names(entry.name) for entry in plan.parameters) <= MAX_NAMES:
        yield from stream_faults(plan)


def _pattern_faults(plan: PlanEntries) -> Iterator[Fault]:
    """Names whose braces cannot be expanded."""
    patterns = [entry.name for entry in plan.parameters]
    patterns += [entry.source for entry in plan.parameters if entry.source is not None]
    patterns += [name for entry in plan.parameters if entry.sources is not None for name in entry.sources.names]
    patterns += [*plan.ignored, *(one.module for one in plan.module_attributes), *(one.module for one in plan.modules)]
    patterns += [pattern for listed in stream_patterns(plan.sequence_parallel).values() for pattern in listed]
    for pattern in dict.fromkeys(patterns):
        try:
            num_names(pattern)
        except DocumentError as error:
            yield from error.faults


def _total_faults(plan: PlanEntries) -> Iterator[Fault]:
    """Lists whose patterns stand for more names than there is time for."""
    for what, patterns in (
        ("ignored", list(plan.ignored)),
        ("module_attributes", [one.module for one in plan.module_attributes]),
        ("modules", [one.module for one in plan.modules]),
        (SECTION, [one for listed in stream_patterns(plan.sequence_parallel).values() for one in listed]),
    ):
        named = sum(_count(pattern) or 0 for pattern in patterns)
        if named > MAX_NAMES:
            expected = f"at most {MAX_NAMES} names in all"
            yield _fault("too-many-names", "a list of the plan has too many names", what, f"{named} names", expected)


def _count(pattern: str) -> int | None:
    """How many names `pattern` stands for; None where its braces are wrong, which is a fault already."""
    try:
        return num_names(pattern)
    except DocumentError:
        return None


def _names(pattern: str) -> list[str]:
    """The names that `pattern` stands for; none where its braces are wrong, which is a fault already."""
    return [] if _count(pattern) is None else expand(pattern)


def _reference_faults(where: str, entry: Parameter, plan: PlanEntries) -> Iterator[Fault]:
    layout = plan.layouts.get(entry.layout)
    if layout is None:
        yield _fault(
            "unknown-layout",
            "a parameter has a layout that the plan lacks",
            f"{where}.layout",
            entry.layout,
            "a layout of this plan",
            plan.layouts,
        )
        return
    if entry.shape is not None and group_view(entry.shape, layout.shape) is None:
        yield _fault(
            "shape-not-of-layout",
            "a parameter's shape does not fit its layout",
            f"{where}.shape",
            str(list(entry.shape)),
            f"a shape that {list(layout.shape)} is a view of",
        )
    if (entry.style == "replicated") != (layout.dim is None):
        yield _fault(
            "style-not-of-layout",
            "a parameter's style does not fit its layout",
            f"{where}.style",
            entry.style,
            "replicated, exactly where the layout has no dim",
        )


def _style_faults(where: str, entry: Parameter) -> Iterator[Fault]:
    if entry.gather_output and entry.style != "column":
        yield _fault(
            "gather-without-column",
            "a parameter that is not column-parallel gathers its output",
            f"{where}.gather_output",
            entry.style,
            "column, the only style with outputs to gather",
        )
    if entry.split_input and entry.style != "row":
        yield _fault(
            "split-without-row",
            "a parameter that is not row-parallel splits its input",
            f"{where}.split_input",
            entry.style,
            "row, the only style with inputs to split",
        )
    if entry.add_once and not entry.partial_gradient:
        yield _fault(
            "add-once-without-partial-gradient",
            "a parameter is added on one rank, and its gradient is not partial",
            f"{where}.add_once",
            "true",
            "partial_gradient too",
        )
    if entry.partial_gradient and entry.style != "replicated":
        yield _fault(
            "partial-gradient-of-shard",
            "a parameter that is not replicated has a partial gradient",
            f"{where}.partial_gradient",
            entry.style,
            "replicated",
        )


def _disk_faults(where: str, entry: Parameter, plan: PlanEntries) -> Iterator[Fault]:
    """The names on disk of one entry: as many as its parameters, and of one form."""
    count = _count(entry.name)

    def too_few_or_many(at: str, name: str) -> Iterator[Fault]:
        found = _count(name)
        if None not in (found, count) and found != count:
            what = "a parameter and its tensors on disk differ in number"
            yield _fault("disk-name-count", what, f"{where}.{at}", name, f"as many names as {entry.name}")

    if entry.transposed and entry.layout in plan.layouts:
        shape = plan.shape_of(entry)
        if entry.sources is not None or len(shape) < 2 or plan.layouts[entry.layout].shape != shape:
            yield _fault(
                "transposed-view",
                "a parameter that is transposed on disk is several tensors there, or is not sharded as it is",
                f"{where}.transposed",
                f"{list(shape)}, sharded as {list(plan.layouts[entry.layout].shape)}",
                "one tensor of two or more dimensions, and a layout of its own shape",
            )
    if entry.source is not None:
        yield from too_few_or_many("source", entry.source)
    sources = entry.sources
    if sources is None:
        return
    if entry.source is not None:
        yield _fault(
            "source-and-sources",
            "a parameter is one tensor on disk and several",
            f"{where}.sources",
            f"source {entry.source} too",
            "either source or sources",
        )
    stars = {name.count("*") for name in sources.names}
    if stars != {1} and (stars != {0} or sources.count != 1):
        yield _fault(
            "sources-stars",
            "the names on disk of a parameter are not of one form",
            f"{where}.sources",
            f"{', '.join(sources.names[:3])} with count {sources.count}",
            "one * in each name, or count 1 and none",
        )
    for position, name in enumerate(sources.names):
        yield from too_few_or_many(f"sources.names[{position}]", name)
    if sources.stacked and (entry.shape is not None or entry.layout in plan.layouts):
        shape = plan.shape_of(entry)
        if shape[:1] != (sources.count,):
            yield _fault(
                "sources-count",
                "a stacked parameter is not made of as many tensors as its dimension 0",
                f"{where}.sources.count",
                str(sources.count),
                f"dimension 0 of {list(shape)}",
            )


def _name_faults(plan: PlanEntries) -> Iterator[Fault]:
    """Names that occur twice, ties to nothing, and more names than one plan may have."""
    num_parameters = num_tensors = 0
    for index, entry in enumerate(plan.parameters):
        count = _count(entry.name) or 0
        before, num_parameters = num_parameters, num_parameters + count
        if before <= MAX_NAMES < num_parameters:
            what, expected = "the plan has too many parameters", f"at most {MAX_NAMES} parameters in all"
            yield _fault("too-many-parameters", what, f"parameters[{index}].name", entry.name, expected)
        if entry.sources is not None:
            before, num_tensors = num_tensors, num_tensors + count * len(entry.sources.names) * entry.sources.count
            if before <= MAX_NAMES < num_tensors:
                what, expected = "the plan has too many tensors", f"at most {MAX_NAMES} tensors in all"
                got = f"{num_tensors} tensors up to here"
                yield _fault("too-many-tensors", what, f"parameters[{index}].sources", got, expected)
    if num_parameters > MAX_NAMES:
        return
    seen: set[str] = set()
    for index, entry in enumerate(plan.parameters):
        for name in _names(entry.name):
            if name in seen:
                what = "the plan has a parameter twice"
                yield _fault("parameter-twice", what, f"parameters[{index}].name", name, "each parameter once")
            seen.add(name)
    for index, tie in enumerate(plan.tied):
        if tie.to not in seen:
            what = "a name is tied to a parameter that the plan lacks"
            yield _fault("tied-to-nothing", what, f"tied[{index}].to", tie.to, "a parameter of this plan", seen)
        if tie.name in seen:
            what, expected = "a tied name is a parameter itself", "a second name of a parameter"
            yield _fault("tied-name-is-parameter", what, f"tied[{index}].name", tie.name, expected)


def _module_faults(plan: PlanEntries) -> Iterator[Fault]:
    for index, attribute in enumerate(plan.module_attributes):
        if len(attribute.values) != plan.tp_size:
            yield _fault(
                "attribute-values",
                "a module attribute has not one value for each rank",
                f"module_attributes[{index}].values",
                f"{len(attribute.values)} values",
                f"{plan.tp_size}, one per rank",
            )
    sharded: set[str] | None = None
    for index, module in enumerate(plan.modules):
        crossings = {f"inputs.{name}": crossing for name, crossing in module.inputs.items()}
        if module.output is not None:
            crossings["output"] = module.output
        if module.buffers and sharded is None:
            sharded = {name for entry in plan.parameters if entry.style != "replicated" for name in _names(entry.name)}
        names = _names(module.module) if module.buffers else []
        for buffer, leaf in module.buffers.items():
            missing = next((name for name in names if f"{name}.{leaf}" not in (sharded or ())), None)
            if missing is not None:
                yield _fault(
                    "module-buffer",
                    "a buffer is sharded as a parameter that the plan does not shard",
                    f"modules[{index}].buffers.{buffer}",
                    f"{missing}.{leaf}",
                    "a sharded parameter in the module",
                )
        for name, crossing in crossings.items():
            for problem in _crossing_problems(crossing, plan.tp_size):
                yield _fault(
                    "module-collective",
                    "the collective at a module's input or output is not fully described",
                    f"modules[{index}].{name}",
                    problem,
                    "an operation with all that it needs, and nothing else",
                )


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
    edges = sorted({edge for rank in layout.intervals for interval in rank for edge in interval})
    start = 0
    for sub in layout.sub_parameters:
        if sub.size % sub.unit:
            yield f"a sub-parameter of {sub.size} with units of {sub.unit}"
        for edge in edges[bisect_right(edges, start) : bisect_left(edges, start + sub.size)]:
            past = (edge - start) % sub.unit
            if past:
                yield f"a boundary at {edge}, inside a unit of {sub.unit} that begins at {edge - past}"
        start += sub.size


def _fault(code: str, what: str, where: str, got: str, expected: str, known: Iterable[str] = ()) -> Fault:
    return Fault(
        code=code, what=what, where=where, got=got, expected=expected, next=did_you_mean(got, known) or _COMPILE_AGAIN
    )
