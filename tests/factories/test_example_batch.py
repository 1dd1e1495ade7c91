"""What a model that is not from transformers is run on, and which of its output is the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp_plan.factories.example_batch import Batch, Batches, OwnBatches, batches_for, run, settle
from autotp_plan.schemas.errors import MismatchError
from tests.helpers import own_models


def test_token_ids_are_below_the_size_of_their_table() -> None:
    found = batches_for(own_models.Nano(vocab_size=17, block_size=400), 12)
    assert found == Batches(ids="idx", labels=("targets",), words=17, length=12)
    batch = found(1)
    assert batch.kwargs["idx"].shape == (2, 12) and int(batch.kwargs["idx"].max()) < 17
    assert torch.equal(batch.kwargs["idx"], found(1).kwargs["idx"])
    assert not torch.equal(batch.kwargs["idx"], found(2).kwargs["idx"])


def test_a_model_gives_its_inputs_itself() -> None:
    model = own_models.frames().double()
    found = batches_for(model, 12)
    assert isinstance(found, OwnBatches)
    state = torch.random.get_rng_state()
    assert not torch.equal(found(1).kwargs["frames"], found(2).kwargs["frames"])
    assert torch.equal(state, torch.random.get_rng_state())
    loss, main = run(model, found(1))
    assert loss.dim() == 0 and main.shape == (2, 10) and main.dtype == torch.float64


class Gives(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output, self.weight = output, nn.Parameter(torch.ones(1))

    def forward(self) -> Any:
        return self.output


class Named:
    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


LOSS, LOGITS = torch.tensor(3.0), torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "output",
    [(LOSS, LOGITS), (LOGITS, LOSS), {"logits": LOGITS, "aux": torch.ones(2), "loss": LOSS}, Named(LOSS, LOGITS),
     [(LOGITS, None), LOSS]],
)  # fmt: skip
def test_loss_and_logits_of_an_output(output: Any) -> None:
    loss, main = run(Gives(output), Batch(kwargs={}))
    assert loss is LOSS and main is LOGITS


def test_without_a_loss_every_element_counts() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss, _ = run(Gives(logits), Batch(kwargs={}))
    loss.backward()
    assert logits.grad is not None and len(set(logits.grad.flatten().tolist())) == 6


def test_dropout_is_off_or_else_the_model_is_in_evaluation() -> None:
    model = own_models.Nano()
    assert (
        not settle(model, batches_for(model, 8))
        and {one.p for one in model.modules() if isinstance(one, nn.Dropout)} == {0.0}
        and not model.training
    )
    model = own_models.Nano(dropout=0.0)
    assert settle(model, batches_for(model, 8)) and model.training


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (lambda: own_models.Uncounted(), "no-example-inputs"),
        (lambda: own_models.BadExample(), "bad-example-inputs"),
        (lambda: own_models.Random(), "not-reproducible"),
        (lambda: own_models.Counting(), "not-reproducible"),
        (lambda: own_models.Sparse(), "not-reproducible"),
        (lambda: own_models.Silent(), "no-tensor-in-output"),
        (lambda: nn.Linear(4, 4), "no-example-inputs"),
    ],
)
def test_what_cannot_be_run_or_compared(model: Any, code: str) -> None:
    made = model()
    with pytest.raises(MismatchError) as refused:
        settle(made, batches_for(made, 8))
    assert [fault.code for fault in refused.value.faults] == [code]
