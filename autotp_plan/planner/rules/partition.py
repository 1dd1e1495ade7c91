"""From one resolved rule and one shape to a layout: sub-parameters, units, intervals.

Pure integers. It does not know names, patterns or symbols; a rule that cannot be applied raises PartitionError, and the
caller says where.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, SubParameter, group_view
from autotp_plan.schemas.spec import Indivisible

MAX_SUB_PARAMETERS = 4096
"""Of one dimension: more are no fused weight, and each takes time at every TP size that is tried."""


class PartitionError(ValueError):
    """A rule does not fit a shape or a tp_size. `code` and the texts are those of the fault that the caller makes."""

    def __init__(self, code: str, what: str, got: str, expected: str) -> None:
        super().__init__(f"{what}: {got}; expected {expected}")
        self.code, self.what, self.got, self.expected = code, what, got, expected


class IndivisibleError(PartitionError):
    """tp_size does not divide the units of `sub`, the sub-parameter at `position`, or there are too few of them."""

    def __init__(self, sub: SubParameter, position: int, tp_size: int, indivisible: Indivisible) -> None:
        self.sub, self.position = sub, position
        units = f"{sub.num_units} units of {sub.unit}" if sub.unit > 1 else f"{sub.size}"
        expected = {
            "error": f"a tp_size that divides {sub.num_units}",
            "uneven": f"a tp_size of at most {sub.num_units}",
            "replicate": f"a tp_size that divides {sub.num_units} or is a multiple of it",
        }
        few = indivisible == "uneven"
        super().__init__(
            "fewer-units-than-ranks" if few else "indivisible",
            "a weight has fewer units than there are ranks"
            if few
            else "a weight cannot be split evenly over the ranks",
            f"{units} over {tp_size} ranks",
            expected[indivisible],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """A rule with every size an integer. `shape` is the rule's logical shape, with -1 for what is to be inferred.

    `uneven` allows shares of unequal size wherever there are enough units, whatever `indivisible` says.
    """

    dim: int
    shape: tuple[int | tuple[int, ...], ...] | None = None
    unit: int | tuple[int, ...] = 1
    indivisible: Indivisible | tuple[Indivisible, ...] = "error"
    uneven: bool = False


def replicated(shape: Sequence[int]) -> Layout:
    """The layout of a tensor that is replicated on every rank."""
    return Layout(shape=tuple(shape))


def partition(shape: Sequence[int], sharding: Sharding, tp_size: int) -> Layout:
    """The layout of a tensor.

    Args:
        shape: the tensor's own shape; the rule's may be a logical view of it, of the same elements in row-major order.
        sharding: the rule.
        tp_size: number of ranks.

    Returns:
        a layout of which every rank holds at least one unit of each sub-parameter.

    Raises:
        IndivisibleError: tp_size does not divide the units, or there are too few of them.
        PartitionError: the rule does not fit the shape.
    """
    view, sizes = _view(tuple(shape), sharding)
    units = sharding.unit if isinstance(sharding.unit, tuple) else (sharding.unit,) * len(sizes)
    indivisibles = (
        sharding.indivisible if isinstance(sharding.indivisible, tuple) else (sharding.indivisible,) * len(sizes)
    )
    if not len(units) == len(sizes) == len(indivisibles):
        got = f"{len(units)} units, {len(indivisibles)} of indivisible"
        raise PartitionError("units-do-not-pair", "units and sub-parameters do not pair up", got, f"{len(sizes)}")
    subs = [_sub_parameter(size, unit) for size, unit in zip(sizes, units)]
    per_rank: list[list[iv.Interval]] = [[] for _ in range(tp_size)]
    start = 0
    for position, (sub, indivisible) in enumerate(zip(subs, indivisibles)):
        if not _fits(sub.num_units, indivisible, sharding.uneven, tp_size):
            raise IndivisibleError(sub, position, tp_size, indivisible)
        for rank, units_of_rank in enumerate(_units_of_ranks(sub, tp_size)):
            per_rank[rank].append(iv.scale(units_of_rank, sub.unit, start))
        start += sub.size
    intervals = tuple(iv.join_touching(rank) for rank in per_rank)
    return Layout(shape=view, dim=sharding.dim, sub_parameters=tuple(subs), intervals=intervals)


def bias_layout(weight_shape: Sequence[int], weight: Layout) -> Layout:
    """The layout of the bias of a column-parallel weight: sharded as the weight's output features are.

    Args:
        weight_shape: the weight's own shape; its output features are the dimension that is sharded.
        weight: the weight's layout, in which that dimension may be several of a view.

    Returns:
        a layout of the output features alone.
    """
    assert weight.dim is not None
    groups = group_view(weight_shape, weight.shape)
    assert groups is not None, "a layout's shape is a view of its parameter's"
    group = next(group for group in groups if weight.dim in group)
    return Layout(
        shape=tuple(weight.shape[dim] for dim in group),
        dim=weight.dim - group.start,
        sub_parameters=weight.sub_parameters,
        intervals=weight.intervals,
    )


def tp_size_fits(shape: Sequence[int], sharding: Sharding, tp_size: int) -> bool:
    """Whether `sharding` allows to shard a tensor of `shape` over `tp_size` ranks.

    Raises:
        PartitionError: the rule does not fit the shape, whatever the tp_size.
    """
    return all(
        _fits(num_units, indivisible, sharding.uneven, tp_size)
        for num_units, indivisible in _kinds(tuple(shape), sharding)
    )


@functools.lru_cache(maxsize=1024)
def _kinds(shape: tuple[int, ...], sharding: Sharding) -> frozenset[tuple[int, Indivisible]]:
    """How many units the sub-parameters have, with what happens where these do not divide."""
    subs = partition(shape, sharding, 1).sub_parameters
    indivisibles = (
        sharding.indivisible if isinstance(sharding.indivisible, tuple) else (sharding.indivisible,) * len(subs)
    )
    return frozenset((sub.num_units, indivisible) for sub, indivisible in zip(subs, indivisibles))


def _fits(num_units: int, indivisible: Indivisible, uneven: bool, tp_size: int) -> bool:
    if indivisible == "uneven" or (uneven and tp_size <= num_units):
        return tp_size <= num_units
    return num_units % tp_size == 0 or (indivisible == "replicate" and tp_size % num_units == 0)


def _units_of_ranks(sub: SubParameter, tp_size: int) -> list[iv.Interval]:
    """The interval of units of each rank. Of replicated units, rank r holds number r * units // tp_size."""
    if sub.num_units < tp_size:
        return [(rank * sub.num_units // tp_size, rank * sub.num_units // tp_size + 1) for rank in range(tp_size)]
    return iv.divide(sub.num_units, tp_size)


def _sub_parameter(size: int, unit: int) -> SubParameter:
    if size < 1 or unit < 1:
        raise PartitionError(
            "size-not-positive", "a size is not positive", f"size {size}, unit {unit}", "positive integers"
        )
    if size % unit:
        raise PartitionError(
            "broken-unit", "a sub-parameter is not whole units", f"{size} in units of {unit}", f"a multiple of {unit}"
        )
    return SubParameter(size=size, unit=unit)


def _view(shape: tuple[int, ...], sharding: Sharding) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The logical shape, and the sizes of the sub-parameters along the sharded dimension."""
    logical = sharding.shape if sharding.shape is not None else (-1,) * len(shape)
    if sharding.dim >= len(logical):
        raise PartitionError(
            "partition-dim",
            "partition_dim is not a dimension",
            f"{sharding.dim} of {list(logical)}",
            f"0 to {len(logical) - 1}",
        )
    at_dim = logical[sharding.dim]
    if any(isinstance(size, tuple) for dim, size in enumerate(logical) if dim != sharding.dim):
        raise PartitionError(
            "sizes-not-at-partition-dim",
            "sub-parameter sizes are not at partition_dim",
            f"{list(logical)}",
            f"them at {sharding.dim}",
        )
    known = [
        sum(size) if isinstance(size, tuple) else -1 if dim == sharding.dim else size
        for dim, size in enumerate(logical)
    ]
    if any(size < 1 and size != -1 for size in [*known, at_dim] if isinstance(size, int)) or (
        isinstance(at_dim, tuple) and min(at_dim) < 1
    ):
        raise PartitionError("size-not-positive", "a size is not positive", f"{list(logical)}", "positive sizes or -1")
    view = _infer(shape, known)
    if view is None or group_view(shape, view) is None:
        raise PartitionError(
            "shape-does-not-fit",
            "the rule's shape does not fit the parameter",
            f"{_text(logical)} for {_text(shape)}",
            "a logical shape of the same elements, row-major",
        )
    size = view[sharding.dim]
    count = len(at_dim) if isinstance(at_dim, tuple) else at_dim
    if count > MAX_SUB_PARAMETERS:
        raise PartitionError(
            "too-many-sub-parameters",
            "a dimension has too many sub-parameters",
            str(count),
            f"at most {MAX_SUB_PARAMETERS}",
        )
    if isinstance(at_dim, tuple):
        return view, at_dim
    if at_dim == -1:
        return view, (size,)
    if size % at_dim:
        raise PartitionError(
            "unequal-sub-parameters",
            "the dimension is not equal sub-parameters",
            f"{size} in {at_dim}",
            f"a multiple of {at_dim}",
        )
    return view, (size // at_dim,) * at_dim


def _infer(shape: tuple[int, ...], known: list[int]) -> tuple[int, ...] | None:
    """Fill in the -1s: one from the number of elements, several from the same dimension of `shape`."""
    unknown = [dim for dim, size in enumerate(known) if size == -1]
    filled = list(known)
    if len(unknown) == 1:
        rest = math.prod(size for size in known if size != -1)
        if rest == 0 or math.prod(shape) % rest:
            return None
        filled[unknown[0]] = math.prod(shape) // rest
    elif unknown:
        if len(known) != len(shape):
            return None
        for dim in unknown:
            filled[dim] = shape[dim]
    return tuple(filled) if math.prod(filled) == math.prod(shape) else None


def _text(shape: Sequence[int | tuple[int, ...]]) -> str:
    return str([list(size) if isinstance(size, tuple) else size for size in shape])
