"""What an optimizer looks at is found, without changing it: for all of torch, and for one of each kind."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn

from autotp_plan.runtime.optimizers.probe import LooksAt, probe
from tests.helpers import odd_optimizers as odd
from tests.helpers import optimizers as kinds

CPU = torch.device("cpu")
ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip
BY_TENSOR = ("Adafactor", "Muon")
NOT_PROBED = {"LBFGS": "closure", "SparseAdam": "dense gradients"}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.0}, {"momentum": 0.9, "nesterov": True}, {"foreach": True}],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"lr": torch.tensor(1e-3)}, {"maximize": True}],
    "AdamW": [{"weight_decay": 0.5}, {"lr": 1e-7}, {"betas": (0.5, 0.5)}, {"lr": torch.tensor(0.0)}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "Adafactor": [{"weight_decay": 0.1}, {"lr": 0.0}, {"foreach": True}],
    "Muon": [{"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}],
}


def found(optimizer: Any, ndim: int = 2, like: Any = None) -> LooksAt:
    return probe(optimizer, 0, ndim, CPU, like).looks_at


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 6))


def test_every_optimizer_of_torch_is_known() -> None:
    of_torch = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    assert of_torch == {*ELEMENTWISE, *BY_TENSOR, *NOT_PROBED}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_of_torch(name: str) -> None:
    for options in [{}, *OPTIONS.get(name, [])]:
        optimizer = getattr(torch.optim, name)([matrix()], **options)
        assert [found(optimizer, ndim) for ndim in (1, 2, 3)] == [LooksAt.ELEMENT] * 3, options


@pytest.mark.parametrize("name", BY_TENSOR)
def test_optimizers_of_torch_that_look_at_a_tensor(name: str) -> None:
    for options in [{}, *OPTIONS[name]]:
        assert found(getattr(torch.optim, name)([matrix()], **options)) is LooksAt.TENSOR, options


@pytest.mark.parametrize(("name", "reason"), NOT_PROBED.items())
def test_what_cannot_take_such_steps_is_unknown(name: str, reason: str) -> None:
    finding = probe(getattr(torch.optim, name)([matrix()]), 0, 2, CPU)
    assert finding.looks_at is LooksAt.UNKNOWN
    assert reason in finding.reason


@pytest.mark.parametrize("options", [{"scale_parameter": True}, {"scale_parameter": False}, {"beta1": 0.9}])
def test_adafactor_of_transformers_looks_at_a_tensor(options: dict[str, Any]) -> None:
    from transformers import Adafactor

    for more in ({"lr": 1e-3, "relative_step": False}, {"lr": None, "relative_step": True}):
        optimizer = Adafactor([matrix()], **{**more, **options})
        assert [found(optimizer, ndim) for ndim in (1, 2, 3)] == [LooksAt.TENSOR] * 3


@pytest.mark.parametrize("kind", [kinds.Sophia, kinds.Lion])
def test_elementwise_optimizers_pass(kind: Any) -> None:
    assert [found(kind([matrix()]), ndim) for ndim in (1, 2, 3)] == [LooksAt.ELEMENT] * 3


@pytest.mark.parametrize("kind", [kinds.Lamb, kinds.Lars, kinds.NormedSgd, kinds.Shampoo, kinds.EightBitAdam])
def test_norms_preconditioners_and_blocks_are_caught(kind: Any) -> None:
    assert [found(kind([matrix()]), ndim) for ndim in (1, 2, 3)] == [LooksAt.TENSOR] * 3


def test_a_preconditioner_that_is_not_used_yet_is_caught() -> None:
    assert found(kinds.Shampoo([matrix()], start=100)) is LooksAt.TENSOR


@pytest.mark.parametrize("kind", [kinds.GlobalNormSgd, kinds.NoisySgd])
def test_what_depends_on_more_than_a_tensor_is_caught(kind: Any) -> None:
    assert found(kind([matrix()])) is LooksAt.ALL


@pytest.mark.parametrize(
    "kind",
    [
        odd.FactoredAbove, odd.QuantisedAbove, odd.RmsClipped, odd.ScaledSign, odd.NormedEveryTenth, odd.Projected,
        odd.ObjectState, odd.ForeachNormed, odd.CountInState,
    ],
)  # fmt: skip
def test_hidden_looks_at_a_tensor_are_caught(kind: Any) -> None:
    assert found(kind([matrix()])) is LooksAt.TENSOR


@pytest.mark.parametrize("counts_in", ["state", "group", "self"])
def test_a_warm_up_does_not_hide_what_follows(counts_in: str) -> None:
    optimizer = odd.NormedLater([matrix()])
    optimizer.counts_in = counts_in
    assert [found(optimizer, ndim) for ndim in (1, 2, 3)] == [LooksAt.TENSOR] * 3


@pytest.mark.parametrize("kind", [odd.Distance, odd.WeakDecay])
def test_small_effects_of_all_parameters_are_caught(kind: Any) -> None:
    assert [found(kind([matrix()]), ndim) for ndim in (1, 2, 3)] == [LooksAt.ALL] * 3


def test_no_step_at_first_is_no_reason_to_refuse() -> None:
    assert found(odd.Delayed([matrix()])) is LooksAt.ELEMENT


def test_random_rounding_is_caught_in_the_dtype_that_has_it() -> None:
    for dtype, looks_at in ((torch.float32, LooksAt.ELEMENT), (torch.bfloat16, LooksAt.ALL)):
        parameter = nn.Parameter(torch.randn(4, 6, dtype=dtype))
        assert found(odd.StochasticRounding([parameter]), like=parameter) is looks_at


def test_flags_of_a_parameter_decide() -> None:
    plain, flagged, vector = matrix(), matrix(), nn.Parameter(torch.randn(4))
    flagged.use_norm = True  # type: ignore[attr-defined]
    by_attribute, by_state = odd.FlaggedByAttribute([plain, flagged]), odd.FlaggedByState([plain, vector])
    assert [found(by_attribute, like=one) for one in (plain, flagged)] == [LooksAt.ELEMENT, LooksAt.TENSOR]
    assert [found(by_state, one.dim(), like=one) for one in (plain, vector)] == [LooksAt.TENSOR, LooksAt.ELEMENT]


def test_a_state_that_the_constructor_made_is_there() -> None:
    parameter = matrix()
    assert found(odd.StateInConstructor([parameter]), like=parameter) is LooksAt.ELEMENT
    assert found(odd.NormedStateInConstructor([parameter]), like=parameter) is LooksAt.TENSOR


def test_what_needs_a_closure_is_unknown() -> None:
    assert found(odd.NeedsClosure([matrix()])) is LooksAt.UNKNOWN


def test_what_cannot_be_copied_is_unknown() -> None:
    finding = probe(kinds.Opaque([matrix()]), 0, 2, CPU)
    assert (finding.looks_at, "generator" in finding.reason) == (LooksAt.UNKNOWN, True)


def test_what_frees_memory_is_not_copied() -> None:
    freed = []

    class Freeing(kinds.Lion):
        def __del__(self) -> None:
            freed.append(id(self))

    optimizer = Freeing([matrix()])
    assert found(optimizer) is LooksAt.UNKNOWN
    assert not freed


def test_the_hyperparameters_of_the_group_decide() -> None:
    class Either(kinds.Lars):
        def update(self, gradient: Any, parameter: Any, state: Any, group: Any) -> Any:
            return super().update(gradient, parameter, state, group) if group["trust"] else gradient

    optimizer = Either([{"params": [matrix()], "trust": False}, {"params": [matrix()], "trust": True}])
    assert [probe(optimizer, at, 2, CPU).looks_at for at in (0, 1)] == [LooksAt.ELEMENT, LooksAt.TENSOR]


def test_a_wrapper_around_an_optimizer_is_probed_with_what_is_inside() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inside: Any) -> None:
            self.inside = inside
            super().__init__(inside.param_groups, {})
            self.param_groups, self.state = inside.param_groups, inside.state

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inside.step()

    parameter = matrix()
    before = parameter.detach().clone()
    assert found(Lookahead(torch.optim.AdamW([parameter]))) is LooksAt.ELEMENT
    assert found(Lookahead(kinds.Lars([parameter]))) is LooksAt.TENSOR
    assert torch.equal(parameter, before)


def test_nothing_of_the_user_changes_and_it_takes_milliseconds() -> None:
    parameter = matrix()
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    before = copy.deepcopy((optimizer.state_dict(), parameter, torch.get_rng_state(), scheduler.state_dict()))
    started = time.perf_counter()
    assert found(optimizer) is LooksAt.ELEMENT
    assert time.perf_counter() - started < 0.5
    after = (optimizer.state_dict(), parameter, torch.get_rng_state(), scheduler.state_dict())
    assert not calls
    assert repr(before) == repr(after)
