"""Dropout and activation checkpointing, where ranks hold their tokens: masks of each rank's own, the same again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

PROBABILITY = 0.3
DROPOUT = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "bloom": ("hidden_dropout", "attention_dropout"),
    "opt": ("dropout", "attention_dropout"),
}
IN_FLOAT64 = ("gpt2", "opt")
"""Models that cast nothing to float32."""
OF_STREAM = 4
"""How often two layers drop out of the sharded stream."""


def prepare(work: Path, names: tuple[str, ...], tp_size: int) -> None:
    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.sequence_parallel import with_sequence_parallel
    from tests.helpers.models import save_checkpoint

    for name in names:
        changes: dict[str, Any] = dict.fromkeys(DROPOUT[name], PROBABILITY)
        folder = save_checkpoint(work / name, name, **changes)
        plan = with_sequence_parallel(compile_plan(folder, tp_size=tp_size))
        (work / f"{name}.json").write_text(plan.to_json())


def load(work: Path, name: str, **options: Any) -> Any:
    import torch

    from autotp_plan.runtime import load_plan

    dtype = torch.float64 if name in IN_FLOAT64 else torch.float32
    options = {"dtype": dtype, "experts_implementation": "eager", "attn_implementation": "eager", **options}
    plan = load_plan(work / f"{name}.json")
    return plan, plan.load_model(work / name, **options).train()


@contextlib.contextmanager
def recorded_masks() -> Iterator[list[Any]]:
    """The masks of every dropout while active."""
    import torch.nn.functional as F

    masks: list[Any] = []
    dropout = F.dropout

    def recording(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        masks.append(dropout(input.new_ones(input.shape), p, training) != 0)
        return input * masks[-1] / (1 - p)

    F.dropout = recording
    try:
        yield masks
    finally:
        F.dropout = dropout


def masks_of(model: Any, seed: int) -> list[Any]:
    import torch

    from tests.helpers.models import batch

    torch.manual_seed(seed)
    with recorded_masks() as masks:
        model(input_ids=batch(1), use_cache=False)
    return masks


@contextlib.contextmanager
def one_stream() -> Iterator[None]:
    """While active, all ranks draw the same numbers for their tokens: a planted error."""
    from autotp_plan.runtime.sequence_parallel import modules
    from autotp_plan.runtime.tensor_parallel import linear
    from autotp_plan.runtime.tensor_parallel.dropout_rng import enter_sharded_region
    from autotp_plan.schemas.upstream import replaced

    def enter(layer: str, tp_rank: int) -> None:
        enter_sharded_region(layer, 0 if layer.endswith(".stream") else tp_rank)

    with replaced(modules, "enter_sharded_region", enter), replaced(linear, "enter_sharded_region", enter):
        yield


def gradients(plan: Any, model: Any, seed: int = 3) -> Any:
    import torch

    from tests.helpers import parity
    from tests.runtime.tensor_parallel.test_selective_checkpointing import in_float64

    torch.manual_seed(seed)
    model.zero_grad()
    names = [parameter.name for parameter in plan.document.expanded()]
    return parity.sharded_gradients(model, names, in_float64, promote=False)


def in_ranks(work: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    import torch

    from tests.helpers import parity

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        plan, model = load(work, name)
        of: dict[str, Any] = {"masks": masks_of(model, 5), "again": masks_of(model, 5), "another": masks_of(model, 6)}
        with one_stream():
            of["planted"] = masks_of(model, 5)
        plain = gradients(plan, model)
        of["same seed"] = max(parity.differences(plain, gradients(plan, model), plan).values())
        of["another seed"] = max(parity.differences(plain, gradients(plan, model, 4), plan).values())
        for reentrant in (True, False):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            again = gradients(plan, model)
            of[f"reentrant {reentrant}"] = max(parity.differences(plain, again, plan).values())
        for kind in ("full", "selective"):
            _, model = load(work, name, activation_checkpointing=kind)
            of[kind] = max(parity.differences(plain, gradients(plan, model), plan).values())
        after = torch.rand(4)
        of["state after"] = after
        found[name] = of
    return found


@pytest.mark.parametrize("names", [("gpt2", "opt"), pytest.param(("bloom",), marks=pytest.mark.slow)])
def test_masks_and_what_is_computed_again(tmp_path: Path, names: tuple[str, ...]) -> None:
    import torch

    prepare(tmp_path, names, 2)
    ranks = launch(in_ranks, 2, tmp_path, names)
    for name in names:
        one, other = (rank[name] for rank in ranks)
        assert all(map(torch.equal, one["masks"], one["again"])), "the same from one seed"
        assert not any(map(torch.equal, one["masks"], one["another"]))
        tokens: list[Any] = []
        planted: list[Any] = []
        for place, (mine, theirs) in enumerate(zip(one["masks"], other["masks"], strict=True)):
            is_stream = mine.dim() < 4 and mine.numel() == 2 * 6 * 64
            if mine.dim() < 4 and not is_stream:
                assert torch.equal(mine, theirs), "what is the same on all ranks has the same mask"
                continue
            alike = (mine == theirs).double().mean()
            expected = (1 - PROBABILITY) ** 2 + PROBABILITY**2
            assert abs(alike - expected) < 0.06, f"{name}: masks must be independent, {alike} of them are equal"
            assert abs(mine.double().mean() - 1 + PROBABILITY) < 0.05
            if is_stream:
                tokens += [*mine.reshape(-1, 64), *theirs.reshape(-1, 64)]
                planted += [row for rank in ranks for row in rank[name]["planted"][place].reshape(-1, 64)]
        assert len(tokens) == OF_STREAM * 2 * 12
        assert len({tuple(token.tolist()) for token in tokens}) == len(tokens), "a mask for each token of each rank"
        assert len({tuple(token.tolist()) for token in planted}) == len(planted) / 2, "a shared stream shows"
        limit = 1e-12 if name in IN_FLOAT64 else 1e-6
        for rank in ranks:
            of = rank[name]
            assert of["same seed"] == 0 and of["another seed"] > 1e-4
            for kind in ("reentrant True", "reentrant False", "full", "selective"):
                assert of[kind] < limit, (name, kind, of[kind])
        assert torch.equal(one["state after"], other["state after"])
