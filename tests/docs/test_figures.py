"""The pictures in the repository are what the script draws, from the plans and the layout code of today."""

from __future__ import annotations

import pytest

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.plan.document import Plan
from scripts.figures import FIGURES, IMAGES, PLAN, SCREENSHOTS, WEIGHT, contents, reads, sub_parameters


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_the_picture_is_up_to_date(name: str) -> None:
    drawn = FIGURES[name]()
    assert (IMAGES / name).read_text(encoding="utf-8") == drawn, "run `python -m scripts.figures`"


def test_every_picture_has_a_script() -> None:
    assert {path.name for path in IMAGES.iterdir()} == {*FIGURES, *SCREENSHOTS}


def test_what_the_picture_says_of_the_two_ways_to_split() -> None:
    plan = Plan.read(PLAN)
    layout = plan.layouts[next(entry.layout for entry in plan.parameters if entry.name == WEIGHT)]
    subs = sub_parameters(layout)
    sizes = [2560, 640, 640]
    planned = [[segment.sub for part in reads(held, subs, sizes) for segment in part] for held in layout.intervals]
    chunked = [[segment.sub for part in reads([held], subs, sizes) for segment in part] for held in iv.divide(7680, 2)]
    assert planned == [[0, 1, 2], [0, 1, 2]], "Q is read as Q, K as K, V as V"
    assert chunked == [[0, 0, 0], [0, 1, 2, 2]], "rank 0 reads queries as K and V; rank 1 keys as Q and values as K"
    assert iv.length([(part.at, part.at + part.stop - part.start) for part in contents([(0, 3840)], subs)]) == 3840
