"""In what the section `sequence_parallel` of a plan can contradict itself and the plan's parameters.

Between two modules of the stream a rank holds its tokens and no others. So whatever needs every token is given them
before, and each rank takes its tokens again behind it; what sees a part of the tokens has a part of its gradient.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator

from autotp_plan.schemas.documents import did_you_mean
from autotp_plan.schemas.errors import Fault
from autotp_plan.schemas.names import expand, natural_key
from autotp_plan.schemas.plan.entries import Crossing, Parameter, PlanEntries, SequenceParallel
from autotp_plan.schemas.plan.stream_places import Modules, Stream, layers_of_style, names_of

SECTION = "sequence_parallel"
_COPY = Crossing(operation="copy")


def stream_patterns(planned: SequenceParallel | None) -> dict[str, tuple[str, ...]]:
    """The names with braces of a section, by where they stand in the plan."""
    if planned is None:
        return {}
    lists = {"layers": planned.layers, "gather": planned.gather, "scatter": planned.scatter, "end": (planned.end,)}
    return {f"{SECTION}.{key}": patterns for key, patterns in lists.items()}


def stream_faults(plan: PlanEntries) -> Iterator[Fault]:
    """Everything that is wrong with the section `sequence_parallel` of a plan whose names can be expanded."""
    planned = plan.sequence_parallel
    if planned is None:
        return
    if plan.tp_size == 1:
        what, expected = "the stream of a single rank is sharded", "no such section at TP=1"
        yield _fault("stream-of-one-rank", what, SECTION, "tp_size 1", expected)
    names = {where: names_of(patterns) for where, patterns in stream_patterns(planned).items()}
    wrong = [*_list_faults(names, planned.end), *_unknown_faults(names, plan)]
    yield from wrong
    stream = None if wrong else Stream.of(plan)
    if stream is not None:
        yield from _place_faults(stream, names, layers_of_style(plan, "column"))
        yield from _parameter_faults(stream, plan)


def _list_faults(names: dict[str, list[str]], end: str) -> Iterator[Fault]:
    """What is wrong with the lists by themselves."""
    for where, listed in names.items():
        before = ""
        for name in sorted(listed, key=lambda one: f"{one}."):
            if before and f"{name}.".startswith(f"{before}."):
                what = "a place of the sharded stream is there twice, or inside of another"
                yield _fault("stream-place-twice", what, where, name, f"no place at or in {before} but this")
                break
            before = name
    where = f"{SECTION}.layers"
    layers = names[where]
    if layers != sorted(layers, key=natural_key):
        what = "the layers of the sharded stream are not in order"
        yield _fault("stream-order", what, where, ", ".join(layers[:3]), "the first layer first")
    inside = Modules(layers).holding(end)
    if names[f"{SECTION}.end"] != [end] or (inside is not None and end != layers[-1]):
        what = "the sharded stream does not end behind its layers"
        yield _fault("stream-end", what, f"{SECTION}.end", end, f"{layers[-1]}, or a module outside of the layers")


def _unknown_faults(names: dict[str, list[str]], plan: PlanEntries) -> Iterator[Fault]:
    """Names of no module that has parameters, one for each list."""
    known = _Parameters(plan)
    for where, listed in names.items():
        missing = next((name for name in listed if not known.are_in(name)), None)
        if missing is not None:
            what = "a place of the sharded stream is no module of the plan"
            modules = (module for entry in plan.parameters for module in _parents(entry.name))
            yield _fault("stream-unknown-module", what, where, missing, "a module that holds parameters", modules)


class _Parameters:
    """The parameters of a plan, sorted."""

    def __init__(self, plan: PlanEntries) -> None:
        self._names = sorted(name for entry in plan.parameters for name in expand(entry.name))

    def are_in(self, module: str) -> bool:
        at = bisect_left(self._names, f"{module}.")
        return at < len(self._names) and self._names[at].startswith(f"{module}.")


def _place_faults(stream: Stream, names: dict[str, list[str]], columns: Collection[str]) -> Iterator[Fault]:
    """Gathers and scatters that are not in a layer, or lack the other: one of each kind."""
    told: set[str] = set()

    def once(fault: Fault) -> Iterator[Fault]:
        if fault.code not in told:
            told.add(str(fault.code))
            yield fault

    for key in ("gather", "scatter"):
        for name in names[f"{SECTION}.{key}"]:
            layer = stream.layers.holding(name)
            if layer is None:
                what = "a place of the sharded stream is in none of its layers"
                yield from once(_fault("stream-place-outside", what, f"{SECTION}.{key}", name, "a module of a layer"))
            elif key == "gather" and not _is_scattered(name, layer, stream, columns):
                what = "a module is given every token, and no rank takes its tokens again"
                expected = f"a scatter at or in {name}; of a column-parallel layer, in its layer"
                yield from once(_fault("stream-gather-alone", what, f"{SECTION}.gather", name, expected))
            elif key == "scatter" and stream.gather.holding(name) is None:
                fed = name in stream.rows and stream.gather.inside(layer) is not None
                if not fed:
                    what = "each rank takes its tokens of what has no others"
                    expected = f"a gather at {name} or around it; of a row-parallel layer, in its layer"
                    yield from once(_fault("stream-scatter-alone", what, f"{SECTION}.scatter", name, expected))


def _is_scattered(name: str, layer: str, stream: Stream, columns: Collection[str]) -> bool:
    """Whether each rank takes its tokens again behind a module that is given every token."""
    if name in columns:
        return stream.scatter.inside(layer) is not None
    return stream.scatter.inside(name) is not None or stream.scatter.holding(name) is not None


def _parameter_faults(stream: Stream, plan: PlanEntries) -> Iterator[Fault]:
    """Entries of the plan that do not run as the section says."""
    copied = {name for one in plan.modules if one.output == _COPY for name in expand(one.module)}
    summed = {
        name for one in plan.modules if one.output is not None and one.output.operation == "reduce"
        for name in expand(one.module)
    }  # fmt: skip
    for index, entry in enumerate(plan.parameters):
        for module in _modules_of(entry):
            if stream.layers.holding(module) is None and stream.end.holding(module) is None:
                continue
            where = f"parameters[{index}]"
            if entry.style == "replicated":
                if not entry.partial_gradient and stream.sees_a_part(module):
                    what = "a parameter sees a part of the tokens, and its gradient is not summed"
                    yield _fault("stream-gradient", what, where, entry.name, "partial_gradient")
                    break
            elif (entry.style == "row" or module in summed) and module not in copied:
                if stream.scatter.holding(module) is None:
                    what = "a sum over the ranks goes into the sharded stream with every token"
                    expected = f"{module}, or a module around it, among {SECTION}.scatter"
                    yield _fault("stream-sum-not-scattered", what, where, entry.name, expected)
                    break
            elif stream.gather.holding(module) is None:
                what = "a sharded weight is given a part of the tokens"
                expected = f"{module}, or a module around it, among {SECTION}.gather"
                yield _fault("stream-weight-not-gathered", what, where, entry.name, expected)
                break


def _modules_of(entry: Parameter) -> list[str]:
    return [name.rpartition(".")[0] for name in expand(entry.name)]


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _fault(code: str, what: str, where: str, got: str, expected: str, known: Iterable[str] = ()) -> Fault:
    next_step = did_you_mean(got, known) or "compile the plan again; plans are not written by hand"
    return Fault(code=code, what=what, where=where, got=got[:200], expected=expected[:400], next=next_step)
