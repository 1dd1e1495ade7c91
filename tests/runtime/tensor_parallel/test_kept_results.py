"""What a selectively checkpointed layer keeps, computes again and refuses, in one process."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from autotp_plan.runtime import selective_checkpointing
from autotp_plan.runtime.loading.activation_checkpointing import check_activation_checkpointing
from autotp_plan.runtime.tensor_parallel import kept_results
from autotp_plan.runtime.tensor_parallel.kept_results import kept_sum
from autotp_plan.schemas.errors import MismatchError, OptionError
from autotp_plan.schemas.upstream import replaced
from tests.helpers.operators import counted


class _Sum(torch.autograd.Function):
    """A sum over two ranks that hold the same."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, made: list[Any]) -> Tensor:
        def add_up(parts: Tensor) -> None:
            made.append(weakref.ref(parts.untyped_storage()))
            parts.detach().numpy()[:] *= 2  # as collectives do: no version of a tensor is counted up

        return kept_sum(add_up, input, is_product=True)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * 2, None


class Layer(nn.Module):
    """Two sums, each added to the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []
        self.q, self.o, self.up, self.down = (nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(4))
        self.norm = nn.LayerNorm(8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(self.norm(x))
        x = x + _Sum.apply(self.o((query @ query.transpose(-1, -2)).softmax(-1) @ query), self.made)
        return x + _Sum.apply(self.down(nn.functional.gelu(self.up(self.norm(x)))), self.made)


def run(layer: Callable[[Tensor], Tensor], is_selective: bool = True, **options: Any) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    if is_selective:
        options["context_fn"] = selective_checkpointing
    return checkpoint(layer, x, use_reentrant=False, **options).sin().sum()


def gradients(layer: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(layer.parameters())))


def made_layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


def test_the_last_sum_is_not_kept_and_the_first_is() -> None:
    layer = made_layer()
    loss = run(layer)
    gc.collect()
    assert [one() is not None for one in layer.made] == [True, False]
    found, ran = counted(lambda: gradients(layer, loss))
    assert len(layer.made) == 2, "no sum is made again"
    assert ran["aten::mm"] == 8, "of each product the two of its gradients, and none is made again"
    full, ran = counted(lambda: gradients(layer, run(layer, is_selective=False)))
    assert ran["aten::mm"] > 12
    assert all(torch.equal(one, other) for one, other in zip(found, full, strict=True))
    with replaced(kept_results._Layer, "forget_the_last", lambda _: None):
        layer.made.clear()
        other = run(layer)
        gc.collect()
        assert [one() is not None for one in layer.made] == [True, True], "what is kept would be seen"
        assert other.requires_grad


def test_nothing_is_left_behind_for_the_garbage_collector() -> None:
    layer = made_layer()
    gc.collect()
    gc.disable()
    try:
        loss = run(layer)
        gradients(layer, loss)
        del loss
        assert [one() is not None for one in layer.made] == [False, False]
        assert not [one for one in gc.get_objects() if type(one) is kept_results._Layer]
    finally:
        gc.enable()


def test_what_is_not_kept_is_computed_again_where_the_second_forward_does_not_stop_early() -> None:
    layer = made_layer()
    expected = gradients(layer, run(layer))
    layer.made.clear()
    with set_checkpoint_early_stop(False):
        found = gradients(layer, run(layer))
    assert len(layer.made) == 3, "the last sum is made again"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_products_in_batches_are_kept_where_one_factor_is_a_weight() -> None:
    weight = nn.Parameter(torch.randn(2, 8, 8, dtype=torch.float64))

    def layer(x: Tensor) -> Tensor:
        return ((x @ x.transpose(1, 2)).softmax(-1) @ (x @ weight.transpose(1, 2))).tanh().square()

    loss = run(layer)
    _, ran = counted(lambda: torch.autograd.grad(loss, [weight]))
    assert ran["aten::bmm"] == 4, "two for gradients, and two of attention again"


def in_place(x: Tensor, product: nn.Linear) -> Tensor:
    return product(x).mul_(2).sin()


def second_backward(loss: Tensor) -> Any:
    loss.backward(retain_graph=True)
    return loss.backward()


def test_a_product_that_is_changed_in_place_is_computed_again() -> None:
    product = nn.Linear(8, 8, dtype=torch.float64)
    expected = gradients(product, run(lambda x: in_place(x, product), is_selective=False))
    loss = run(lambda x: in_place(x, product))
    found, ran = counted(lambda: gradients(product, loss))
    assert ran["aten::addmm"] == 1, "once more, which costs"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_refused_and_what_to_do_instead() -> None:
    product = nn.Linear(8, 8, dtype=torch.float64)

    def layer(x: Tensor) -> Tensor:
        return product(x).sin()

    with pytest.raises(MismatchError, match="a second backward of one loss") as caught:
        second_backward(run(layer))
    (fault,) = caught.value.faults
    assert fault.code == "computed-again" and 'activation_checkpointing="full"' in (fault.next or "")
    product.zero_grad()
    second_backward(run(layer, is_selective=False))
    found = product.weight.grad
    product.zero_grad()
    second_backward(run(layer, is_selective=False, determinism_check="none"))
    assert found is not None and product.weight.grad is not None and torch.equal(found, product.weight.grad)


def test_another_second_forward_is_refused() -> None:
    product, forwards = nn.Linear(8, 8, dtype=torch.float64), Counter[str]()

    def layer(x: Tensor) -> Tensor:
        forwards["of this layer"] += 1
        with torch.no_grad():
            for _ in range(1, forwards["of this layer"]):
                product(x)
        return product(x).sin()

    with pytest.raises(MismatchError, match="another product or collective"):
        run(layer).backward()


def test_compiled_by_torch() -> None:
    layer = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).double()
    expected = gradients(layer, run(layer))
    compiled = torch.compile(lambda: run(layer), backend="aot_eager")
    found = gradients(layer, compiled())
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, expected, strict=True))


def test_kinds_and_models_that_are_refused() -> None:
    from transformers import AutoModelForCausalLM

    from tests.helpers.models import make_config

    model = AutoModelForCausalLM.from_config(make_config("llama"))
    with pytest.raises(OptionError) as unknown:
        check_activation_checkpointing("half", model)
    assert unknown.value.faults[0].code == "activation-checkpointing"
    assert all(f'"{kind}"' in str(unknown.value.faults[0].next) for kind in ("selective", "full"))
    for kind in (None, "selective", "full"):
        check_activation_checkpointing(kind, model)
    layer = made_layer()
    check_activation_checkpointing(None, layer)
    with pytest.raises(MismatchError) as without_support:
        check_activation_checkpointing("selective", layer)
    (fault,) = without_support.value.faults
    assert (fault.code, fault.got) == ("no-activation-checkpointing", "Layer")
    assert "context_fn=autotp_plan.runtime.selective_checkpointing" in str(fault.next), "as `run` does here"
