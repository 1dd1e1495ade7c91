"""Which modules are linear layers: what they compute decides, and not their class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autotp_plan.probes.linear import is_linear, orientation
from autotp_plan.runtime.loading.check_model import check_model
from autotp_plan.schemas.errors import MismatchError


class Like(nn.Module):
    """`weight` of 6 outputs and 4 inputs, and a bias where asked; no forward yet."""

    shape = (6, 4)

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(self.shape, device="meta"))
        self.bias = nn.Parameter(torch.empty(6, device="meta")) if bias else None


class Product(Like):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("...i,oi->...o", x, self.weight)
        return out if self.bias is None else out + self.bias


class OfLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Reshaping(Like):
    """As GPT-2's Conv1D is written: it knows its number of outputs."""

    shape = (4, 6)

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias)
        self.nf = 6

    def forward(self, x: Tensor) -> Tensor:
        out = x.reshape(-1, x.size(-1)) @ self.weight
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize("bias", [True, False])
def test_what_multiplies_by_its_weight_is_linear(bias: bool) -> None:
    assert orientation(nn.Linear(4, 6, bias=bias, device="meta")) == "linear"
    assert orientation(Product(bias)) == "linear"
    assert orientation(Reshaping(bias)) == "transposed"


def test_subclasses_are_tried_out_too() -> None:
    assert orientation(OfLinear(4, 6, device="meta")) == "linear"
    assert orientation(Conv1D(6, 4)) == "transposed"

    class Turned(Conv1D):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    assert orientation(Turned(6, 4)) == "transposed"


class Dropping(Like):
    """Linear in evaluation only, and nearly so in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.dropout(x, 0.01, self.training), self.weight, self.bias)


class Scaled(Like):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * (self.weight.shape[1] ** -0.5)


class WithBuffer(Like):
    """The buffer is 1 when it is made, and what the checkpoint holds later."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.scale, self.weight, self.bias)


class LinearWithBuffer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 6)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.scale, self.weight, self.bias)


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Normed(Like):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Twice(Like):
    """With a second weight that the first would be sharded without."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + 0 * self.gate


@pytest.mark.parametrize(
    "module",
    [Dropping(), Scaled(), WithBuffer(), LinearWithBuffer(), Router(4, 6), Normed(), Twice(), nn.Embedding(6, 4),
     nn.LayerNorm(4), nn.Bilinear(2, 3, 4), nn.Conv1d(4, 6, 1), Like(), nn.Sequential(nn.Linear(4, 6))],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_what_computes_anything_else_is_not(module: nn.Module) -> None:
    state = torch.random.get_rng_state()
    assert not is_linear(module)
    assert torch.equal(torch.random.get_rng_state(), state), "the probe draws no numbers of the program's"


def test_the_probe_changes_nothing() -> None:
    module = Reshaping()
    before: dict[str, Any] = dict(vars(module))
    weight = module.weight
    orientation(module)
    assert vars(module) == before and module.weight is weight and module.nf == 6


class Pair(nn.Module):
    def __init__(self, kind: type[Like]) -> None:
        super().__init__()
        self.config = {"model_type": "own"}
        self.up = kind(bias=False)
        self.down = nn.Linear(6, 4, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x))
        return out


@pytest.mark.parametrize(("kind", "right"), [(Product, 0), (Reshaping, 1)])
def test_a_plan_must_shard_the_features_that_its_style_says(kind: type[Like], right: int) -> None:
    from autotp_plan.planner import SpecFile, compile_plan

    for dim in (0, 1):
        rules: list[dict[str, Any]] = [
            {"patterns": ["up.weight"], "partition_type": "column", "partition_dim": dim},
            {"patterns": ["down.weight"], "partition_type": "row"},
        ]
        if dim != right:  # as many units, so that the planner cannot know
            rules[0]["unit"], rules[1]["unit"] = 2, 3
        plan = compile_plan(Pair(kind), tp_size=2, specs=[SpecFile.from_dict({"layer_specs": rules})])
        if dim == right:
            check_model(Pair(kind), plan)
            continue
        with pytest.raises(MismatchError, match="sharded along its input features") as caught:
            check_model(Pair(kind), plan)
        assert f'"partition_dim": {right}' in caught.value.faults[0].expected
