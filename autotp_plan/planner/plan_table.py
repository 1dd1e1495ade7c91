"""A plan as tables and as one JSON object, for people and for other tools. Returns data; printing is the CLI's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand, fold
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Parameter, PlannedModule
from autotp_plan.schemas.storage.safetensors_header import num_bytes

_LAYER = re.compile(r"([^.{]+\.)*?(\{[^}]*\}|\d+)\.")
"""The beginning of a name up to its layer: `model.layers.{0..31}.`"""


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
    for entry in plan.parameters:
        layout = plan.layouts[entry.layout]
        count = len(expand(entry.name))
        table.append(
            TableRow(
                name=entry.name,
                count=count,
                shape=" x ".join(map(str, plan.shape_of(entry))) or "scalar",
                dtype=entry.dtype,
                style=_style(entry),
                share=_share(layout, plan.tp_size),
                bytes_per_rank=count * max(_rank_bytes(entry, layout, rank) for rank in range(plan.tp_size)),
                rule=str(entry.rule),
            )
        )
    return table


def summary(plan: Plan) -> Summary:
    """The totals of a plan."""
    per_rank = [0] * plan.tp_size
    total = replicated = count = 0
    for entry in plan.parameters:
        layout = plan.layouts[entry.layout]
        layers = len(expand(entry.name))
        count += layers
        size = layers * num_bytes(entry.dtype, plan.shape_of(entry))
        total += size
        replicated += size if layout.dim is None else 0
        for rank in range(plan.tp_size):
            per_rank[rank] += layers * _rank_bytes(entry, layout, rank)
    return Summary(total=total, per_rank=tuple(per_rank), replicated=replicated, num_parameters=count)


def as_json(plan: Plan) -> dict[str, Any]:
    """`{"tp_size", "parameters": [{"name", "shape", "dtype", "style", "rule", "dim", "intervals"}]}`, expanded.

    One entry per module parameter. `dim` is null and every rank holds all of it when a parameter is replicated. Where a
    weight is sharded in a logical view of its shape, the entry has that as `view`, and `dim` is a dimension of it.
    """
    parameters = []
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        shape = plan.shape_of(parameter)
        entry: dict[str, Any] = {
            "name": parameter.name,
            "shape": list(shape),
            "dtype": parameter.dtype,
            "style": parameter.style,
            "rule": str(parameter.rule),
            "dim": layout.dim,
            "intervals": [[list(run) for run in layout.rank_intervals(rank)] for rank in range(plan.tp_size)],
        }
        if shape != layout.shape:
            entry["view"] = list(layout.shape)
        parameters.append(entry)
    return {"tp_size": plan.tp_size, "parameters": parameters}


def human_bytes(count: int) -> str:
    """`1.5 GiB` and the like."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def _collectives(module: PlannedModule) -> str:
    """The collectives at a module's inputs and output, in words."""
    words = {"copy": "gradient of {} summed", "split": "{} split", "reduce": "{} summed"}
    crossings = {**module.inputs, **({"output": module.output} if module.output is not None else {})}
    said = []
    for name, crossing in crossings.items():
        part = f" {list(crossing.interval)}" if crossing.interval is not None else ""
        said.append(words[crossing.operation].format(name + part))
    said += [f"{buffer} split" for buffer in module.buffers]
    return ", ".join(said + ["means over all ranks"] * module.mean_over_ranks)


def _style(entry: Parameter) -> str:
    if entry.gather_output:
        return f"{entry.style}, gathered"
    if entry.split_input:
        return f"{entry.style}, input split"
    if entry.add_once:
        return f"{entry.style}, added once"
    return f"{entry.style}, gradient summed" if entry.partial_gradient else entry.style


def _share(layout: Layout, tp_size: int) -> str:
    if layout.dim is None:
        return "all"
    size = layout.shape[layout.dim]
    lengths = [iv.length(rank) for rank in layout.intervals]
    many = len(layout.sub_parameters)
    where = f"dim {layout.dim}" if many == 1 else f"each of {many} in dim {layout.dim}"
    if len(set(lengths)) == 1 and lengths[0] * tp_size == size:
        return f"1/{tp_size} of {where}"
    held = f"{min(lengths)}" if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    several = max(len(ranks) for _, ranks in iv.holders(layout.intervals))
    shared = f", some on {several} ranks" if several > 1 else ""
    return f"{held} of {size} of {where}{shared}"


def _rank_bytes(entry: Parameter, layout: Layout, rank: int) -> int:
    return num_bytes(entry.dtype, layout.rank_shape(rank))


def groups(plan: Plan) -> list[tuple[str, list[TableRow]]]:
    """The table in groups: `("model.layers.{0..31}.", rows of those layers)`, and `("", rows outside of layers)`."""
    found: list[tuple[str, list[TableRow]]] = []
    for row in rows(plan):
        match = _LAYER.match(row.name)
        prefix = match.group() if match else ""
        if not found or found[-1][0] != prefix:
            found.append((prefix, []))
        found[-1][1].append(row)
    return found


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
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        module = parameter.name.rpartition(".")[0]
        if layout.dim is not None:
            sharded.update(_and_parents(module))
        elif len(plan.shape_of(parameter)) > 1:
            whole.add(module)
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
    lines = [f"compiled from {plan.model.repository}"] if plan.model.repository else []
    lines += [f"compiled by {plan.rules}, which `reshard` applies again"] if plan.rules else []
    lines += [
        f"each rank holds {held} of {human_bytes(totals.total)} ({most / max(1, totals.total):.1%}; an even share of "
        f"everything is {1 / plan.tp_size:.1%}, {human_bytes(totals.total // plan.tp_size)})",
        f"replicated: {human_bytes(totals.replicated)} on every rank, {human_bytes(copies)} of copies over all ranks",
    ]
    if in_full := computed_in_full(plan):
        lines.append(f"computed in full on every rank: {', '.join(in_full)}")
    gathered = fold(p.name.rpartition(".")[0] for p in plan.expanded() if p.gather_output and _LAYER.match(p.name))
    if gathered:
        lines.append(f"gathered, so that what follows is computed in full on every rank: {', '.join(gathered)}")
    lines += [f"{tie.name} is {tie.to}, run as {tie.style}" for tie in plan.tied]
    for attribute in plan.module_attributes:
        same = len(set(attribute.values)) == 1
        value = attribute.values[0] if same else list(attribute.values)
        lines.append(f"set on each rank: {attribute.module}.{attribute.attribute} = {value}")
    lines += [f"{module.module}: {_collectives(module)}" for module in plan.modules]
    if plan.dequantize is not None:
        lines.append(f"the checkpoint has weights of {plan.dequantize} while they are sharded or loaded")
    lines += [f"note: {note}" for note in plan.notes]
    return [*lines, _verified(plan)]


def _verified(plan: Plan) -> str:
    """What the plan's stamp says; one without a seal is of version 0.1, or was written by hand."""
    if plan.verified is None:
        return "not verified: run `autotp-plan verify`"
    if plan.verified.seal is None:
        return f"a stamp of version 0.1, which nothing binds to a proof, says verified: {plan.verified}"
    return f"verified: {plan.verified}"
