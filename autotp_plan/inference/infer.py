"""`infer_spec`: a spec file for a model that nobody described."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.huggingface import scale_config
from autotp_plan.huggingface.disk_names import unsupported
from autotp_plan.inference.regions import influence
from autotp_plan.inference.regions.experts import expert_regions
from autotp_plan.inference.regions.influence import Watch
from autotp_plan.inference.regions.layers import Layer, Region, inner_norms, lay_out, layers_of, place, regions_of
from autotp_plan.inference.regions.surroundings import add_surroundings, buffers_like_parameters
from autotp_plan.inference.regions.trial import find_attributes, in_blocks
from autotp_plan.inference.small.own_architecture import OwnArchitecture
from autotp_plan.inference.small.small_model import Architecture, SmallModel
from autotp_plan.inference.spec.spec_text import SpecText
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.names import starred
from autotp_plan.schemas.spec import SpecFile
from autotp_plan.schemas.templates import Templates


def infer_spec(folder: Path, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """A spec file for the model in `folder`, inferred from small models of its architecture.

    Args:
        folder: with a config.json that transformers knows.
        progress: called with a sentence before each part.

    Returns:
        The JSON of a spec file. It is not proven: compile a plan with it, and prove that.

    Raises:
        CheckpointError: transformers cannot build the model.
        CompileError: no small model runs, nothing can be sharded, or the checkpoint's tensors become parameters in a
            way that byte ranges cannot express.
    """
    return infer_architecture(Architecture.read(folder), str(folder), progress)


def infer_architecture(
    architecture: Architecture | OwnArchitecture, where: str, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """As `infer_spec`, for an architecture that was read; `where` is what faults point to."""
    names = architecture.disk_names()
    if names.odd:
        raise CompileError(unsupported(names.odd, where))
    pairs = architecture.pairs()
    texts: list[SpecText] = []
    while True:
        try:
            first, second = next(pairs)
        except (ValueError, StopIteration) as error:
            if not texts:
                pair = architecture.config.get("is_encoder_decoder")
                got = "an encoder-decoder, whose decoder reads a second sequence" if pair else str(error)
                raise CompileError(_not_run(got, where)) from None
            break
        texts.append(_text(architecture, first, second, progress))
        if not first.tentative or (texts[-1].rules and not texts[-1].notes):
            break
    text = min(texts, key=lambda one: (not one.rules, len(one.notes)))
    if not text.rules:
        raise CompileError(_nothing(text.notes, where))
    return text.document(names.renamed, names.assembled, names.transposed)


def _text(
    architecture: Architecture | OwnArchitecture,
    first: SmallModel,
    second: SmallModel,
    progress: Callable[[str], None],
) -> SpecText:
    """The rules that two small models of an architecture give."""
    progress("asking two small models what depends on what")
    found = regions(first)
    text = SpecText(architecture, (first, second))
    others = {_key(region, text.numbers.template): region for region in regions(second)}
    tried: dict[tuple[str, str], Region | None] = {}
    for region in found:
        key = _key(region, text.numbers.template)
        if key in tried or key not in others:
            continue
        progress(f"trying {key[0]} in pieces")
        tried[key] = right = _tried(first, region, second, others[key])
        if right is None:
            text.notes.append(f"{key[1]} stays whole: {region.reasons[-1]}")
            continue
        other = others[key]
        if right.grouped and not other.grouped:
            lay_out(other, grouped=True)
        if right.num_blocks > 1 and right.experts:
            number = _experts(second, right.num_blocks, first)
            if number is None:
                text.notes.append(f"{key[1]} stays whole: it holds {right.num_blocks} blocks, which no key counts")
                continue
            other = in_blocks(other, number)
        text.add((right, other))
    return text


def infer_module_spec(factory: ModuleFactory, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """As `infer_spec`, for the model that a function makes; sizes are expressions of the function's arguments.

    Args:
        factory: the function, with the arguments of the model.
        progress: called with a sentence before each part.

    Raises:
        OptionError: the function cannot be called.
        CompileError: as `infer_spec`.
        MismatchError: there is nothing to run the model on, or what it computes cannot be compared.
    """
    return infer_architecture(OwnArchitecture.read(factory), f"--module {factory.name}", progress)


def infer_rules(model: Path | ModuleFactory) -> SpecFile:
    """As `infer_spec` or `infer_module_spec`, read as rules: for `compile_plan(folder, infer=infer_rules, ...)`.

    Args:
        model: a folder with a config.json that transformers knows, or a function that makes the model.

    Raises:
        CheckpointError, CompileError: as `infer_spec`.
        OptionError, MismatchError: as `infer_module_spec`.
    """
    spec = infer_module_spec(model) if isinstance(model, ModuleFactory) else infer_spec(model)
    return SpecFile.from_dict(spec)


def regions(small: SmallModel) -> list[Region]:
    """Every region of a small model."""
    model = small.model
    layers = list(one_of_each_kind(layers_of(model), small.config))
    norms = inner_norms(model, layers)
    seen = influence.watch(model, small.run, norms=norms)
    direct = influence.watch(model, small.run, norms=norms, apart=True)
    by_layer: dict[str, list[Region]] = {}
    for layer in layers:
        layer.linears = [name for name in layer.linears if name in seen.outputs]  # of others only the weight is read
        known = {
            place(model, region.consumer, other.prefix): region
            for other in layers
            for region in by_layer.get(other.prefix, ())
            if _module_parameters(region, other, other) == _module_parameters(region, other, layer)
        }
        by_layer[layer.prefix] = [
            *regions_of(model, layer, seen, known, direct),
            *expert_regions(model, layer, seen, [*known]),
        ]
    for layer in layers:
        by_layer[layer.prefix] = [r for r in by_layer[layer.prefix] if not _missing(r, layer, by_layer, layers)]
    modules = {region.module for found in by_layer.values() for region in found if not region.experts}
    leaves = {name: [*seen.calls[name].arguments] for name in modules if name in seen.calls}
    apart = influence.watch(model, small.run, norms=norms, apart=True, leaves=leaves)
    for layer in layers:
        add_surroundings(model, layer, by_layer[layer.prefix], apart, seen, norms)
    return [region for found in by_layer.values() for region in found]


def _module_parameters(region: Region, of: Layer, in_layer: Layer) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a region's module, or of the module in its place in another layer."""
    module = f"{in_layer.prefix}{region.module.removeprefix(of.prefix)}."
    found = {name: tuple(p.shape) for name, p in in_layer.parameters.items() if name.startswith(module)}
    return {name.removeprefix(module): shape for name, shape in found.items()}


def _missing(region: Region, of: Layer, by_layer: Mapping[str, list[Region]], layers: Iterable[Layer]) -> bool:
    """Whether a layer whose module has other parameters has the consumer of a region, and no such region."""
    here, consumer = _module_parameters(region, of, of), region.consumer.removeprefix(of.prefix)
    others = [layer for layer in layers if f"{layer.prefix}{consumer}" in layer.parameters]
    others = [layer for layer in others if _module_parameters(region, of, layer).keys() != here.keys()]
    return not all(
        any(one.consumer == f"{layer.prefix}{consumer}" for one in by_layer[layer.prefix]) for layer in others
    )


def one_of_each_kind(layers: Iterable[Layer], config: Mapping[str, Any]) -> Iterator[Layer]:
    """The first of each kind of layers: with other parameters, or of which the config's lists say something else."""
    done: set[Any] = set()
    for layer in layers:
        shapes = {(name.removeprefix(layer.prefix), tuple(p.shape)) for name, p in layer.parameters.items()}
        number = layer.prefix.rpartition(".")[2]
        depth = scale_config.num_layers(config) or 0
        said = scale_config.per_layer(config, int(number)) if int(number) < depth else ()
        kind = (starred(layer.prefix), frozenset(shapes), said)
        if kind not in done:
            done.add(kind)
            yield layer


def _tried(small: SmallModel, region: Region, second: SmallModel, other: Region) -> Region | None:
    """The region with the attributes that make it right in pieces; None where nothing does."""
    linears = {*region.columns, *(weight.rpartition(".")[0] for weight in (region.consumer, *region.inner))}
    region.reasons += [
        f"without gradients {name} is passed by, and its weight read" for name in sorted(linears & small.bypassed())
    ]
    if region.reasons:
        return None
    norms = region.means
    seen = influence.watch(small.model, small.run, norms=norms)
    found, buffers = None, buffers_like_parameters(small.model, region)
    for means, sharded in itertools.product(([], norms) if norms else ([],), ({}, buffers) if buffers else ({},)):
        region.means, region.buffers = means, sharded  # a norm of each group of heads takes its means on one rank
        found = _right(small, region, seen, second, other)
        if found is not None:
            break
    if found is None:
        return None
    found.reasons.clear()
    return found


def _right(small: SmallModel, region: Region, seen: Watch, second: SmallModel, other: Region) -> Region | None:
    """As `_tried`, with the region's means as they are."""
    model, watches = small.model, [(small.model, seen)]
    coarse, fine = len(region.units.coarse), len(region.units.fine)
    sizes = [2]
    if coarse < fine and not region.grouped and fine % (2 * coarse) == 0:
        sizes.append(2 * coarse)
    same = second.model, other
    found = find_attributes(model, region, watches, sizes, same)
    if found is None and coarse < fine and not region.grouped:
        region, other = copy.copy(region), copy.copy(other)
        lay_out(region, grouped=True)
        lay_out(other, grouped=True)
        found = find_attributes(model, region, watches, [2], (second.model, other))
    if found is None and region.experts:
        for key, number in small.numbers.items():
            if "expert" in key and 1 < number < fine and fine % number == 0:
                divided = in_blocks(region, number)
                found = find_attributes(model, divided, watches, [2])
                if found is not None:
                    region = divided
                    break
    return None if found is None else replace(region, attributes=found)


def _experts(second: SmallModel, number: int, first: SmallModel) -> int | None:
    """The number in the second model of the key that is `number` in the first; None where there is no such key."""
    key = next((key for key, value in first.numbers.items() if "expert" in key and value == number), None)
    return None if key is None else second.numbers[key]


def _key(region: Region, template: Templates) -> tuple[str, str]:
    return template(region.module), template(region.consumer)


def _not_run(got: str, where: str) -> Fault:
    return Fault(
        code="no-small-model",
        what="no small model of this architecture could be run, so nothing can be inferred",
        where=where,
        got=got,
        expected="a causal language model that runs on token ids alone",
        next="write a spec file and give it with --spec",
    )


def _nothing(notes: list[str], where: str) -> Fault:
    return Fault(
        code="nothing-inferred",
        what="no weights were found that can be sharded",
        where=where,
        got="; ".join(notes) or "no layer whose inputs depend on parts of another's outputs",
        expected="layers in which a matrix multiplies what other matrices made, feature by feature",
        next="write a spec file and give it with --spec",
    )
