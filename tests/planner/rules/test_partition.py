"""From a rule and a shape to intervals: every rank's shard is what slicing by hand gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autotp_plan.planner.rules.partition import (
    IndivisibleError,
    PartitionError,
    Sharding,
    bias_layout,
    partition,
    replicated,
)
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import group_view


@pytest.mark.parametrize(
    ("shape", "sharding", "tp_size", "view", "intervals"),
    [
        ((8, 4), Sharding(dim=0), 2, (8, 4), [[(0, 4)], [(4, 8)]]),
        ((8, 4), Sharding(dim=1), 4, (8, 4), [[(0, 1)], [(1, 2)], [(2, 3)], [(3, 4)]]),
        ((8, 4), Sharding(dim=0), 1, (8, 4), [[(0, 8)]]),
        ((12, 4), Sharding(dim=0, shape=(3, -1)), 2, (12, 4), [[(0, 2), (4, 6), (8, 10)], [(2, 4), (6, 8), (10, 12)]]),
        ((12, 4), Sharding(dim=0, shape=(2, -1)), 2, (12, 4), [[(0, 3), (6, 9)], [(3, 6), (9, 12)]]),
        ((8, 4), Sharding(dim=0, shape=((4, 2, 2), -1)), 2, (8, 4),
         [[(0, 2), (4, 5), (6, 7)], [(2, 4), (5, 6), (7, 8)]]),
        ((24, 4), Sharding(dim=0, shape=((16, 4, 4), -1), unit=2), 2, (24, 4),
         [[(0, 8), (16, 18), (20, 22)], [(8, 16), (18, 20), (22, 24)]]),
        ((24, 4), Sharding(dim=0, shape=((16, 8), -1), unit=(8, 2)), 2, (24, 4),
         [[(0, 8), (16, 20)], [(8, 16), (20, 24)]]),
        ((4, 12), Sharding(dim=1, shape=(-1, 3)), 2, (4, 12), [[(0, 2), (4, 6), (8, 10)], [(2, 4), (6, 8), (10, 12)]]),
        ((24, 5), Sharding(dim=1, shape=(4, -1, 5)), 3, (4, 6, 5), [[(0, 2)], [(2, 4)], [(4, 6)]]),
        ((24, 5), Sharding(dim=0, shape=(4, -1, 5)), 2, (24, 5), None),
        ((4, 6, 5), Sharding(dim=1), 2, (4, 6, 5), [[(0, 3)], [(3, 6)]]),
        ((4, 6, 5), Sharding(dim=1, shape=(-1, (4, 2), -1)), 2, (4, 6, 5), [[(0, 2), (4, 5)], [(2, 4), (5, 6)]]),
        ((10,), Sharding(dim=0), 5, (10,), [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)], [(8, 10)]]),
        ((7, 2), Sharding(dim=0, indivisible="uneven"), 3, (7, 2), [[(0, 3)], [(3, 5)], [(5, 7)]]),
        ((14, 2), Sharding(dim=0, unit=2, indivisible="uneven"), 3, (14, 2), [[(0, 6)], [(6, 10)], [(10, 14)]]),
    ],
)  # fmt: skip
def test_intervals_of_a_partition(shape: Any, sharding: Sharding, tp_size: int, view: Any, intervals: Any) -> None:
    if intervals is None:  # at partition_dim a number counts equal sub-parameters
        with pytest.raises(PartitionError, match="does not fit the parameter"):
            partition(shape, sharding, tp_size)
        return
    layout = partition(shape, sharding, tp_size)
    assert (layout.shape, layout.dim) == (view, sharding.dim)
    assert [list(rank) for rank in layout.intervals] == intervals


@pytest.mark.parametrize(
    ("shape", "sharding", "tp_size", "message"),
    [
        ((8, 4), Sharding(dim=2), 2, "partition_dim is not a dimension: 2 of [-1, -1]; expected 0 to 1"),
        ((8, 4), Sharding(dim=0, shape=(-1, (2, 2))), 2, "sub-parameter sizes are not at partition_dim"),
        ((8, 4), Sharding(dim=0, shape=((4, 3), -1)), 1, "the rule's shape does not fit the parameter"),
        ((8, 4), Sharding(dim=0, shape=((-1, 3), -1)), 1, "a size is not positive"),
        ((8, 4), Sharding(dim=0, shape=(0, -1)), 1, "a size is not positive"),
        ((8, 4), Sharding(dim=1, shape=(-2, -1)), 1, "a size is not positive"),
        ((8, 4), Sharding(dim=0, shape=(3, -1)), 1, "the dimension is not equal sub-parameters: 8 in 3"),
        ((8, 4), Sharding(dim=1, shape=(16, -1)), 1, "the rule's shape does not fit the parameter"),
        ((8, 4), Sharding(dim=0, shape=(-1, -1, -1)), 1, "the rule's shape does not fit the parameter"),
        ((8, 4), Sharding(dim=0, shape=(-1,)), 1, "the rule's shape does not fit the parameter"),
        ((8, 4), Sharding(dim=0, unit=3), 1, "a sub-parameter is not whole units: 8 in units of 3"),
        ((8, 4), Sharding(dim=0, unit=0), 1, "a size is not positive"),
        ((8, 4), Sharding(dim=0, unit=(2, 2)), 1, "units and sub-parameters do not pair up"),
        ((8, 4), Sharding(dim=0), 3,
         "a weight cannot be split evenly over the ranks: 8 over 3 ranks; expected a tp_size that divides 8"),
        ((8, 4), Sharding(dim=0, unit=4), 8,
         "a weight cannot be split evenly over the ranks: 2 units of 4 over 8 ranks"),
        ((8, 4), Sharding(dim=0, unit=4, indivisible="uneven"), 3, "a weight has fewer units than there are ranks"),
        ((0, 4), Sharding(dim=0), 1, "a size is not positive"),
        ((8, 0), Sharding(dim=0, shape=(-1, -1)), 1, ""),
        ((), Sharding(dim=0), 1, "partition_dim is not a dimension"),
        ((8,), Sharding(dim=1), 1, "partition_dim is not a dimension"),
    ],
)  # fmt: skip
def test_partitions_that_do_not_fit_are_refused(shape: Any, sharding: Sharding, tp_size: int, message: str) -> None:
    if not message:
        assert partition(shape, sharding, tp_size).rank_shape(0) == shape
        return
    with pytest.raises(PartitionError) as caught:
        partition(shape, sharding, tp_size)
    assert message in str(caught.value)
    assert isinstance(caught.value, IndivisibleError) == ("ranks" in message or "over" in message)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([0, 1]),
)
def test_shards_hold_every_index_once_and_no_unit_is_divided(
    subs: list[tuple[int, int]], tp_size: int, other: int, dim: int
) -> None:
    """Uneven shares of any sub-parameters and units: the shards hold everything, once, in order, between units."""
    assume(all(count >= tp_size for count, _ in subs))
    sizes = tuple(count * unit for count, unit in subs)
    total = sum(sizes)
    shape = (total, other) if dim == 0 else (other, total)
    logical: tuple[Any, Any] = (sizes, -1) if dim == 0 else (-1, sizes)
    sharding = Sharding(dim=dim, shape=logical, unit=tuple(unit for _, unit in subs), indivisible="uneven")
    layout = partition(shape, sharding, tp_size)
    assert iv.faults(layout.intervals, total) == []
    assert sum(math.prod(layout.rank_shape(rank)) for rank in range(tp_size)) == total * other, "nothing is held twice"
    start = 0
    for count, unit in subs:
        inside = [
            [index for first, last in rank for index in range(first, last) if start <= index < start + count * unit]
            for rank in layout.intervals
        ]
        assert [index for rank in inside for index in rank] == list(range(start, start + count * unit))
        assert all(len(rank) % unit == 0 for rank in inside)
        assert len(inside[0]) - len(inside[-1]) in (0, unit)
        start += count * unit


def test_biases_follow_the_output_of_their_weight() -> None:
    fused = partition((12, 4), Sharding(dim=0, shape=(3, -1)), 2)
    bias = bias_layout((12, 4), fused)
    assert (bias.shape, bias.dim, bias.intervals) == ((12,), 0, fused.intervals)
    experts = partition((24, 5), Sharding(dim=1, shape=(4, -1, 5)), 3)
    bias = bias_layout((24, 5), experts)
    assert (bias.shape, bias.dim, bias.intervals) == ((4, 6), 1, experts.intervals)
    assert group_view((24,), bias.shape) == [range(2)]


def test_the_bias_of_a_transposed_weight_is_sharded_along_its_only_dim() -> None:
    """GPT-2 keeps its weights as (input, output): column-parallel is dimension 1, the bias's of dimension 0."""
    bias = bias_layout((4, 12), partition((4, 12), Sharding(dim=1, shape=(-1, 3)), 2))
    assert (bias.shape, bias.dim) == ((12,), 0)
    assert bias.intervals == (((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12)))


def test_a_whole_layout_has_no_dim() -> None:
    assert replicated([3, 4]).dim is None
    assert replicated([]).rank_shape(3) == ()


def test_kv_heads_are_replicated_when_there_are_more_ranks() -> None:
    """KV heads: rank r of tp_size holds head r * heads // tp_size when there are more ranks than heads."""
    sharding = Sharding(dim=0, unit=4, indivisible="replicate")
    assert partition((8, 2), sharding, 4).intervals == (((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),))
    assert partition((4, 2), sharding, 3).intervals == (((0, 4),),) * 3
    assert partition((16, 2), sharding, 2).intervals == (((0, 8),), ((8, 16),)), "as without it when there are enough"
    with pytest.raises(IndivisibleError, match="divides 2 or is a multiple of it"):
        partition((8, 2), sharding, 3)
