"""Which gradients of an input share an all-reduce, and for how long it is remembered.

Errors are planted in the same ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.communication import all_reduces, load, planted, prepare
from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def users(function: Callable[[Any, Any, Any], Any], *, leaf: bool = False) -> tuple[int, Any]:
    """The number of sums and the gradient of `x` after `function(copy, x, w)`, where each rank has its own `w`."""
    import torch
    from deepspeed.utils import groups

    from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks

    group = groups.get_tensor_model_parallel_group()
    start = torch.arange(6.0, dtype=torch.float64).view(2, 3).requires_grad_()
    x = start.detach().requires_grad_() if leaf else start * 2
    w = torch.full((3,), 1.0 + groups.get_tensor_model_parallel_rank(), dtype=torch.float64)
    with all_reduces() as shapes:
        function(lambda tensor: copy_to_ranks(tensor, group, shared=True), x, w).sum().backward()
    return len(shapes), (x if leaf else start).grad


def two(copy: Any, x: Any, w: Any) -> Any:
    return copy(x) * w + copy(x) * w


def changed(copy: Any, x: Any, w: Any) -> Any:
    first = copy(x) * w
    x.mul_(3)
    return first + copy(x) * w


def two_tensors(copy: Any, x: Any, w: Any) -> Any:
    return copy(x) * w + copy(x + 0) * w


def two_threads(copy: Any, x: Any, w: Any) -> Any:
    import threading

    parts = [copy(x) * w]
    thread = threading.Thread(target=lambda: parts.append(copy(x) * w))
    thread.start()
    thread.join()
    return parts[0] + parts[1]


def without_gradient_first(copy: Any, x: Any, w: Any) -> Any:
    import torch

    with torch.no_grad():
        copy(x)
        first = copy(x.detach())
    assert not first.requires_grad
    return copy(x) * w + copy(x) * w


def in_another_graph(copy: Any, x: Any, w: Any) -> Any:
    (copy(x) * w).sum().backward(retain_graph=True)
    return copy(x) * w


def weight_without_gradient(copy: Any, x: Any, w: Any) -> Any:
    import torch.nn.functional as F

    return F.linear(copy(x), w.expand(3, 3)) + F.linear(copy(x), w.expand(3, 3))


def changed_copy(copy: Any, x: Any, w: Any) -> Any:
    return copy(x).mul_(2) * w


def sharing(work: Path) -> dict[str, Any]:
    """Inside a rank: what shares; what is left of it; what a shared copy that ignores changes would do."""
    import torch

    from autotp_plan.runtime.tensor_parallel import collectives
    from tests.helpers.models import batch

    _, model = load(work, "llama")
    cases = (
        two, changed, two_tensors, two_threads, without_gradient_first, in_another_graph, weight_without_gradient,
    )  # fmt: skip
    found: dict[str, Any] = {case.__name__: users(case) for case in cases}
    found["leaf"] = users(two, leaf=True)
    try:
        users(changed_copy)
        found["changed_copy"] = "nothing was said"
    except RuntimeError as error:
        found["changed_copy"] = str(error)

    def careless(input: Any, group: Any) -> Any:
        known = collectives._shared_sums.by_input.get(input)
        meeting = known[2]() if known else None
        if meeting is None:
            return right(input, group)
        return meeting

    right = collectives._shared_sum
    with planted(collectives, "_shared_sum", careless):
        found["changed, carelessly"] = users(changed)
    with planted(collectives._SumOfGradients, "backward", staticmethod(lambda ctx, gradient: (gradient, None))):
        found["two, not summed"] = users(two)

    def step() -> tuple[int, int]:
        out = model(input_ids=batch(1), labels=batch(1), use_cache=False)
        out.loss.backward()
        del out
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects()), len(collectives._shared_sums.by_input)

    def steps() -> list[tuple[int, int]]:
        gc.collect()
        gc.disable()
        gc.freeze()  # so that `step` counts only what was made since
        try:
            return [step() for _ in range(20)]
        finally:
            gc.enable()

    found["steps"] = steps()
    kept: list[Any] = []
    meeting = collectives._gradient_sum

    def keeping(input: Any, group: Any) -> Any:
        kept.append(input)
        return meeting(input, group)

    with planted(collectives, "_gradient_sum", keeping):
        found["steps that keep"] = steps()
    with torch.no_grad():
        before = len(collectives._shared_sums.by_input)
        model(input_ids=batch(1), labels=batch(1), use_cache=False)
        found["evaluated"] = len(collectives._shared_sums.by_input) - before
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sums")
    prepare(work, "llama")
    return work


@pytest.fixture(scope="module")
def shares(work: Path) -> dict[str, Any]:
    return launch(sharing, 2, work, timeout=120)[0]


@pytest.mark.parametrize(
    ("case", "sums", "gradient"),
    [
        ("two", 1, 12.0),  # 2 (of x) * 2 (users) * (1 + 2, of w)
        ("leaf", 1, 6.0),
        ("weight_without_gradient", 1, 36.0),
        ("without_gradient_first", 1, 12.0),
        ("two_tensors", 2, 12.0),
        ("two_threads", 2, 12.0),
        ("changed", 2, 24.0),  # 6 + 18
        ("in_another_graph", 2, 12.0),
    ],
)
def test_gradients_of_one_input_are_summed_once_unless_it_changes(
    shares: dict[str, Any], case: str, sums: int, gradient: float
) -> None:
    counted, found = shares[case]
    assert counted == sums
    assert (found == gradient).all(), found


def test_changing_a_shared_input_in_place_is_refused(shares: dict[str, Any]) -> None:
    assert "is a view and is being modified inplace" in shares["changed_copy"]


def test_a_sum_that_ignores_changes_or_is_left_out_is_noticed(shares: dict[str, Any]) -> None:
    assert (shares["changed, carelessly"][1] != 24.0).any()
    assert (shares["two, not summed"][1] != 12.0).any()


def test_a_step_leaves_no_tensors_behind(shares: dict[str, Any]) -> None:
    """Without the garbage collector: what only it would free counts as left.

    A thread of gloo's may hold what it has just sent for a moment longer, so the fewest count.
    """
    tensors = [found for found, _ in shares["steps"]]
    assert min(tensors[10:]) <= min(tensors[1:10]), "as many tensors after the last steps as after the first"
    assert {meetings for _, meetings in shares["steps"]} == {0}
    assert shares["evaluated"] == 0
    kept = [found for found, _ in shares["steps that keep"]]
    assert min(kept[10:]) > max(kept[1:10]), "one that keeps its inputs shows"
