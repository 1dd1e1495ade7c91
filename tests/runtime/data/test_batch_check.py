"""Batches that differ between the TP ranks of a group are refused at the first forward, and at every n-th."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp_plan.runtime.data.batch_check import CompareBatch, _checksum, check_interval
from autotp_plan.schemas.errors import MismatchError, OptionError
from tests.helpers.launch import launch

TOKENS = torch.arange(12).reshape(2, 6)
SEEN: dict[str, Tensor] = {
    "one token": TOKENS + (TOKENS == 7),
    "two tokens swapped": TOKENS[:, [0, 2, 1, 3, 4, 5]],
    "two samples swapped": TOKENS.flip(0),
    "another shape": TOKENS.reshape(3, 4),
    "another dtype": TOKENS.int(),
    "the bits of other numbers": TOKENS.double(),
}


def test_a_checksum_depends_on_every_bit_and_on_their_order() -> None:
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.complex64):
        tensor = torch.zeros(3, 4, dtype=dtype)
        other = tensor.clone()
        other[1, 2] = 1
        third = tensor.clone()
        third[2, 1] = 1
        numbers = {int(_checksum(one)) for one in (tensor, other, third)}
        assert len(numbers) == 3, dtype
        assert int(_checksum(other.t().contiguous().t())) == int(_checksum(other)), "not on strides"
    assert int(_checksum(torch.tensor(5))) == 5 * 0x9E3779B97F4A7C1
    large = torch.full((1000,), torch.iinfo(torch.int64).max)
    assert int(_checksum(large)) != int(_checksum(large - 1)), "sums wrap around"


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_that_makes_no_sense(every: int) -> None:
    with pytest.raises(OptionError, match="batches cannot be compared so often"):
        check_interval(every)


class Model(nn.Module):
    def __init__(self, compare: CompareBatch | None) -> None:
        super().__init__()
        self.compare = compare

    def forward(self, *args: Tensor, **kwargs: Tensor) -> None:
        if self.compare is not None:
            self.compare(self.training, args, kwargs)


def in_two_ranks(folder: Path) -> dict[str, Any]:
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan
    from autotp_plan.runtime.data.batch_check import batch_comparison

    plan = TrainingPlan(compile_plan(folder, tp_size=2))
    ranks = plan.init_mesh()
    found: dict[str, Any] = {}

    def call(model: nn.Module, batch: Tensor, **more: Any) -> str:
        try:
            model(batch if ranks.tp_rank else TOKENS, **more)
        except MismatchError as error:
            return "; ".join(fault.where for fault in error.faults)
        return "passed"

    for name, batch in SEEN.items():
        model = Model(batch_comparison(ranks, 3))
        found[name] = [call(model, one) for one in (TOKENS, batch, batch, batch, TOKENS, TOKENS, TOKENS)]
        model.eval()
        found[f"{name} in evaluation"] = [call(model, one) for one in (batch, batch, batch, batch)]
    model = Model(batch_comparison(ranks, 2))
    own = torch.full((3,), ranks.tp_rank)
    found["by name"] = [call(model, TOKENS), call(model, TOKENS), call(model, TOKENS, mask=own)]
    model = Model(batch_comparison(ranks, None))
    found["off"] = [call(model, TOKENS + 1)]

    loaded = plan.load_model(folder, check_batches_every=2).train()
    tokens = TOKENS + 3

    def forward(model: Any, rank_gets: Tensor) -> str:
        try:
            model(input_ids=rank_gets, labels=rank_gets)
        except MismatchError as error:
            return sorted(fault.where for fault in error.faults)[0]
        return "passed"

    other = tokens + ranks.tp_rank
    found["loaded"] = [forward(loaded, one) for one in (tokens, tokens, other)]
    found["loaded, forward"] = [forward(loaded.forward, one) for one in (tokens, other)]
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig

        for task in (None, "CAUSAL_LM"):  # PEFT calls the model in another way for each
            base = plan.load_model(folder, check_batches_every=2).train()
            adapted = plan.add_lora(base, LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
            found[f"adapted {task}"] = [forward(adapted, one) for one in (tokens, tokens, other)]
            found[f"adapted {task}, forward"] = [forward(base.forward, one) for one in (tokens, other)]
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_batches_that_differ_later_are_refused_on_every_rank(tmp_path: Path) -> None:
    from tests.helpers.models import save_checkpoint

    save_checkpoint(tmp_path, "llama")
    for found in launch(in_two_ranks, 2, tmp_path):
        for name in SEEN:
            fourth, first = "0 of forward 4 in training", "0 of the first forward in evaluation"
            assert found[name] == ["passed"] * 3 + [fourth] + ["passed"] * 3, name
            later = "0 of forward 4 in evaluation"
            assert found[f"{name} in evaluation"] == [first, "passed", "passed", later], name
        assert found["by name"] == ["passed", "passed", "mask of forward 3 in training"]
        assert found["off"] == ["passed"]
        for name in found.keys() & {"loaded", "adapted None", "adapted CAUSAL_LM"}:
            assert found[name] == ["passed", "passed", "input_ids of forward 3 in training"], name
            if f"{name}, forward" in found:  # a wrapper may call it, and no hooks
                assert found[f"{name}, forward"] == ["passed", "input_ids of forward 5 in training"], name
