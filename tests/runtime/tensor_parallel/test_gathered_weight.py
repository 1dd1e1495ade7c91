"""Code outside of a vocabulary-parallel layer reads the full weight, and computes what it does on the dense model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


def fused(hidden: Any, weight: Any, labels: Any) -> Any:
    """A loss as fused kernels compute it: in chunks of the vocabulary, the gradient in the forward."""
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, labels: Any) -> Any:
            size, at = weight.shape[0], torch.arange(len(labels))
            logits = torch.cat([hidden @ weight[start : start + 32].t() for start in range(0, size, 32)], dim=-1)
            chances = logits.softmax(-1)
            loss = -chances[at, labels].log().mean()
            chances[at, labels] -= 1
            into_weight = torch.zeros_like(weight)
            into_weight += chances.t() @ hidden / len(labels)
            ctx.save_for_backward(chances @ weight / len(labels), into_weight)
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return ctx.saved_tensors[0] * grad, ctx.saved_tensors[1] * grad, None

    return Fused.apply(hidden, weight, labels)


def ways() -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    return {
        "linear": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
        "matmul": lambda x, w, y: F.cross_entropy(x @ w.T, y),
        "einsum": lambda x, w, y: F.cross_entropy(torch.einsum("nd,vd->nv", x, w), y),
        "addmm": lambda x, w, y: F.cross_entropy(torch.addmm(x.new_zeros(w.shape[0]), x, w.mT), y),
        "data": lambda x, w, y: F.cross_entropy(x @ w.data.t(), y),
        "converted": lambda x, w, y: F.cross_entropy(x @ w.float().double().transpose(0, 1), y),
        "fused": fused,
        "embedding": lambda x, w, y: (F.embedding(y, w) * x).sum().tanh(),
        "parts": lambda x, w, y: sum((x @ part.t()).logsumexp(-1).mean() for part in w.split(100)),
    }


def numbers(model: Any, way: Any, grads: Any) -> dict[str, Any]:
    """Loss and gradients of a loss that reads the head's weight by itself."""
    import torch

    tokens = torch.arange(5, 29).reshape(2, 12) * 7
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1)
    loss = way(hidden, model.get_output_embeddings().weight, tokens[:, 1:].flatten())
    loss.backward()
    found = {"loss": loss.detach().clone(), **grads(model)}
    model.zero_grad()
    return found


def read_by_others(plan_file: Path, folder: Path) -> dict[str, Any]:
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.loading.local_shard import local_shard
    from autotp_plan.schemas.errors import MismatchError
    from tests.helpers.models import load_dense

    plan = load_plan(plan_file)
    model: Any = plan.load_model(folder, dtype=torch.float64).train()
    dense = load_dense(folder).double().train()
    names = [one.name for one in plan.document.expanded()]

    def sharded_grads(model: Any) -> dict[str, Any]:
        found = {name: local_shard(model, name, gradient=True) for name in names}
        return {name: grad.clone() for name, grad in found.items() if grad is not None}

    def dense_grads(model: Any) -> dict[str, Any]:
        from autotp_plan.runtime.tensor_parallel.collectives import take

        found = {}
        for one in plan.document.expanded():
            layout, grad = plan.document.layouts[one.layout], model.get_parameter(one.name).grad
            if grad is not None:
                mine = layout.intervals[plan.ranks.tp_rank] if layout.dim is not None else ()
                found[one.name] = grad.clone() if layout.dim is None else take(grad, mine, layout.dim)
        return found

    found: dict[str, Any] = {"errors": {}}
    for name, way in ways().items():
        expected, got = numbers(dense, way, dense_grads), numbers(model, way, sharded_grads)
        assert expected.keys() == got.keys(), name
        found["errors"][name] = max((expected[key] - got[key]).abs().max().item() for key in expected)
    weight = model.get_output_embeddings().weight
    found["shape"], found["dtype"] = tuple(weight.shape), str(weight.dtype)
    if plan.ranks.tp_rank == 0:
        found["shown"] = f"{weight}"  # no collective: another rank does not take part
    weight.requires_grad_(False)
    found["frozen"] = model.get_parameter("lm_head.weight").requires_grad
    weight.requires_grad = True
    found["thawed"] = model.get_parameter("lm_head.weight").requires_grad
    found["refused"] = []
    changes = {
        "normal_": lambda w: torch.nn.init.normal_(w), "mul_": lambda w: w.data.mul_(2),
        "set": lambda w: w.__setitem__(0, 1), "data": lambda w: setattr(w, "data", torch.zeros(1)),
        "out": lambda w: torch.add(w.detach(), 1, out=w),
    }  # fmt: skip
    for change in changes.values():
        with contextlib.suppress(RuntimeError), torch.no_grad():
            try:
                change(weight)
            except MismatchError as error:
                found["refused"].append(str(error))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = weight.abs().sum()
    weight.sum().backward()
    found["grad"] = weight.grad.sum().item()
    optimizer.step()
    found["step"] = (before - weight.abs().sum()).abs().item()
    with torch.no_grad():  # what the refusal proposes
        model.get_parameter("lm_head.weight").zero_()
    found["after"] = weight.abs().sum().item()
    return found


@pytest.mark.parametrize(("variant", "tp_size"), [("llama", 2), ("llama_bias_tied", 4)])
def test_who_reads_the_head_reads_all_of_it(tmp_path: Path, variant: str, tp_size: int) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "model", variant)
    (tmp_path / "plan.json").write_text(compile_plan(folder, tp_size=tp_size).to_json())
    for found in launch(read_by_others, tp_size, tmp_path / "plan.json", folder):
        print(found)
        assert max(found["errors"].values()) < 1e-9, found["errors"]
        assert found["shape"] == (256, 64) and found["dtype"] == "torch.float64"
        assert not found["frozen"] and found["thawed"]
        assert len(found["refused"]) == 5, found["refused"]
        assert all("model.get_parameter('lm_head.weight')" in text for text in found["refused"])
        assert found["grad"] == 256 * 64 and found["step"] > 0 == found["after"], "it follows what it was gathered of"
