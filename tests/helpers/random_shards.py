"""Random checkpoints and random plans for them: any layout that a plan can say, whatever a compiler would make."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from autotp_plan.planner.model.inventory import inventory_hash
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.plan.document import ModelIdentity, Parameter, Plan, Sources, Tie
from autotp_plan.schemas.plan.rule_ref import Origin, RuleRef
from tests.helpers.checkpoints import write_file

DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "I8")


@dataclass
class Model:
    """Parameters by name: dtype, shape, what they are on disk; and the tensors on disk, with those that are unused."""

    parameters: dict[str, tuple[str, tuple[int, ...], str | None, Sources | None]] = field(default_factory=dict)
    disk: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    tied: list[tuple[str, str]] = field(default_factory=list)


def random_model(random: Random) -> Model:
    """A few parameters: plain, renamed, stacked or concatenated; tables and ties that no rank reads."""
    model = Model()
    for number in range(random.randint(1, 5)):
        name, dtype = f"m{number}.w", random.choice(DTYPES)
        shape = tuple(random.randint(1, 7) for _ in range(random.choice((1, 2, 2, 3, 3))))
        source: str | None = None
        sources: Sources | None = None
        kind = random.choice(("plain", "plain", "renamed", "stacked", "concatenated"))
        if kind == "renamed":
            source = f"disk{number}.w"
        elif kind == "stacked" and len(shape) >= 2:
            first = random.randint(1, shape[1])
            rows = [first, shape[1] - first] if first < shape[1] else [first]
            names = tuple(f"e{number}.*.{position}" for position in range(len(rows)))
            sources = Sources(names=names, count=shape[0])
            for expert in range(shape[0]):
                for position, row in enumerate(rows):
                    model.disk[f"e{number}.{expert}.{position}"] = (dtype, (row, *shape[2:]))
        elif kind == "concatenated" and shape[0] > 1:
            first = random.randint(1, shape[0] - 1)
            sources = Sources(names=(f"c{number}.q", f"c{number}.k"))
            model.disk[f"c{number}.q"] = (dtype, (first, *shape[1:]))
            model.disk[f"c{number}.k"] = (dtype, (shape[0] - first, *shape[1:]))
        if sources is None:
            model.disk[source or name] = (dtype, shape)
        model.parameters[name] = (dtype, shape, source, sources)
    if random.random() < 0.4:
        model.ignored.append("table")
        model.disk["table"] = ("U8", (random.randint(1, 9),))
    if random.random() < 0.4:
        name, (dtype, shape, _, _) = random.choice(list(model.parameters.items()))
        model.tied.append(("tied.w", name))
        model.disk["tied.w"] = (dtype, shape)
    return model


def random_plan(model: Model, tp_size: int, random: Random) -> Plan:
    """A plan in which every parameter is sharded anywhere, in any view, some of it on several ranks."""
    layouts: dict[str, Layout] = {}
    parameters = []
    for name, (dtype, shape, source, sources) in model.parameters.items():
        layout = _layout(shape, tp_size, random)
        layouts[name] = layout
        own = shape if layout.shape != shape else None
        known = {"style": "shard" if layout.dim is not None else "replicated", "rule": "random"}
        parameters.append(
            Parameter(name=name, layout=name, dtype=dtype, shape=own, source=source, sources=sources, **known)  # type: ignore[arg-type]
        )
    inventory = inventory_hash({name: (shape, dtype) for name, (dtype, shape, _, _) in model.parameters.items()})
    by_name = {parameter.name: parameter for parameter in parameters}
    return Plan(
        model=ModelIdentity(model_type=None, architecture=None, config=None, inventory=inventory),
        tp_size=tp_size,
        layouts=layouts,
        parameters=tuple(parameters),
        tied=tuple(
            Tie(name=name, to=to, style=by_name[to].style, rule=RuleRef(Origin.UNKNOWN, "random"))
            for name, to in model.tied
        ),
        ignored=tuple(model.ignored),
    )


def write_random(model: Model, folder: Path, random: Random) -> Path:
    """The model's checkpoint: tensors dealt out to files at random, with an index where there are several."""
    folder.mkdir()
    names = list(model.disk)
    tied = {name: model.parameters[to][2] or to for name, to in model.tied}
    random.shuffle(names)
    num_files = random.randint(1, min(4, len(names)))
    if num_files == 1 and random.random() < 0.7:
        write_file(folder / "model.safetensors", {name: model.disk[name] for name in names}, tied)
    else:
        weight_map: dict[str, str] = {}
        for part in range(num_files):
            mine = names[part::num_files]
            write_file(folder / f"model-{part}.safetensors", {name: model.disk[name] for name in mine}, tied)
            weight_map.update(dict.fromkeys(mine, f"model-{part}.safetensors"))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _layout(shape: tuple[int, ...], tp_size: int, random: Random) -> Layout:
    view = _view(shape, random)
    dim = random.randrange(len(view))
    size = view[dim]
    kind = random.choice(("whole", "even", "even", "anywhere", "anywhere", "permuted"))
    if kind == "whole":
        return Layout(shape=shape)
    if kind == "even":
        held: list[list[iv.Interval]] = [[run] if run[0] < run[1] else [] for run in iv.divide(size, tp_size)]
    else:
        held = [[] for _ in range(tp_size)]
        for index in range(size):  # some index on one rank, some on several
            for rank in random.sample(range(tp_size), random.choice((1, 1, 1, random.randint(1, tp_size)))):
                held[rank].append((index, index + 1))
        if kind == "permuted":
            for intervals in held:
                random.shuffle(intervals)
    ranks = tuple(iv.join_touching(intervals) for intervals in held)
    return Layout(shape=view, dim=dim, sub_parameters=(SubParameter(size=size, unit=1),), intervals=ranks)


def _view(shape: Sequence[int], random: Random) -> tuple[int, ...]:
    """The shape, or with one of its dimensions in two."""
    at = random.randrange(len(shape))
    divisors = [n for n in range(2, shape[at]) if shape[at] % n == 0]
    if not divisors or random.random() < 0.6:
        return tuple(shape)
    first = random.choice(divisors)
    view = (*shape[:at], first, shape[at] // first, *shape[at + 1 :])
    assert math.prod(view) == math.prod(shape)
    return view
