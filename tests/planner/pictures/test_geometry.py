"""The parts of ranks have, in the picture, exactly the share of a weight's area that the plan's layout gives them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autotp_plan.planner.pictures.geometry import LONGEST, SHORTEST, Drawing, draw
from autotp_plan.planner.pictures.weight_svg import weight_svg
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, SubParameter, group_view
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Style
from tests.helpers.paths import PLANS
from tests.planner.pictures.areas import assert_drawn, drawn_areas

ALL_PLANS = sorted(PLANS.glob("*/tp*.json"))


@st.composite
def layouts(draw_: st.DrawFn) -> tuple[Layout, tuple[int, ...], int]:
    """A layout of one to three fused parts over 1 to 9 ranks, even or not, some units on several ranks; its shape."""
    tp_size = draw_(st.integers(1, 9))
    subs = []
    per_rank: list[list[iv.Interval]] = [[] for _ in range(tp_size)]
    offset = 0
    for _ in range(draw_(st.integers(1, 3))):
        unit, count = draw_(st.integers(1, 4)), draw_(st.integers(1, 12))
        subs.append(SubParameter(size=unit * count, unit=unit))
        for rank in range(tp_size):
            if count >= tp_size:
                first, last = iv.divide(count, tp_size)[rank]
            else:
                first = rank * count // tp_size
                last = first + 1
            per_rank[rank].append(iv.scale((first, last), unit, offset))
        offset += unit * count
    other = draw_(st.integers(1, 5))
    repeat = draw_(st.sampled_from([1, 1, 2, 3]))  # a view with a dimension before the sharded one
    down = draw_(st.booleans())
    view = [repeat, offset] if repeat > 1 else [offset]
    full = [repeat * offset]
    view, full = ([other, *view], [other, *full]) if down else ([*view, other], [*full, other])
    layout = Layout(
        shape=tuple(view),
        dim=view.index(offset, down + (repeat > 1)),
        sub_parameters=tuple(subs),
        intervals=tuple(map(tuple, per_rank)),
    )
    shape = tuple(full)
    assume(group_view(shape, layout.shape) is not None)  # of sizes of 1, some are no view that a plan may have
    return layout, shape, tp_size


@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from(["column", "row", "vocab", "shard"]))
def test_each_rank_has_its_share_of_the_area(given_: tuple[Layout, tuple[int, ...], int], style: Style) -> None:
    layout, shape, tp_size = given_
    drawing = draw(layout, shape, style, tp_size)
    assert drawing.is_complete
    assert SHORTEST <= drawing.width <= LONGEST and SHORTEST <= drawing.height <= LONGEST
    assert_drawn(weight_svg(drawing, "a weight"), layout, tp_size, drawing.across)


@pytest.mark.parametrize("path", ALL_PLANS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_plans_of_public_models(path: Path) -> None:
    plan = Plan.read(path)
    different = {(entry.layout, plan.shape_of(entry), entry.style): entry for entry in plan.parameters}
    for entry in different.values():
        layout = plan.layouts[entry.layout]
        drawing = draw(layout, plan.shape_of(entry), entry.style, plan.tp_size)
        assert_drawn(weight_svg(drawing, entry.name), layout, plan.tp_size, drawing.across)
        if len(plan.shape_of(entry)) == 2 and layout.dim is not None and entry.style in ("column", "row", "vocab"):
            assert drawing.across == (entry.style != "row"), "columns of column-parallel weights, rows of row-parallel"


def fused() -> tuple[Layout, Drawing]:
    plan = Plan.read(PLANS / "phi_3_mini" / "tp4.json")
    entry = next(entry for entry in plan.parameters if entry.name.endswith("qkv_proj.weight"))
    layout = plan.layouts[entry.layout]
    return layout, draw(layout, plan.shape_of(entry), entry.style, 4)


def test_a_piece_in_the_wrong_place_or_of_the_wrong_rank_is_caught() -> None:
    layout, drawing = fused()
    assert_drawn(weight_svg(drawing, ""), layout, 4, True)
    first, second, *rest = drawing.pieces
    others = (second, *rest)
    wrong = [
        dataclasses.replace(first, group=1),
        dataclasses.replace(first, stop=first.stop - 1),
        dataclasses.replace(first, stop=first.stop + 1),
        dataclasses.replace(first, start=first.start + drawing.length),
        dataclasses.replace(first, group=None),
        dataclasses.replace(first, bottom=1, lanes=2),
    ]
    exchanged = (dataclasses.replace(first, group=1), dataclasses.replace(second, group=0), *rest)
    for pieces in [exchanged, others, *((piece, *others) for piece in wrong)]:
        svg = weight_svg(dataclasses.replace(drawing, pieces=pieces), "")
        with pytest.raises(AssertionError):
            assert_drawn(svg, layout, 4, True)


def test_a_fused_weight_has_brackets_and_its_ranks_alternate() -> None:
    _, drawing = fused()
    assert [piece.group for piece in drawing.pieces] == [0, 1, 2, 3] * 3
    assert drawing.parts == (0, 3072, 6144, 9216)
    assert 'class="brackets"' in weight_svg(drawing, "")


def test_key_heads_on_several_ranks_have_a_lane_for_each() -> None:
    plan = Plan.read(PLANS / "qwen2_5_0_5b" / "tp2.json")
    layout = Layout(
        shape=(128, 896),
        dim=0,
        sub_parameters=(SubParameter(size=128, unit=64),),
        intervals=(((0, 64),), ((0, 64),), ((64, 128),), ((64, 128),)),
    )
    svg = weight_svg(draw(layout, (128, 896), "column", 4), "")
    assert {name: str(area) for name, area in drawn_areas(svg).items()} == {f"r{rank}": "1/4" for rank in range(4)}
    whole = next(one for one in plan.layouts.values() if one.dim is None)
    assert draw(whole, whole.shape, "replicated", 2).is_shared


def test_conv1d_of_gpt2_has_its_output_from_left_to_right() -> None:
    layout = Layout(
        shape=(768, 3072),
        dim=1,
        sub_parameters=(SubParameter(size=3072, unit=1),),
        intervals=(((0, 1536),), ((1536, 3072),)),
    )
    column = draw(layout, (768, 3072), "column", 2)
    assert column.across and column.width == 2 * column.height


def test_many_ranks_share_colours_and_many_pieces_are_counted() -> None:
    ranks = 1000
    layout = Layout(
        shape=(ranks * 3, 4),
        dim=0,
        sub_parameters=(SubParameter(size=ranks * 3, unit=3),),
        intervals=tuple(((rank * 3, rank * 3 + 3),) for rank in range(ranks)),
    )
    drawing = draw(layout, layout.shape, "column", ranks)
    assert len(drawing.pieces) == 64 and drawing.is_complete
    assert_drawn(weight_svg(drawing, ""), layout, ranks, True)
    alternating = Layout(
        shape=(4000, 2),
        dim=0,
        sub_parameters=(SubParameter(size=4000, unit=1),),
        intervals=tuple(tuple((at, at + 1) for at in range(rank, 4000, 2)) for rank in range(2)),
    )
    drawing = draw(alternating, alternating.shape, "column", 2)
    assert len(drawing.pieces) == 600 and not drawing.is_complete
