"""What training adds to a forward and a backward: dropout, recomputed activations, the routers' auxiliary loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

DROPOUT = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.2, "attention_dropout": 0.0},
    "bloom": {"hidden_dropout": 0.2, "attention_dropout": 0.0},
}
"""Families with dropout on activations that every rank has whole, and the setting of it alone."""
SHARDED = {
    "gpt2": "attn_pdrop",
    "opt": "attention_dropout",
    "llama": "attention_dropout",
    "mixtral": "attention_dropout",
}
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "dbrx")
CHECKPOINTED = ("gpt2", "llama", "mixtral", "gpt_oss", "deepseek_v2", "bloom")
TOLERANCE = 1e-9


def prepare(work: Path, name: str, variant: str, **changes: Any) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(work / name, variant, **changes)
    (work / f"{name}.json").write_text(compile_plan(folder, tp_size=2).to_json())
    return folder


def load(work: Path, name: str, **options: Any) -> Any:
    import torch

    options = {"dtype": torch.float64, **options}
    from autotp_plan.runtime import load_plan

    plan = load_plan(work / f"{name}.json")
    model = plan.load_model(work / name, experts_implementation="eager", **options)
    return plan, model.train()


def seeded(seed: int, function: Any, *arguments: Any) -> Any:
    import torch

    torch.manual_seed(seed)
    return function(*arguments)


def draws(model: Any, leaves: tuple[str, ...]) -> Any:
    """Make a dense model draw where a sharded one draws the seed of a cut region: after these layers."""
    import torch

    for name, module in model.named_modules():
        if name.endswith(leaves):
            module.register_forward_hook(lambda *_: torch.randint(2**62, ()) and None)
    return model


REGIONS = {"gpt2": (".c_attn", ".c_fc"), "opt": (".q_proj", ".fc1"), "bloom": (".query_key_value", ".dense_h_to_4h")}
"""The first column-parallel layers of each pair, after which a rank leaves the common stream."""


def whole_dropout(work: Path) -> dict[str, float]:
    """Inside a rank: errors against the dense model with the same masks."""
    import torch

    from tests.helpers import parity

    found = {}
    for name in DROPOUT:
        plan, model = load(work, name)
        errors = seeded(7, parity.errors_against, torch.load(work / f"{name}.dense"), model, plan)
        found[name] = max(errors.values())
    return found


def test_dropout_of_replicated_activations_has_the_dense_models_masks(tmp_path: Path) -> None:
    import torch

    from tests.helpers import parity
    from tests.helpers.models import load_dense

    for name, changes in DROPOUT.items():
        folder = prepare(tmp_path, name, name, **changes)
        dense = draws(load_dense(folder, torch.float64), REGIONS[name])
        without = parity.gradients(load_dense(folder, torch.float64).eval())
        torch.save(seeded(7, parity.gradients, dense), tmp_path / f"{name}.dense")
        logits = torch.load(tmp_path / f"{name}.dense")["logits"]["pass 1"]
        assert (logits - without["logits"]["pass 1"]).abs().max() > 0.1
    for found in launch(whole_dropout, 2, tmp_path, timeout=120):
        assert all(error < TOLERANCE for error in found.values()), found


def sharded_dropout(work: Path) -> dict[str, dict[str, Any]]:
    """Inside a rank: logits with seeds 1, 1 and 2, and which attention probabilities of the first layer were kept."""
    import torch.nn.functional as F

    from tests.helpers.models import batch

    found = {}
    dropout = F.dropout
    for name in SHARDED:
        _, model = load(work, name, attn_implementation="eager")
        kept: list[Any] = []

        def recording(input: Any, *args: Any, kept: list[Any] = kept, **kwargs: Any) -> Any:
            output = dropout(input, *args, **kwargs)
            if input.dim() == 4:
                kept.append((output != 0).clone())
            return output

        F.dropout = recording
        try:
            logits = [seeded(seed, model, batch(1)).logits.detach() for seed in (1, 1, 2)]
        finally:
            F.dropout = dropout
        layers = len(kept) // 3
        found[name] = {"logits": logits, "first": kept[0], "again": kept[layers], "second layer": kept[1]}
    return found


def test_dropout_of_sharded_activations_differs_between_ranks(tmp_path: Path) -> None:
    import torch

    for name, key in SHARDED.items():
        prepare(tmp_path, name, name, **{key: 0.5})
    one, other = launch(sharded_dropout, 2, tmp_path, timeout=120)
    for name in SHARDED:
        first, again, another = one[name]["logits"]
        assert torch.equal(first, again), "reproducible from one seed"
        assert not torch.allclose(first, another), "another seed, other masks"
        for mine, theirs in zip(one[name]["logits"], other[name]["logits"]):
            assert torch.equal(mine, theirs), "what is whole is the same on every rank"
        causal = torch.ones(first.shape[1], first.shape[1]).tril().bool().expand_as(one[name]["first"])
        for a, b in (("first", one[name]["second layer"]), ("first", other[name]["first"])):
            alike = (one[name][a] == b)[causal].double().mean()
            assert 0.35 < alike < 0.65, f"{name}: masks must be independent, {alike} are alike"
        assert torch.equal(one[name]["first"], one[name]["again"])


def seeds_apart(work: Path) -> str:
    """Inside a rank: what a forward says when each rank seeded itself differently after loading."""
    import torch.distributed as dist

    from autotp_plan.schemas.errors import MismatchError
    from tests.helpers.models import batch

    _, model = load(work, "gpt2")
    try:
        seeded(dist.get_rank(), model, batch(1))
    except MismatchError as error:
        return str(error)
    return "nothing"


def test_tp_ranks_with_different_seeds_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, "gpt2", "gpt2", resid_pdrop=0.1)
    for said in launch(seeds_apart, 2, tmp_path, timeout=60):
        assert "seed by plan.ranks.dp_rank" in said


def recomputed(work: Path) -> dict[str, float]:
    """Inside a rank: the largest difference that recomputing activations makes, with dropout on.

    In float32: arithmetic that is kept in float64 is not, when autograd recomputes it.
    """
    import torch

    from tests.helpers import parity

    found = {}
    for name in CHECKPOINTED:
        plan, model = load(work, name, dtype=torch.float32)
        names = [parameter.name for parameter in plan.document.expanded()]
        gradients = partial(parity.sharded_gradients, model, names, promote=False)
        plain = seeded(3, gradients)
        for reentrant in (True, False):
            model.zero_grad()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            again = seeded(3, gradients)
            found[f"{name}, reentrant {reentrant}"] = max(parity.differences(plain, again, plan).values())
    return found


def test_recomputed_activations_have_the_same_masks(tmp_path: Path) -> None:
    for name in CHECKPOINTED:
        keys = {"gpt2": ("resid_pdrop", "attn_pdrop"), "bloom": ("hidden_dropout", "attention_dropout")}
        prepare(tmp_path, name, name, **dict.fromkeys(keys.get(name, ("attention_dropout",)), 0.3))
    for found in launch(recomputed, 2, tmp_path, timeout=200):
        assert len(found) == 2 * len(CHECKPOINTED)
        assert all(error < 1e-6 for error in found.values()), found


def routed(work: Path) -> dict[str, float]:
    """Inside a rank: errors against the dense model, the auxiliary loss in both."""
    import torch

    from tests.helpers import parity

    found = {}
    for name in ROUTED:
        plan, model = load(work, name)
        errors = parity.errors_against(torch.load(work / f"{name}.dense"), model, plan)
        found[name] = max(errors.values())
    return found


def test_the_auxiliary_loss_of_routers_is_the_dense_models(tmp_path: Path) -> None:
    import torch

    from tests.helpers import parity
    from tests.helpers.models import load_dense

    for name in ROUTED:
        folder = prepare(tmp_path, name, name, output_router_logits=True, router_aux_loss_coef=0.5)
        dense: Any = load_dense(folder, torch.float64, experts_implementation="eager")
        torch.save(parity.gradients(dense), tmp_path / f"{name}.dense")
        dense.config.output_router_logits = False
        loss = parity.gradients(dense)["loss"]["pass 1"]
        assert (torch.load(tmp_path / f"{name}.dense")["loss"]["pass 1"] - loss).abs() > 1e-3, (
            "the auxiliary loss counts"
        )
    for found in launch(routed, 2, tmp_path, timeout=120):
        assert all(error < TOLERANCE for error in found.values()), found
