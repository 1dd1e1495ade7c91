"""Trying a region in pieces: the module with a rank's share of its weights, and the attributes that change with it.

No rank is started: a module is copied for each rank and run on what the whole one was given. What it hands to the
consumer must be the rank's share of what the whole module handed to it.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.inference.regions.influence import Smooth, Watch, constant_means, first_tensor
from autotp_plan.inference.regions.layers import Region, Split
from autotp_plan.inference.regions.shares import Count, Share, counts
from autotp_plan.inference.regions.units import divided

TOLERANCE = 1e-9
MOST_TRIALS = 120
MOST_SECONDS = 15.0
_SIZES = ("in_features", "out_features", "nf", "nx", "training", "num_embeddings", "embedding_dim")
"""Attributes of layers, which are replaced by parallel ones."""


def find_attributes(
    model: nn.Module,
    region: Region,
    watches: Sequence[tuple[nn.Module, Watch]],
    tp_sizes: Sequence[int],
    other: tuple[nn.Module, Region] | None = None,
) -> dict[str, str] | None:
    """The attributes of the region's module that hold counts, with what they count.

    Args:
        model: the small model.
        region: what is tried.
        watches: models with the same weights, and the forward pass of each.
        tp_sizes: numbers of ranks to try.
        other: a model of other sizes and the same region of it: an attribute counts there what it counts here.

    Returns:
        None where no choice of attributes makes it right; then `region.reasons` says why.
    """
    module = model.get_submodule(region.module)
    chosen: dict[str, str] = {}
    deadline = time.thread_time() + MOST_SECONDS
    for tp_size in tp_sizes:
        share = Share(tp_size=tp_size, rank=0, blocks=region.num_blocks)
        found: dict[tuple[str, int], str] = {}  # meanings that are the same on a rank are one
        for attribute, value in _integers(module):
            for count in counts(region, share):
                changes = value == count.value and (count.local != count.value or attribute in chosen)
                if changes and (other is None or _counts_the_same(attribute, count, *other, tp_size)):
                    found.setdefault((attribute, count.local), count.meaning)
        options = [(attribute, meaning) for (attribute, _), meaning in found.items()]
        search = _Search(region, watches, tp_size, deadline)
        right = search.smallest(options, chosen)
        if right is None:
            region.reasons.append(search.reason or f"no answer within {MOST_SECONDS:.0f} s")
            return None
        if any(len(model.get_parameter(parameter).shape) == 3 for parameter in region.splits) and not region.experts:
            right = search.largest(options, right)
        chosen = right
    return chosen


def _counts_the_same(attribute: str, count: Count, model: nn.Module, region: Region, tp_size: int) -> bool:
    """Whether an attribute has the value of what `count` counts in a model of other sizes too."""
    share = Share(tp_size=tp_size, rank=0, blocks=region.num_blocks)
    values = dict(_integers(model.get_submodule(region.module)))
    found = {one.meaning: one.value for one in counts(region, share)}
    return count.meaning not in found or values.get(attribute) == found[count.meaning]


class _Search:
    """Tries choices of attributes until the time is over."""

    def __init__(
        self, region: Region, watches: Sequence[tuple[nn.Module, Watch]], tp_size: int, deadline: float
    ) -> None:
        self.region, self.watches, self.tp_size, self.deadline = region, watches, tp_size, deadline
        self.reason = ""

    def smallest(self, options: Sequence[tuple[str, str]], chosen: Mapping[str, str]) -> dict[str, str] | None:
        """The fewest attributes in addition to `chosen` that make the region right."""
        free = [(attribute, meaning) for attribute, meaning in options if attribute not in chosen]
        meant = {meaning for attribute, meaning in free if not attribute.startswith(_CONFIG)}
        held = [one for one in free if not one[0].startswith(_CONFIG) or one[1] not in meant]
        for some in (held, free) if len(held) < len(free) else (free,):
            for more in itertools.islice(_choices(some), MOST_TRIALS):
                if self._is_right({**chosen, **dict(more)}, more):
                    return self._without_what_is_not_needed(chosen, more)
        return None

    def largest(self, options: Sequence[tuple[str, str]], right: Mapping[str, str]) -> dict[str, str]:
        """The attributes, and all others that may change too: what a pass with a cache reads, say."""
        found = dict(right)
        for attribute, meaning in options:
            if attribute.startswith(_CONFIG) or ":" in attribute:
                continue
            if attribute not in found and self._is_right({**found, attribute: meaning}, ()):
                found[attribute] = meaning
        return found

    def _without_what_is_not_needed(self, chosen: Mapping[str, str], more: Sequence[tuple[str, str]]) -> dict[str, str]:
        needed = list(more)
        for one in more:
            fewer = [other for other in needed if other != one]
            if self._is_right({**chosen, **dict(fewer)}, fewer):
                needed = fewer
        return {**chosen, **dict(needed)}

    def _is_right(self, attributes: Mapping[str, str], more: Sequence[tuple[str, str]]) -> bool:
        if len({attribute for attribute, _ in more}) < len(more) or time.thread_time() > self.deadline:
            return False
        problem = _problem(self.region, self.watches, attributes, self.tp_size)
        if problem is not None:
            self.reason = self.reason or problem
        return problem is None


_CONFIG = "config."
"""How the attributes of a module's config begin, which all modules share: the last to be changed."""


def _choices(options: Sequence[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], ...]]:
    """Choices of attributes, each with one meaning: none, each one, all of them, and then some."""
    meanings: dict[str, list[tuple[str, str]]] = {}
    for attribute, meaning in options:
        meanings.setdefault(attribute, []).append((attribute, meaning))
    yield ()
    yield from itertools.combinations(options, 1)
    yield from itertools.islice(itertools.product(*meanings.values()), MOST_TRIALS // 4)
    for size in range(2, len(options)):
        yield from itertools.combinations(options, size)


def _problem(
    region: Region, watches: Sequence[tuple[nn.Module, Watch]], attributes: Mapping[str, str], tp_size: int
) -> str | None:
    """What is wrong; None where nothing is."""
    for model, seen in watches:
        try:
            worst = max(_errors(model, region, seen, attributes, tp_size))
        except Exception as error:  # whatever a module raises when its numbers do not go together
            return f"{type(error).__name__}: {error}"
        if not worst <= TOLERANCE:
            return f"a rank's part differs by {worst:.1e}"
    return None


def _errors(
    model: nn.Module, region: Region, seen: Watch, attributes: Mapping[str, str], tp_size: int
) -> Iterator[float]:
    total: Any = 0
    for rank in range(tp_size):
        share = Share(tp_size=tp_size, rank=rank, blocks=region.num_blocks)
        local = copy.deepcopy(model.get_submodule(region.module))
        _cut(local, region, share)
        for attribute, meaning in attributes.items():
            value = next(one.local for one in counts(region, share) if one.meaning == meaning)
            set_attribute(local, attribute, value)
        given, output = _run(model, local, region, seen, share)
        if region.experts:
            total = total + output
            continue
        for weight in (region.consumer, *region.inner):
            name = weight.rpartition(".")[0]
            whole = seen.inputs[name].detach()
            yield _error(whole[..., share.indices(region.splits[weight], region.units)], given.get(name))
    if region.experts:
        dense = first_tensor(seen.calls[region.module].output)
        assert dense is not None
        yield _error(dense.detach(), total)


def _error(expected: Tensor, found: Tensor | None) -> float:
    if found is None or expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / max(1.0, float(expected.abs().max())))


def _cut(module: nn.Module, region: Region, share: Share) -> None:
    """Give a module a rank's share of its parameters."""
    prefix = f"{region.module}."
    for parameter, split in region.splits.items():
        owner, _, leaf = parameter.removeprefix(prefix).rpartition(".")
        inside: Any = module.get_submodule(owner)
        held = torch.tensor(share.indices(split, region.units))
        whole = getattr(inside, leaf)
        setattr(inside, leaf, nn.Parameter(whole.detach().index_select(split.dim, held)))
        if (
            leaf == "weight"
            and parameter.rpartition(".")[0] in region.columns
            and getattr(inside, "bias", None) is not None
        ):
            inside.bias = nn.Parameter(inside.bias.detach().index_select(0, held))
        if hasattr(inside, "nf") and parameter not in (region.consumer, *region.inner):
            inside.nf = len(held)
    for buffer, parameter in region.buffers.items():
        held = torch.tensor(share.indices(region.splits[f"{prefix}{parameter}"], region.units))
        setattr(module, buffer, getattr(module, buffer).index_select(-1, held))
    for parameter in region.added_once:
        owner, _, leaf = parameter.removeprefix(prefix).rpartition(".")
        if share.rank:
            getattr(module.get_submodule(owner), leaf).data.zero_()


def _run(
    model: nn.Module, module: nn.Module, region: Region, seen: Watch, share: Share
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a rank's `module` gives to the consumer and to those like it inside, by their names, and its output."""
    call = seen.calls[region.module]
    bound = copy.copy(call.bound)
    bound.arguments = {name: _detached(value) for name, value in call.arguments.items()}
    for name, (dim, parts) in region.split_inputs.items():
        value = bound.arguments.get(name)
        if isinstance(value, Tensor) and value.shape[dim] > 1:
            held = share.indices(Split(dim=dim, segments=parts), region.units)
            bound.arguments[name] = value.index_select(dim, torch.tensor(held))
    got: dict[str, Tensor] = {}
    prefix = f"{region.module}."
    with ExitStack() as stack, torch.no_grad():
        if not region.experts:
            for weight in (region.consumer, *region.inner):
                name = weight.rpartition(".")[0]
                linear = module.get_submodule(name.removeprefix(prefix))
                stack.callback(linear.register_forward_pre_hook(_keep(got, name)).remove)
                if weight in region.inner:  # the sum over the ranks
                    total = model.get_submodule(name)(seen.inputs[name].detach())
                    stack.callback(linear.register_forward_hook(_instead(total)).remove)
        for norm in region.means:
            inside = module.get_submodule(norm.removeprefix(prefix))
            stack.enter_context(constant_means(inside, [], iter(seen.means[norm])))
        stack.enter_context(Smooth())
        output = module(*bound.args, **bound.kwargs)
    return got, first_tensor(output)


def _keep(got: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        got.setdefault(name, args[0])

    return keep


def _instead(output: Tensor) -> Callable[..., Tensor]:
    return lambda *_: output


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(item) for item in value)
    return value


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The integers that a module and those inside it hold (`inside:attribute`), and those of its config."""
    for inside, submodule in module.named_modules():
        for name, value in vars(submodule).items():
            if type(value) is int and not name.startswith("_") and name not in _SIZES:
                yield (f"{inside}:{name}" if inside else name), value
    config = getattr(module, "config", None)
    for name, value in vars(config).items() if config is not None else ():
        if type(value) is int and not name.startswith("_"):
            yield f"config.{name}", value


def set_attribute(module: nn.Module, path: str, value: int) -> None:
    """Set an attribute of a module; of one of its config, a copy of the config is given to it first."""
    inside, _, path = path.rpartition(":")
    target: Any = module.get_submodule(inside)
    *before, leaf = path.split(".")
    for step in before:
        setattr(target, step, copy.copy(getattr(target, step)))
        target = getattr(target, step)
    setattr(target, leaf, value)


def in_blocks(region: Region, number: int) -> Region:
    """The region with each segment of all units divided into `number` blocks."""
    count = len(region.units.coarse) // number
    splits = {
        parameter: Split(dim=split.dim, segments=tuple(p for s in split.segments for p in divided(s, count)))
        for parameter, split in region.splits.items()
    }
    return replace(region, splits=splits, num_blocks=number)
