"""What people do with a model in training and beside it, its stream sharded along the sequence: as the dense model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


def prepare(work: Path, *variants: str) -> None:
    import torch

    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.sequence_parallel import with_sequence_parallel
    from tests.helpers.models import save_checkpoint

    for name in variants:
        folder = save_checkpoint(work / name, name, torch.float64)
        (work / f"{name}.json").write_text(with_sequence_parallel(compile_plan(folder, tp_size=2)).to_json())


class Pair:
    """A sharded model and the dense one, with the same seeds."""

    def __init__(self, work: Path, name: str, **options: Any) -> None:
        import torch

        from autotp_plan.runtime import load_plan
        from tests.helpers.models import eager_experts, load_dense

        given: Any = {"dtype": torch.float64, **eager_experts(torch.float64)}
        self.plan = load_plan(work / f"{name}.json")
        self.sharded: Any = self.plan.load_model(work / name, **given, **options).train()
        self.dense: Any = load_dense(work / name, torch.float64, **eager_experts(torch.float64))

    def error(self, run: Callable[[Any], Any], promote: bool = True) -> float:
        """The largest error of what `run` returns for each, and of the gradients that it leaves."""
        import torch

        from autotp_plan.runtime.loading.local_shard import local_shard
        from autotp_plan.runtime.verify.compare import errors
        from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64

        outputs = []
        for model in (self.dense, self.sharded):
            model.zero_grad()
            with PromoteToFloat64() if promote else contextlib.nullcontext():
                outputs.append(run(model))
        names = {name: one.grad for name, one in self.dense.named_parameters() if one.grad is not None}
        mine: Any = {name: local_shard(self.sharded, name, gradient=True) for name in names}
        assert all(one is not None for one in mine.values())
        found = errors({"gradient": names}, {"gradient": mine}, self.plan.document, self.plan.ranks.tp_rank)
        dense, sharded = ([one] if isinstance(one, torch.Tensor) else list(one) for one in outputs)
        assert [one.shape for one in dense] == [one.shape for one in sharded]
        of_outputs = [(one - other).abs().max().item() for one, other in zip(dense, sharded, strict=True)]
        return max([*found["gradient"].values(), *of_outputs])


def trained(length: int = 13, seed: int = 1, **inputs: Any) -> Callable[[Any], Any]:
    """A forward and a backward; `inputs` replace the token ids."""
    import dataclasses

    from tests.helpers.models import batch

    def run(model: Any) -> Any:
        tokens = dataclasses.replace(batch, length=length)(seed)
        given = inputs if {"input_ids", "inputs_embeds"} & inputs.keys() else {"input_ids": tokens, **inputs}
        output = model(**given, labels=given.get("input_ids", tokens), use_cache=False)
        output.loss.backward()
        return output.loss.detach(), output.logits.detach()

    return run


def two_forwards(model: Any) -> Any:
    """Two forwards of different lengths, one without gradients between, and one backward."""
    import dataclasses

    import torch

    from tests.helpers.models import batch

    losses = []
    for seed, length in ((1, 13), (2, 6)):
        tokens = dataclasses.replace(batch, length=length)(seed)
        losses.append(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
        with torch.no_grad():
            logits = model(input_ids=batch(seed + 2), use_cache=False).logits
    sum(losses).backward()
    return [*losses, logits]


def raises(model: Any) -> Any:
    """A forward that fails in the middle, and one that does not."""
    import torch

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    layer = next(one for name, one in model.named_modules() if name.endswith(("layers.1", "h.1")))
    handle = layer.register_forward_pre_hook(fail)
    with contextlib.suppress(RuntimeError):
        trained()(model)
    handle.remove()
    with torch.no_grad():
        alone = layer(torch.ones(2, 5, 64, dtype=torch.float64), position_embeddings=rotary(model, 5))
    return [*trained()(model), alone[0] if isinstance(alone, tuple) else alone]


def rotary(model: Any, length: int) -> Any:
    import torch

    if not hasattr(model, "model"):
        return None
    return model.model.rotary_emb(torch.ones(1, dtype=torch.float64), torch.arange(length)[None])


def padded(side: str) -> dict[str, Any]:
    import torch

    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, (slice(4) if side == "left" else slice(9, None))] = 0
    return {"attention_mask": mask}


def embedded(model: Any) -> Any:
    import torch

    from tests.helpers.models import batch

    embeds = torch.randn(2, 12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    embeds.requires_grad_()
    loss = model(inputs_embeds=embeds, labels=batch(1), use_cache=False).loss
    loss.backward()
    return loss.detach(), embeds.grad


def features_in_place(model: Any) -> Any:
    """Features of an image, written over what was looked up for some tokens."""
    import torch

    from tests.helpers.models import batch

    features = torch.randn(2, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    embeds = model.get_input_embeddings()(batch(1))
    embeds[:, 4:7] = features
    loss = model(inputs_embeds=embeds, labels=batch(1), use_cache=False).loss
    loss.backward()
    return loss.detach(), features.grad


def evaluated(model: Any) -> Any:
    """`generate` and hidden states right after a step of training."""
    import torch

    from tests.helpers.models import batch

    logits = trained()(model)
    tokens = model.generate(batch(5)[:, 1:6], max_new_tokens=6, do_sample=False, attention_mask=torch.ones(2, 5))
    with torch.no_grad():
        states = model(input_ids=batch(2), output_hidden_states=True, use_cache=False).hidden_states
    model.eval()
    in_evaluation = trained(seed=3)(model)
    model.train()
    return [*logits, tokens.double(), *states, *in_evaluation]


def said(function: Callable[[], Any]) -> str:
    from autotp_plan.schemas.errors import MismatchError

    try:
        function()
    except MismatchError as error:
        return str(error)
    return "nothing"


def frozen_below(model: Any) -> Any:
    """A step in which the table and the first layer are not trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in ("embed_tokens", "wte", "wpe", ".0.")))
    found = trained()(model)
    model.requires_grad_(True)
    return found


def twice(model: Any) -> Any:
    """Two backwards of one loss."""
    from tests.helpers.models import batch

    loss = model(input_ids=batch(1), labels=batch(1), use_cache=False).loss
    loss.backward(retain_graph=True)
    loss.backward()
    return loss.detach()


def routed(model: Any) -> Any:
    """With the auxiliary loss of routers, which see all tokens on every rank."""
    from tests.helpers.models import batch

    output = model(input_ids=batch(1), labels=batch(1), output_router_logits=True, use_cache=False)
    output.loss.backward()
    return output.loss.detach(), output.aux_loss.detach()


EVERY: dict[str, Callable[[Any], Any]] = {
    "features in place": features_in_place,
    "two forwards": two_forwards,
    "one that raises": raises,
    "padding left": lambda model: trained(**padded("left"))(model),
    "padding right": lambda model: trained(**padded("right"))(model),
    "packed": lambda model: packed()(model),
    "inputs_embeds": embedded,
    "evaluated": evaluated,
    "frozen below": frozen_below,
    "two backwards": twice,
    "one sequence": lambda model: one_row(model),
}


def one_row(model: Any) -> Any:
    """A batch of one sequence, and one of three tokens."""
    from tests.helpers.models import batch

    losses = [
        model(input_ids=tokens, labels=tokens, use_cache=False).loss for tokens in (batch(1)[:1], batch(2)[:1, :3])
    ]
    sum(losses).backward()
    return [loss.detach() for loss in losses]


def packed() -> Callable[[Any], Any]:
    """Two sequences in each row, which their positions tell apart."""
    import torch

    from tests.helpers.models import batch

    positions = torch.cat((torch.arange(8), torch.arange(5))).expand(2, -1)
    tokens = torch.cat((batch(7), batch(8)), dim=1)[:, :13]
    return trained(input_ids=tokens, position_ids=positions)


def calls(work: Path, variants: tuple[str, ...]) -> dict[str, Any]:
    """Inside a rank: errors, and what is said of hidden states."""

    found: dict[str, Any] = {"said": {}}
    for name in variants:
        pair = Pair(work, name)
        found |= {f"{name}, {what}": pair.error(run) for what, run in EVERY.items()}
        for kind in ("full", "selective"):
            pair = Pair(work, name, activation_checkpointing=kind)
            found[f"{name}, {kind}"] = pair.error(two_forwards, promote=False)
        for reentrant in (True, False):
            pair.sharded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            found[f"{name}, reentrant {reentrant}"] = pair.error(two_forwards, promote=False)
    pair = Pair(work, "mixtral")
    found["router's loss"] = pair.error(routed)
    for again in (None, "full", "selective"):
        pair = Pair(work, "falcon_multi_query", activation_checkpointing=again)
        found[f"a sum changed in place, {again}"] = pair.error(one_row, promote=again is None)
    for name in (*variants, "bloom"):
        found["said"] |= refused(Pair(work, name).sharded, name)
    return found


def refused(model: Any, name: str) -> dict[str, str]:
    from tests.helpers.models import batch

    by_call = said(lambda: model(input_ids=batch(1), output_hidden_states=True))
    model.config.output_hidden_states = True
    by_config = said(lambda: model(input_ids=batch(1)))
    layer = said(lambda: model.get_submodule(LAYER[name])(batch(1)))
    return {name: by_call, f"{name} by its config": by_config, f"{name}, a layer": layer}


LAYER = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "bloom": "transformer.h.1"}


@pytest.mark.parametrize("variants", [("llama",), pytest.param(("gpt2",), marks=pytest.mark.slow)])
def test_what_people_do_is_as_with_the_dense_model(tmp_path: Path, variants: tuple[str, ...]) -> None:
    prepare(tmp_path, *variants, "bloom", "mixtral", "falcon_multi_query")
    for found in launch(calls, 2, tmp_path, variants):
        for what, text in found.pop("said").items():
            if what.endswith("a layer"):
                assert "the layer that shards its sequence was not" in text, (what, text)
            else:
                assert "torch.no_grad()" in text, (what, text)
        assert len(found) == len(EVERY) + 4 + 1 + 3
        computed_again = {what: error for what, error in found.items() if what.endswith(("full", "tive", "True", "se"))}
        assert len(computed_again) == 6 and max(computed_again.values()) < 1e-6, "float32, as in the second forward"
        rest = {what: error for what, error in found.items() if what not in computed_again}
        assert max(rest.values()) < 1e-9, rest
