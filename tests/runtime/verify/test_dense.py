"""The dense side of a proof: which twin is taken, and that its files are there."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.runtime.verify import dense
from autotp_plan.runtime.verify.random_inputs import Batches


def about(divisor: int, ungraded: tuple[str, ...], rounding: float = 0.0) -> dense.About:
    batches = Batches(vocab_size=8, length=4, padding=None)
    return dense.About(
        divisor=divisor, layers=2, experts=None, num_parameters=1, batches=batches, attention=("eager",),
        ungraded=ungraded, rounding=rounding,
    )  # fmt: skip


@pytest.mark.parametrize("outcomes", [(2, None), (2, 1, None), (2, 3, None, None), (None, 2, None), (1, 2, 2)])
def test_the_twin_that_was_taken_is_the_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: tuple[int | None, ...]
) -> None:
    """A twin that fails removes the files of the one before, which may be the one that is taken."""
    sizes = [dense.Sizes(divisor=place, layers=2, experts=None) for place in range(len(outcomes))]

    def attempt(_plan: Any, _original: Any, folder: Path, one: dense.Sizes, _runs: Any) -> dense.About:
        shutil.rmtree(folder / "float64", ignore_errors=True)
        (folder / "float64").mkdir()
        count = outcomes[one.divisor]
        if count is None:
            raise RuntimeError("these sizes do not go together")
        (folder / "float64" / dense.PLAN_NAME).write_text(str(one.divisor))
        return about(one.divisor, tuple("abc"[:count]))

    monkeypatch.setattr(dense, "_original", lambda plan, folder: None)
    monkeypatch.setattr(dense, "_attention", lambda folder, plan, wanted: (("eager",), {}))
    monkeypatch.setattr(dense, "_candidates", lambda plan, original: iter(sizes))
    monkeypatch.setattr(dense, "_try", attempt)
    dense.write_twin(None, tmp_path, ("eager",))  # type: ignore[arg-type]
    taken = dense.About.read(tmp_path).divisor
    fewest = min(count for count in outcomes if count is not None)
    assert outcomes[taken] == fewest
    assert (tmp_path / "float64" / dense.PLAN_NAME).read_text() == str(taken)


@pytest.mark.parametrize(
    ("roundings", "taken"),
    [((1e-5, 1e-7), 0), ((1e-3, 1e-5, 1e-7), 1), ((1e-2, 1e-3, 5e-4, 1e-9), 2), ((math.inf, 1e-6), 1)],
)
def test_a_twin_that_rounding_leaves_as_it_is_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roundings: tuple[float, ...], taken: int
) -> None:
    """Of three at most: a model may round at any size."""
    sizes = [dense.Sizes(divisor=place, layers=2, experts=None) for place in range(len(roundings))]
    monkeypatch.setattr(dense, "_original", lambda plan, folder: None)
    monkeypatch.setattr(dense, "_attention", lambda folder, plan, wanted: (("eager",), {}))
    monkeypatch.setattr(dense, "_candidates", lambda plan, original: iter(sizes))
    monkeypatch.setattr(
        dense, "_try", lambda _plan, _, folder, one, runs: about(one.divisor, (), roundings[one.divisor])
    )
    dense.write_twin(None, tmp_path, ("eager",))  # type: ignore[arg-type]
    assert dense.About.read(tmp_path).divisor == taken
