"""Where a plan's residual stream can be sharded along the sequence, found from the plan itself.

Between the blocks of a layer every rank holds the same tokens. What the plan shards in a layer needs every token and is
given them; what it leaves whole, norms above all, looks at each token by itself, sees a part of them, and so has a part
of its gradient. The names say where these places are; that they are right is for `verify` to prove.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.names import expand, fold, is_index, natural_key
from autotp_plan.schemas.plan.document import Crossing, Parameter, Plan, SequenceParallel
from autotp_plan.schemas.plan.without_stream import with_partial_gradients

OPTION = "--sequence-parallel"
"""The option of `compile`; `sequence_parallel=True` of `compile_plan`."""
WITHOUT = f"compile without {OPTION}"
"""What is proposed where it cannot be."""
_FINAL_NORMS = ("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm")
"""Names of the norm behind the last layer, next to the list of layers."""
_COPY = Crossing(operation="copy")


def with_sequence_parallel(plan: Plan) -> Plan:
    """`plan` with its residual stream sharded along the sequence.

    Args:
        plan: a plan of a language model.

    Returns:
        The plan with `sequence_parallel`, and `partial_gradient` of every parameter that sees a part of the tokens.

    Raises:
        CompileError: the plan has no layers whose stream could be sharded.
    """
    if plan.tp_size == 1:
        return plan
    tree = _Tree.of(plan)
    layers = _layers(plan, tree)
    places = _Places()
    for layer in layers:
        _add_layer(layer, tree, places)
    end = _final_norm(layers, tree)
    if end is None:
        end = layers[-1]
    else:
        places.stream.update(tree.names_below(end))
    return dataclasses.replace(
        plan,
        parameters=tuple(with_partial_gradients(plan.parameters, places.stream)),
        sequence_parallel=SequenceParallel(
            layers=tuple(fold(layers)),
            gather=tuple(fold(places.gather)),
            scatter=tuple(fold(places.scatter)),
            end=end,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """Modules that gather and scatter, and the parameters that see a part of the tokens."""

    gather: list[str] = field(default_factory=list)
    scatter: list[str] = field(default_factory=list)
    stream: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Tree:
    """The parameters of a plan by the modules that hold them.

    Attributes:
        below: every parameter below a module, by the module's name.
        children: names of a module's modules that hold parameters, by its name.
        shapes: of each parameter.
        reduces: modules, not parallel layers, whose output is a sum over the ranks.
        copied: row-parallel layers whose output goes into sharded weights again.
    """

    below: Mapping[str, list[Parameter]]
    children: Mapping[str, list[str]]
    shapes: Mapping[str, tuple[int, ...]]
    reduces: frozenset[str]
    copied: frozenset[str]

    @classmethod
    def of(cls, plan: Plan) -> _Tree:
        below: dict[str, list[Parameter]] = defaultdict(list)
        children: dict[str, dict[str, None]] = defaultdict(dict)
        shapes = {}
        for parameter in plan.expanded():
            shapes[parameter.name] = plan.shape_of(parameter)
            module = parameter.name.rpartition(".")[0]
            below[module].append(parameter)
            while module:
                parent = module.rpartition(".")[0]
                children[parent][module] = None
                below[parent].append(parameter)
                module = parent
        outputs = [(name, entry.output) for entry in plan.modules for name in expand(entry.module)]
        return cls(
            below=below,
            children={parent: list(names) for parent, names in children.items()},
            shapes=shapes,
            reduces=frozenset(name for name, output in outputs if output and output.operation == "reduce"),
            copied=frozenset(name for name, output in outputs if output == _COPY),
        )

    def names_below(self, module: str) -> list[str]:
        return [parameter.name for parameter in self.below[module]]

    def is_sharded(self, module: str) -> bool:
        """Whether ranks hold shards of something below."""
        return any(parameter.style != "replicated" for parameter in self.below[module])

    def multiplies(self, module: str) -> bool:
        """Whether there are matrices below: such a module may look at several tokens."""
        return any(len(self.shapes[parameter.name]) > 1 for parameter in self.below[module])

    def own(self, module: str) -> list[Parameter]:
        """The parameters that the module itself holds."""
        return [one for one in self.below[module] if one.name.rpartition(".")[0] == module]

    def style(self, module: str) -> str:
        """How the module's `weight` is sharded; empty where it has none."""
        return next((one.style for one in self.own(module) if one.name.endswith(".weight")), "")


def _layers(plan: Plan, tree: _Tree) -> list[str]:
    """The layers of the language model: the list of modules that holds most row-parallel weights."""
    lists: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for parameter in plan.expanded():
        parts = parameter.name.split(".")
        at = next((place for place, part in enumerate(parts) if is_index(part)), None)
        if at is not None and (parameter.style == "row" or parameter.name.rpartition(".")[0] in tree.reduces):
            lists[".".join(parts[:at])][".".join(parts[: at + 1])] += 1
    text = {name: found for name, found in lists.items() if not _is_of_a_tower(name)} or lists
    if not text:
        raise CompileError(_fault("no layers with row-parallel weights", "a plan that shards numbered layers"))
    name = max(text, key=lambda one: sum(text[one].values()))
    return sorted((child for child in tree.children[name] if is_index(child.rpartition(".")[2])), key=natural_key)


def _is_of_a_tower(name: str) -> bool:
    return any(word in name.split(".") for word in ("visual", "vision_tower", "vision_model", "audio_tower"))


def _add_layer(layer: str, tree: _Tree, places: _Places) -> None:
    places.stream.update(parameter.name for parameter in tree.own(layer))
    for child in tree.children.get(layer, ()):
        _add_module(child, tree, places)


def _add_module(module: str, tree: _Tree, places: _Places) -> None:
    """A module between two points of the stream."""
    if not tree.is_sharded(module):
        if tree.multiplies(module):
            places.gather.append(module)
            places.scatter.append(module)
        else:
            places.stream.update(tree.names_below(module))
        return
    style = tree.style(module)
    if style == "column":
        places.gather.append(module)
    elif style == "row":
        _add_row(module, tree, places)
    else:
        block = _block_among_norms(module, tree)
        if block is not None:
            for child in tree.children[module]:
                _add_module(child, tree, places)
            return
        places.gather.append(module)
        rows = [name for name in _modules_below(module, tree) if tree.style(name) == "row" and name not in tree.copied]
        if len(rows) == 1 and not any(name in tree.reduces for name in [module, *_modules_below(module, tree)]):
            _add_row(rows[0], tree, places)
        else:
            places.scatter.append(module)


def _add_row(module: str, tree: _Tree, places: _Places) -> None:
    places.scatter.append(module)
    places.stream.update(one.name for one in tree.own(module) if one.style == "replicated")


def _block_among_norms(module: str, tree: _Tree) -> str | None:
    """The one block in a module that otherwise holds norms, as DBRX's `norm_attn_norm` does."""
    blocks = [child for child in tree.children.get(module, ()) if tree.multiplies(child)]
    others = [child for child in tree.children.get(module, ()) if child not in blocks]
    is_one = len(blocks) == 1 and bool(others) and not tree.own(module) and bool(tree.children.get(blocks[0]))
    return blocks[0] if is_one else None


def _modules_below(module: str, tree: _Tree) -> Iterator[str]:
    for child in tree.children.get(module, ()):
        yield child
        yield from _modules_below(child, tree)


def _final_norm(layers: Sequence[str], tree: _Tree) -> str | None:
    """The norm behind the last layer; None where no name says which it is."""
    parent = layers[0].rpartition(".")[0].rpartition(".")[0]
    beginning = f"{parent}." if parent else ""
    found = [name for name in (beginning + leaf for leaf in _FINAL_NORMS) if name in tree.below]
    return found[0] if len(found) == 1 and not tree.multiplies(found[0]) else None


def _fault(got: str, expected: str) -> Fault:
    return Fault(
        code="no-sequence-parallel",
        what="this model's residual stream cannot be sharded along the sequence",
        where=OPTION,
        got=got,
        expected=expected,
        next=WITHOUT,
    )
