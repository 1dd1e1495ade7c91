"""Errors: absolute and scaled, and against this rank's part of a full tensor."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from autotp_plan.runtime.verify.compare import absolute_error, errors, scaled_error
from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64, dense_reader, run_passes
from autotp_plan.runtime.verify.random_inputs import Batches, randomise
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.plan.document import ModelIdentity, Parameter, Plan

BATCHES = Batches(vocab_size=16, length=4, padding=0)


def test_errors_are_the_largest_difference() -> None:
    expected, found = torch.tensor([1.0, -8.0]), torch.tensor([1.5, -8.0])
    assert absolute_error(expected, found) == 0.5
    assert scaled_error(expected, found) == 0.5 / 8
    assert scaled_error(expected / 16, found / 16) == 0.5 / 16, "not scaled where nothing is above 1"


@pytest.mark.parametrize("measure", [absolute_error, scaled_error])
@pytest.mark.parametrize("wrong", [torch.tensor([math.nan, 2.0]), torch.tensor([math.inf, 2.0]), torch.ones(3)])
def test_what_is_no_number_or_of_another_shape_is_infinitely_wrong(measure: object, wrong: torch.Tensor) -> None:
    assert callable(measure)
    assert measure(torch.ones(2), wrong) == math.inf
    assert measure(torch.zeros(0), torch.zeros(0)) == 0.0


def test_a_rank_is_compared_with_its_part_of_the_full_tensor() -> None:
    column = Layout(
        shape=(4, 2),
        dim=0,
        sub_parameters=(SubParameter(size=4, unit=1),),
        intervals=(((0, 1), (2, 3)), ((1, 2), (3, 4))),
    )
    known: Any = {"dtype": "F64", "rule": ""}
    plan = Plan(
        model=ModelIdentity(model_type="llama", architecture=None, config={}, inventory="sha256:" + "0" * 64),
        tp_size=2,
        layouts={"4x2 dim 0": column, "2 whole": Layout(shape=(2,))},
        parameters=(
            Parameter(name="up", layout="4x2 dim 0", style="column", **known),
            Parameter(name="norm", layout="2 whole", style="replicated", **known),
        ),
    )
    full = torch.arange(8.0).view(4, 2)
    dense = {"loss": {"pass 1": torch.tensor(1.0)}, "gradient": {"up": full, "norm": torch.ones(2)}}
    local = {"loss": {"pass 1": torch.tensor(1.0)}, "gradient": {"up": full[1::2], "norm": torch.ones(2)}}
    assert errors(dense, local, plan, 1, absolute_error) == {"loss": {"pass 1": 0}, "gradient": {"up": 0, "norm": 0}}
    assert errors(dense, local, plan, 0, absolute_error)["gradient"] == {"up": 2.0, "norm": 0}, "another rank's rows"
    whole = dataclasses.replace(plan.parameters[0], layout="2 whole", style="replicated")
    other = dataclasses.replace(plan, parameters=(whole, plan.parameters[1]))
    assert errors(dense, local, other, 1, absolute_error)["gradient"]["up"] == math.inf, (
        "a shard is not the full tensor"
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.unused = nn.Embedding(16, 16), nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (self.table(tokens) * self.scale).float()
        return logits.square().mean(), logits


def test_gradients_accumulate_over_two_passes_in_float64() -> None:
    model = Model().double()
    randomise(model)
    names = [name for name, _ in model.named_parameters()]
    found = run_passes(model, dense_reader(model), names, BATCHES, forward=lambda model, tokens: model(tokens))
    assert found["loss"].keys() == found["logits"].keys() == {"pass 1", "pass 2"}
    assert found["gradient"].keys() == found["accumulated"].keys() == {"table.weight"}, "the rest has no gradient"
    assert found["logits"]["pass 1"].dtype == torch.float64, "the cast to float32 is promoted"
    assert not torch.equal(found["gradient"]["table.weight"], found["accumulated"]["table.weight"])
    assert found["accumulated"]["table.weight"].equal(model.table.weight.grad)  # type: ignore[arg-type]
    with PromoteToFloat64():
        assert torch.ones(1, dtype=torch.float64).to(torch.float32).dtype == torch.float64


def test_every_parameter_and_buffer_is_random() -> None:
    model = Model()
    randomise(model)
    for tensor in (*model.parameters(), *model.buffers()):
        assert (tensor != 0).all() and (tensor != 1).all()
    first = model.table.weight.clone()
    randomise(model)
    assert torch.equal(model.table.weight, first), "from a fixed seed"


def test_batches_hold_the_padding_token() -> None:
    assert BATCHES(3).shape == (2, 4) and BATCHES(3)[0, 0] == 0 and BATCHES(3).max() < 16
    assert torch.equal(BATCHES(3), BATCHES(3)) and not torch.equal(BATCHES(3), BATCHES(4))
