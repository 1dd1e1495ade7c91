"""TP ranks that draw different random numbers, and drop out, are refused when the engine is made, or they train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

WHAT = "the ranks of a TP group draw different random numbers"


def refusal(call: Callable[[], Any]) -> str:
    """Where the error that `call` ends in is, and what was got."""
    from autotp_plan.schemas.errors import MismatchError

    try:
        call()
    except MismatchError as error:
        (fault,) = error.faults
        return f"{fault.code} | {fault.where} | {fault.got}"
    return "no error"


def in_two_ranks(work: Path) -> dict[str, str]:
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from tests.helpers.parity import engine_settings

    me, found = dist.get_rank(), {}
    plan, other = load_plan(work / "drops.json"), load_plan(work / "model.json")
    tokens = torch.arange(12).reshape(2, 6)

    def loaded(**options: Any) -> Any:
        return plan.load_model(work / "drops", **options).train()

    def initialize(model: Any) -> Any:
        return plan.initialize(model, config=engine_settings(1))[0]

    def steps(engine: Any, number: int) -> None:
        for _ in range(number):
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()

    model = loaded()
    found["as they were loaded"] = refusal(lambda: initialize(model))
    torch.manual_seed(5 + me)
    found["initialize"] = refusal(lambda: initialize(model))
    torch.manual_seed(5)
    torch.rand(1 + me)
    found["drawn since"] = refusal(lambda: initialize(model))
    torch.manual_seed(5)
    engine = initialize(loaded(check_batches_every=2))
    torch.manual_seed(7 + me)
    found["first step"] = refusal(lambda: steps(engine, 1))
    torch.manual_seed(7)
    steps(engine, 2)
    torch.manual_seed(8 + me)
    found["later"] = refusal(lambda: steps(engine, 2))
    torch.manual_seed(7)
    unwatched = initialize(loaded(check_batches_every=None))
    torch.manual_seed(7 + me)
    found["batches are not compared"] = refusal(lambda: steps(unwatched, 1))
    unwatched.eval()
    found["evaluation"] = refusal(lambda: unwatched(input_ids=tokens))
    without = other.load_model(work / "model", check_batches_every=2).train()
    torch.manual_seed(9 + me)
    found["no dropout"] = refusal(lambda: steps(initialize(without), 3))
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_ranks_of_a_group_that_were_seeded_differently_are_named(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    for name, probability in (("model", 0.0), ("drops", 0.1)):
        folder = save_checkpoint(tmp_path / name, "llama", attention_dropout=probability)
        (tmp_path / f"{name}.json").write_text(compile_plan(folder, tp_size=2).to_json())
    first, second = launch(in_two_ranks, 2, tmp_path)
    assert first == second
    for name in ("as they were loaded", "evaluation", "no dropout"):
        assert first[name] == "no error", name
    for name, where, seeds in (
        ("initialize", "initialize", (5, 6)),
        ("drawn since", "initialize", (5, 5)),
        ("first step", "the first forward in training", (7, 8)),
        ("later", "forward 5 in training", (8, 9)),
        ("batches are not compared", "the first forward in training", (7, 8)),
    ):
        assert first[name].startswith(f"random-numbers-differ | {where} | rank 0: seed {seeds[0]}, state "), first
        assert f"; rank 1: seed {seeds[1]}, state " in first[name], first
