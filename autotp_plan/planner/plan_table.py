"""A plan as tables and as one JSON object, for people and for other tools. Returns data; printing is the CLI's."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autotp_plan.planner.stream_words import stream_json, stream_words
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, OptionError
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand, fold, num_names, some
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Parameter, PlannedModule
from autotp_plan.schemas.storage.safetensors_header import item_size, num_bytes

_LAYER = re.compile(r"([^.{]+\.)*?(\{[^}]*\}|\d+)\.")
"""The beginning of a name up to its layer: `model.layers.{0..31}.`"""
MOST_ROWS = 10_000
"""Of a table; a model whose layers are alike has some dozens."""
_MOST_NAMES = 100
"""In one sentence."""
MOST_JSON_INTERVALS = 100_000_000
"""Parameters times ranks: their JSON has about 40 bytes for each."""


_TOO_MANY = 2**100


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One line of the table: an entry of the plan, which may be a parameter of many layers."""

    name: str
    count: int
    shape: str
    dtype: str
    style: str
    share: str
    bytes_per_rank: int
    rule: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The totals of a plan, in bytes. `replicated` is what every rank holds of parameters that are not sharded."""

    total: int
    per_rank: tuple[int, ...]
    replicated: int
    num_parameters: int


def rows(plan: Plan) -> list[TableRow]:
    """The table of a plan, a row per entry; `bytes_per_rank` is that of the rank that holds most."""
    table = []
    most = {name: max(elements_per_rank(layout, plan.tp_size)) for name, layout in plan.layouts.items()}
    shares = {name: share_words(layout, plan.tp_size) for name, layout in plan.layouts.items()}
    for entry in plan.parameters:
        count = num_names(entry.name)
        table.append(
            TableRow(
                name=entry.name,
                count=count,
                shape=" x ".join(map(str, plan.shape_of(entry))) or "scalar",
                dtype=entry.dtype,
                style=style_words(entry),
                share=shares[entry.layout],
                bytes_per_rank=count * most[entry.layout] * item_size(entry.dtype),
                rule=str(entry.rule),
            )
        )
    return table


def summary(plan: Plan) -> Summary:
    """The totals of a plan."""
    total = count = 0
    item_bytes: dict[str, int] = defaultdict(int)
    for entry in plan.parameters:
        layers = num_names(entry.name)
        count += layers
        total += layers * num_bytes(entry.dtype, plan.shape_of(entry))
        item_bytes[entry.layout] += layers * item_size(entry.dtype)
    per_rank = [0] * plan.tp_size
    replicated = 0
    for name, size in item_bytes.items():
        layout = plan.layouts[name]
        replicated += size * math.prod(layout.shape) if layout.dim is None else 0
        for rank, elements in enumerate(elements_per_rank(layout, plan.tp_size)) if layout.dim is not None else ():
            per_rank[rank] += size * elements
    held = tuple(size + replicated for size in per_rank)
    return Summary(total=total, per_rank=held, replicated=replicated, num_parameters=count)


def as_json(plan: Plan) -> dict[str, Any]:
    """`{"tp_size", "parameters": [{"name", "shape", "dtype", "style", "rule", "dim", "intervals"}]}`, expanded.
    With `"sequence_parallel": {"layers", "gather", "scatter", "end"}` where the stream is sharded.

    One entry per module parameter. `dim` is null and every rank holds all of it when a parameter is replicated. Where a
    weight is sharded in a logical view of its shape, the entry has that as `view`, and `dim` is a dimension of it.

    Raises:
        OptionError: it would have more than `MOST_JSON_INTERVALS` intervals.
    """
    value: dict[str, Any] = json.loads("".join(json_pieces(plan)))
    return value


def json_pieces(plan: Plan) -> Iterator[str]:
    """The text of `as_json`, parameter by parameter, so that it need not be in memory. Raises as `as_json`."""
    intervals = summary(plan).num_parameters * plan.tp_size
    if intervals > MOST_JSON_INTERVALS:
        raise OptionError(
            Fault(
                code="json-too-long",
                what="the plan is too large to be shown as JSON",
                where="--format",
                got=f"{intervals} parameters times ranks",
                expected=f"at most {MOST_JSON_INTERVALS}",
                next="use the table, or read the plan file: it is JSON too, with the layers of a model in one entry",
            )
        )
    return _json_pieces(plan)


def _json_pieces(plan: Plan) -> Iterator[str]:
    yield f'{{\n "tp_size": {plan.tp_size},\n'
    if plan.sequence_parallel is not None:
        said = json.dumps(stream_json(plan.sequence_parallel), indent=1).replace("\n", "\n ")
        yield f' "sequence_parallel": {said},\n'
    yield ' "parameters": ['
    between = "\n  "
    for entry in plan.parameters:
        layout = plan.layouts[entry.layout]
        shape = plan.shape_of(entry)
        facts: dict[str, Any] = {
            "shape": list(shape),
            "dtype": entry.dtype,
            "style": entry.style,
            "rule": str(entry.rule),
            "dim": layout.dim,
            "intervals": [[list(run) for run in layout.rank_intervals(rank)] for rank in range(plan.tp_size)],
        }
        if shape != layout.shape:
            facts["view"] = list(layout.shape)
        rest = json.dumps(facts, indent=1).removeprefix("{").replace("\n", "\n  ")
        for name in expand(entry.name):
            yield f'{between}{{\n   "name": {json.dumps(name)},{rest}'
            between = ",\n  "
    yield "\n ]\n}" if plan.parameters else "]\n}"


def human_bytes(count: int) -> str:
    """`1.5 GiB` and the like."""
    if count >= _TOO_MANY:  # of a document that says anything
        return f"more than {_TOO_MANY >> 40:.0e} TiB"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def collectives(module: PlannedModule) -> str:
    """The collectives at a module's inputs and output, in words: `gradient of hidden_states summed, output summed`."""
    words = {"copy": "gradient of {} summed", "split": "{} split", "reduce": "{} summed"}
    crossings = {**module.inputs, **({"output": module.output} if module.output is not None else {})}
    said = []
    for name, crossing in crossings.items():
        part = f" {list(crossing.interval)}" if crossing.interval is not None else ""
        said.append(words[crossing.operation].format(name + part))
    said += [f"{buffer} split" for buffer in module.buffers]
    return ", ".join(said + ["means over all ranks"] * module.mean_over_ranks)


def style_words(entry: Parameter) -> str:
    """How the module of a parameter runs: `column, gathered`."""
    if entry.gather_output:
        return f"{entry.style}, gathered"
    if entry.split_input:
        return f"{entry.style}, input split"
    if entry.add_once:
        return f"{entry.style}, added once"
    return f"{entry.style}, gradient summed" if entry.partial_gradient else entry.style


def share_words(layout: Layout, tp_size: int) -> str:
    """What of a parameter each of `tp_size` ranks holds: `1/4 of dim 0`."""
    if layout.dim is None:
        return "all"
    size = layout.shape[layout.dim]
    lengths = [iv.length(rank) for rank in layout.intervals]
    many = len(layout.sub_parameters)
    where = f"dim {layout.dim}" if many == 1 else f"each of {many} in dim {layout.dim}"
    if len(set(lengths)) == 1 and lengths[0] * tp_size == size:
        return f"1/{tp_size} of {where}"
    held = f"{min(lengths)}" if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    several = iv.most_holders(layout.intervals)
    shared = f", some on {several} ranks" if several > 1 else ""
    return f"{held} of {size} of {where}{shared}"


def elements_per_rank(layout: Layout, tp_size: int) -> list[int]:
    """How many elements each rank holds; of a replicated tensor one number for all."""
    return [math.prod(layout.rank_shape(rank)) for rank in range(1 if layout.dim is None else tp_size)]


def groups(plan: Plan) -> list[tuple[str, list[TableRow]]]:
    """The table in groups: `("model.layers.{0..31}.", rows of those layers)`, and `("", rows outside of layers)`.

    They are the first `MOST_ROWS` of the plan.
    """
    found: list[tuple[str, list[TableRow]]] = []
    for row in rows(plan)[:MOST_ROWS]:
        prefix = layer_prefix(row.name)
        if not found or found[-1][0] != prefix:
            found.append((prefix, []))
        found[-1][1].append(row)
    return found


def layer_prefix(name: str) -> str:
    """The beginning of a name up to its layer, `model.layers.{0..31}.`; empty where the name is of no layer."""
    match = _LAYER.match(name)
    return match.group() if match else ""


def headline(plan: Plan) -> str:
    """`LlamaForCausalLM at TP=4, 291 parameters in BF16`."""
    model = plan.model.architecture or plan.model.model_type or "a model without a config"
    dtypes = ", ".join(sorted({entry.dtype for entry in plan.parameters}))
    return f"{model} at TP={plan.tp_size}, {summary(plan).num_parameters} parameters in {dtypes}"


def computed_in_full(plan: Plan) -> list[str]:
    """The modules whose matrices every rank multiplies by in full, so that more ranks make them no faster.

    Returns:
        names, layers folded; where nothing in a module is sharded, the module stands for what is in it.
    """
    whole: set[str] = set()
    sharded: set[str] = set()
    for entry in plan.parameters:
        modules = {name.rpartition(".")[0] for name in expand(entry.name)}
        if plan.layouts[entry.layout].dim is not None:
            sharded.update(*map(_and_parents, modules))
        elif len(plan.shape_of(entry)) > 1:
            whole |= modules
    tops = {next(one for one in reversed([module, *_and_parents(module)]) if one not in sharded)
            for module in whole - sharded}  # fmt: skip
    return fold(name for name in tops if name)


def _and_parents(module: str) -> list[str]:
    """The module and all that it is in: `a.b`, `a`, and the empty name of the model itself."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)] + [""]


def describe(plan: Plan) -> list[str]:
    """What the table does not say, in sentences: totals, what is replicated and what that costs, ties, attributes."""
    totals = summary(plan)
    least, most = min(totals.per_rank), max(totals.per_rank)
    held = human_bytes(most) if least == most else f"{human_bytes(least)} to {human_bytes(most)}"
    copies = sum(totals.per_rank) - totals.total
    more = len(plan.parameters) - MOST_ROWS
    lines = [f"not in the table: {more} more entries, which the plan file has"] if more > 0 else []
    lines += [f"compiled from {plan.model.repository}"] if plan.model.repository else []
    lines += [f"compiled by {plan.rules}, which `reshard` applies again"] if plan.rules else []
    lines += [
        f"each rank holds {held} of {human_bytes(totals.total)} ({most / max(1, totals.total):.1%}; an even share of "
        f"everything is {1 / plan.tp_size:.1%}, {human_bytes(totals.total // plan.tp_size)})",
        f"replicated: {human_bytes(totals.replicated)} on every rank, {human_bytes(copies)} of copies over all ranks",
    ]
    if in_full := computed_in_full(plan):
        lines.append(f"computed in full on every rank: {some(in_full, _MOST_NAMES)}")
    gathered = fold(p.name.rpartition(".")[0] for p in plan.expanded() if p.gather_output and _LAYER.match(p.name))
    if gathered:
        lines.append(f"gathered, so that what follows is computed in full on every rank: {some(gathered, _MOST_NAMES)}")
    lines += [f"{tie.name} is {tie.to}, run as {tie.style}" for tie in plan.tied]
    for attribute in plan.module_attributes:
        same = len(set(attribute.values)) == 1
        value = attribute.values[0] if same else list(attribute.values)
        lines.append(f"set on each rank: {attribute.module}.{attribute.attribute} = {value}")
    lines += [f"{module.module}: {collectives(module)}" for module in plan.modules]
    lines += [said for said in [stream_words(plan)] if said is not None]
    if plan.dequantize is not None:
        lines.append(f"the checkpoint has weights of {plan.dequantize} while they are sharded or loaded")
    lines += [f"note: {note}" for note in plan.notes]
    return [*lines, verified_words(plan)]


def verified_words(plan: Plan) -> str:
    """What the plan's stamp says; one without a seal is of version 0.1, or was written by hand."""
    if plan.verified is None:
        return "not verified: run `autotp-plan verify`"
    if plan.verified.seal is None:
        return f"a stamp of version 0.1, which nothing binds to a proof, says verified: {plan.verified}"
    return f"verified: {plan.verified}"
