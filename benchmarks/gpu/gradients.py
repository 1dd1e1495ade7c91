"""Passes of small models on a GPU: losses, logits and gradients; hybrids, dropout and `torch.compile` among them."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.work import (
    Error,
    Found,
    Work,
    absolute,
    batches,
    checkpoint,
    dense,
    planted_in,
    relative,
    sharded,
    spoiled,
)

INFERENCE_SECONDS = 240


def parity(variant: str, work: Work, document: Any = None) -> Found:
    """Loss, logits and every gradient of two passes in float64."""
    from autotp_plan.runtime import TrainingPlan
    from tests.helpers.models import eager_experts

    options = eager_experts(torch.float64)
    if document is None:
        plan, model = sharded(work, variant, dtype=torch.float64, **options)
    else:
        plan = TrainingPlan(document)
        model = planted_in(work, plan.load_model(checkpoint(work, variant), dtype=torch.float64, **options).train())
    return _compare(work, plan, dense(work, variant, torch.float64, **options), model)


def _compare(work: Work, plan: Any, whole: Any, model: Any) -> Found:
    """The largest absolute error of a sharded model's loss, logits and gradients of two passes."""
    from autotp_plan.runtime.verify import compare
    from autotp_plan.runtime.verify.float64_passes import causal_lm, dense_reader, run_passes, shard_reader

    names = [name for name, _ in whole.named_parameters()]
    expected = run_passes(whole, dense_reader(whole), names, batches(work), forward=causal_lm)
    found = run_passes(model, shard_reader(model), list(expected["gradient"]), batches(work), forward=causal_lm)

    def largest(numbers: Any) -> float:
        errors = compare.errors(expected, numbers, plan.document, plan.ranks.tp_rank, compare.absolute_error)
        return max(max(of_kind.values()) for of_kind in errors.values())

    wrong = {**found, "gradient": spoiled(found["gradient"], min(found["gradient"]))}
    error = Error(worst=largest(found), planted=largest(wrong))
    return error.found(numbers=sum(map(len, expected.values())))


def hybrid(family: str, work: Work) -> Found:
    """As `parity`, of a model whose mixers are not attention, by rules that were inferred."""
    from transformers import AutoModelForCausalLM

    from autotp_plan.runtime.verify.float64_passes import EXPERTS

    plan, folder = inferred(work, family)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **EXPERTS).to(work.device).train()
    model = planted_in(work, plan.load_model(folder, dtype=torch.float64, **EXPERTS).train())
    return _compare(work, plan, whole, model)


def hybrid_kernels(work: Work) -> Found:
    """Loss and gradient norm in bfloat16 with the kernels that are installed; float64 has none."""
    import importlib.util

    from transformers import AutoModelForCausalLM

    plan, folder = inferred(work, "qwen3_next")
    tokens = batches(work)(0)
    found = []
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(work.device)
    for model in (whole.train(), plan.load_model(folder, dtype=torch.bfloat16).train()):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append([loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()])
    error = relative(found[1], found[0], planted=0.1)
    return error.found(**{"flash-linear-attention": importlib.util.find_spec("fla") is not None})


def inferred(work: Work, family: str) -> tuple[Any, Path]:
    """A plan of a small hybrid by the rules that `benchmarks.gpu.hybrids` infers meanwhile, and its checkpoint."""
    from autotp_plan.planner import SpecFile, compile_plan
    from autotp_plan.runtime import TrainingPlan

    def write(path: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        from autotp_plan.runtime.verify.random_inputs import randomise
        from tests.helpers.mixers import mixer_folder

        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(mixer_folder(path, family)), dtype=torch.float32
        )
        randomise(model)
        model.save_pretrained(path)

    folder = work.once(f"hybrid-{family}", write)
    rules = work.folder / f"{family}.spec.json"
    deadline = time.monotonic() + INFERENCE_SECONDS
    while not rules.exists():
        log = work.folder / f"{family}.log"
        assert time.monotonic() < deadline, f"the rules of {family} were not inferred: {log.read_text()[-2000:]}"
        time.sleep(0.5)
    document = compile_plan(folder, tp_size=dist.get_world_size(), preset="none", specs=[SpecFile.read(rules)])
    return TrainingPlan(document), folder


def planted(work: Work) -> Found:
    """A plan that is wrong on purpose is far from the unsharded model: gradients of norms are not summed."""
    from autotp_plan.planner import compile_plan

    document = compile_plan(checkpoint(work, "qwen3"), tp_size=dist.get_world_size())
    forgotten = tuple(dataclasses.replace(entry, partial_gradient=False) for entry in document.parameters)
    error = parity("qwen3", work, dataclasses.replace(document, parameters=forgotten)).worst
    assert error is not None and error > 1e-3, f"a wrong plan went unnoticed: its largest error is {error}"
    return Found(figures={"found": error})


def dropout(work: Work) -> Found:
    """Both ranks drop the same activations, and recomputed activations have the same masks."""
    tokens = batches(work)(0)
    _, model = sharded(work, "gpt2", changes={"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2})
    losses: list[float] = []
    gradients: list[dict[str, torch.Tensor]] = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(_gradients(model))
        model.zero_grad()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, losses[0])
    assert both[0] == both[1], f"the ranks have different losses: {both}"
    return _scaled(gradients[1], gradients[0]).found(loss=losses[0])


def compiled(variant: str, work: Work) -> Found:
    """`torch.compile` by inductor, against eager, in float32."""
    tokens = batches(work)(0)
    _, model = sharded(work, variant)
    found = []
    for step in (model, torch.compile(model)):
        loss = step(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append({"loss": loss.detach(), **_gradients(model)})
        model.zero_grad()
    return _scaled(found[1], found[0]).found()


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def _scaled(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Error:
    """The largest error of tensors by name, each relative to the tensor's largest element."""
    scales = {name: value.abs().max() for name, value in expected.items()}
    return absolute(*({name: value / scales[name] for name, value in of.items()} for of in (found, expected)))
