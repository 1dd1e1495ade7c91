"""LoRA on a model whose stream is sharded along the sequence: the gradients and losses of the unsharded adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "out_proj", "fc1", "fc2"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"],
    "qwen2_moe": "all-linear",
}
"""Projections in blocks, in the layer itself, of latent attention, and beside experts."""


def gradients(model: Any, adapter: dict[str, Any]) -> dict[str, Any]:
    """The loss, and the gradient of each factor of the adapter after two batches."""
    import dataclasses

    from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64
    from tests.helpers.models import batch

    losses = []
    for seed, length in ((1, 13), (2, 12)):
        tokens = dataclasses.replace(batch, length=length)(seed)
        with PromoteToFloat64():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
    prefix = "base_model.model."  # a copy is one of the model inside
    named = {prefix + name.removeprefix(prefix): parameter for name, parameter in model.named_parameters()}
    return {"losses": losses, **{name: named[name].grad.clone() for name in adapter}}


def in_ranks(work: Path, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    import copy

    import torch
    from peft import get_peft_model

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.tensor_parallel.collectives import take
    from tests.helpers.models import eager_experts, load_dense
    from tests.runtime.integrations.test_lora import lora_config

    warnings.simplefilter("ignore")
    found: dict[str, dict[str, float]] = {}
    options: Any = eager_experts(torch.float64)
    for name in names:
        targets = TARGETS[name]
        dense = get_peft_model(load_dense(work / name, torch.float64, **options), lora_config(target_modules=targets))
        dense.double().train()
        weights: dict[str, Any] = {}
        for key, parameter in dense.named_parameters():
            if parameter.requires_grad:
                numbers = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(weights)))
                parameter.data = weights[key] = numbers.double() * 0.2
        expected = gradients(dense, weights)
        plan = load_plan(work / f"{name}.json")
        sharded = plan.load_model(work / name, dtype=torch.float64, **options).train()
        model: Any = plan.add_lora(sharded, lora_config(target_modules=targets)).double()
        cuts: dict[str, Any] = {}
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                owner = model.get_submodule(key.rpartition(".")[0])
                layout = owner.shards.layouts["weight"] if hasattr(owner, "shards") else None
                cuts[key] = None if layout is None else (layout.intervals[plan.ranks.tp_rank], layout.dim)
                parameter.data = weights[key].clone() if layout is None else take(weights[key], *cuts[key])
        assert cuts.keys() == weights.keys()

        def errors(adapted: Any, expected: Any = expected, cuts: Any = cuts) -> dict[str, float]:
            of = gradients(adapted, cuts)
            adapted.zero_grad()
            losses = zip(of["losses"], expected["losses"], strict=True)
            return {"loss": max(float((a - b).abs()) for a, b in losses)} | {
                key: (of[key] - (expected[key] if cut is None else take(expected[key], *cut))).abs().max().item()
                for key, cut in cuts.items()
            }

        found[name] = errors(model)
        found[f"{name}, a copy"] = errors(copy.deepcopy(model))
        for module in model.modules():
            if getattr(module, "tp_sums_gradients", False):
                module.weight = torch.nn.Parameter(module.weight.detach().clone())
        found[f"{name}, planted"] = errors(model)
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "names", [("llama", "opt"), pytest.param(("deepseek_v3", "qwen2_moe"), marks=pytest.mark.slow)]
)
def test_gradients_of_adapters_are_the_unsharded_ones(tmp_path: Path, names: tuple[str, ...]) -> None:
    pytest.importorskip("peft")
    import torch

    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.sequence_parallel import with_sequence_parallel
    from tests.helpers.models import save_checkpoint

    for name in names:
        folder = save_checkpoint(tmp_path / name, name, torch.float64)
        (tmp_path / f"{name}.json").write_text(with_sequence_parallel(compile_plan(folder, tp_size=2)).to_json())
    for found in launch(in_ranks, 2, tmp_path, names):
        for case, errors in found.items():
            wrong = {key for key, error in errors.items() if error > 1e-9}
            if case.endswith("planted"):
                assert wrong and all("lora_B" in key for key in wrong), "gradients of a part of the tokens show"
            else:
                assert not wrong, case
