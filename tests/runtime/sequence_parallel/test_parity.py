"""A model whose stream is sharded along the sequence is the dense one: loss, logits, every gradient, accumulated ones,
and parameters after optimizer steps, for lengths that the number of ranks divides and for others. Errors are caught.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import Plan
from tests.helpers.launch import launch
from tests.helpers.models import PRESET_VARIANTS
from tests.helpers.sequences import Lengths, errors, read, save_case, write

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QUICK = ("llama", "gpt2", "mixtral", "bloom", "deepseek_v3")
"""Biases and transposed weights, experts, latent attention."""
LENGTHS = Lengths((12, 13, 3))
"""13 is uneven on 2 ranks and 4, and of 3 tokens the last of 4 ranks holds none."""
EVEN = Lengths((12, 4))
"""Of a planted error both ranks see the same: else one would wait for the other in a collective."""
TOLERANCE = 1e-9


def summed(*endings: str, partial: bool = False) -> Callable[[Plan], Plan]:
    """Parameters whose gradients are summed over the ranks, or are not."""

    def change(plan: Plan) -> Plan:
        changed = tuple(
            dataclasses.replace(one, partial_gradient=partial) if one.name.endswith(endings) else one
            for one in plan.parameters
        )
        assert changed != plan.parameters
        return dataclasses.replace(plan, parameters=changed)

    return change


def places(**changes: Callable[[Any], Any]) -> Callable[[Plan], Plan]:
    """Other places where the stream is scattered, gathered, or ends."""

    def change(plan: Plan) -> Plan:
        stream = plan.sequence_parallel
        assert stream is not None
        changed = dataclasses.replace(stream, **{key: of(getattr(stream, key)) for key, of in changes.items()})
        assert changed != stream
        return dataclasses.replace(plan, sequence_parallel=changed)

    return change


def without(ending: str) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    return lambda names: tuple(name for name in names if not name.endswith(ending))


OTHER_LENGTH = "MismatchError: a module of the sharded stream has another number of tokens"
SIZES = "RuntimeError: The size of tensor"
PLANTED: dict[str, tuple[str, Callable[[Plan], Plan], str]] = {
    "a norm's gradient is not summed": (
        "llama", summed("input_layernorm.weight"), "gradient model.layers.1.input_layernorm.weight",
    ),
    "the last norm's gradient is not summed": (
        "llama", summed("model.norm.weight"), "gradient model.norm.weight",
    ),
    "the bias of a row-parallel layer is not summed": (
        "gpt2", summed("attn.c_proj.bias"), "gradient transformer.h.0.attn.c_proj.bias",
    ),
    "the gradient of a router is summed": (
        "mixtral", summed("mlp.gate.weight", partial=True), "gradient model.layers.0.mlp.gate.weight",
    ),
    "the sum of attention has all tokens": ("llama", places(scatter=without("o_proj")), SIZES),
    "the sum of experts has all tokens": ("mixtral", places(scatter=without("mlp")), SIZES),
    "scattered twice": (
        "llama", places(scatter=lambda names: (*names, "model.layers.{0..1}.self_attn")), OTHER_LENGTH,
    ),
    "attention is given a part": ("llama", places(gather=without("self_attn")), SIZES),
    "an MLP is given a part": ("llama", places(gather=without("mlp")), OTHER_LENGTH),
    "a router and experts are given a part": ("mixtral", places(gather=without("mlp")), OTHER_LENGTH),
    "ends before the last norm": (
        "llama", places(end=lambda name: "model.layers.1"), "gradient model.norm.weight",
    ),
    "ends after the first layer": (
        "llama", places(end=lambda name: "model.layers.0"), "MismatchError: a layer is called",
    ),
    "begins at the second layer": (
        "llama", places(layers=lambda names: ("model.layers.1",)), "gradient model.layers.0.input_layernorm.weight",
    ),
}  # fmt: skip
"""The model, what is changed, and where it shows."""


@contextlib.contextmanager
def tokens_in_other_places() -> Iterator[None]:
    """While active, each rank begins with its tokens in reverse."""
    from autotp_plan.runtime.sequence_parallel.stream import Stream
    from autotp_plan.schemas.upstream import replaced

    begin = Stream.begin

    def reversed_begin(stream: Any, hidden: Any) -> Any:
        return begin(stream, hidden).flip(1)

    with replaced(Stream, "begin", reversed_begin):
        yield


@contextlib.contextmanager
def gradients_of_this_rank_alone() -> Iterator[None]:
    """While active, a gathered tensor's gradient is taken for the same on every rank."""
    from autotp_plan.runtime.sequence_parallel import collectives
    from autotp_plan.runtime.tensor_parallel.collectives import take
    from autotp_plan.schemas.upstream import replaced

    def alone(part: Any, group: Any, tokens: Any, tp_rank: int) -> Any:
        return take(part, (tokens[tp_rank],), 1)

    backward = collectives._Gather.backward

    def without_sum(ctx: Any, *grads: Any) -> Any:
        with replaced(collectives, "reduce_scattered", alone):
            return backward(ctx, *grads)

    with replaced(collectives._Gather, "backward", staticmethod(without_sum)):
        yield


IN_CODE = {
    tokens_in_other_places: "logits pass 1",
    gradients_of_this_rank_alone: "gradient model.layers.0.self_attn.q_proj.weight",
}


def in_ranks(work: Path, cases: dict[str, str], planted: dict[str, str], tp_size: int) -> dict[str, dict[str, float]]:
    found = {**errors(work, cases, tp_size, LENGTHS), **errors(work, planted, tp_size, EVEN)}
    for error in IN_CODE if planted else ():
        with error():
            found[error.__name__] = errors(work, {"llama": "llama"}, tp_size, EVEN)["llama"]
    return found


def wrong(of: dict[str, float]) -> list[str]:
    return [name for name, error in of.items() if error > TOLERANCE]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """On each of two ranks the wrong numbers of every quick variant and planted error."""
    work = tmp_path_factory.mktemp("sequences")
    of_planted = {variant for variant, _, _ in PLANTED.values()}
    for variant in QUICK:
        save_case(work, variant, (2,), LENGTHS, *([EVEN] if variant in of_planted else []))
    for case, (variant, change, _) in PLANTED.items():
        write(work, case, 2, change(read(work, variant, 2)))
    cases = {variant: variant for variant in QUICK}
    ranks = launch(in_ranks, 2, work, cases, {case: variant for case, (variant, _, _) in PLANTED.items()}, 2)
    return [{case: wrong(of) for case, of in rank.items()} for rank in ranks]


@pytest.mark.parametrize("variant", QUICK)
def test_every_number_is_the_dense_models(found: list[dict[str, list[str]]], variant: str) -> None:
    assert [rank[variant] for rank in found] == [[], []]


SHOWN = {
    **{case: shown for case, (_, _, shown) in PLANTED.items()},
    **{error.__name__: shown for error, shown in IN_CODE.items()},
}


@pytest.mark.parametrize("case", list(SHOWN))
def test_a_planted_error_is_caught(found: list[dict[str, list[str]]], case: str) -> None:
    for rank in found:
        assert any(name.startswith(SHOWN[case]) for name in rank[case]), rank[case][:5]
        assert SHOWN[case].startswith("logits") or "logits pass 1" not in rank[case]


SWEEP = (pytest.mark.sweep, pytest.mark.slow)


@pytest.mark.parametrize(
    ("variants", "tp_size"),
    [
        pytest.param(("llama",), 4, id="tp4"),
        pytest.param(tuple(PRESET_VARIANTS), 2, id="every-preset-tp2", marks=SWEEP),
        pytest.param(tuple(PRESET_VARIANTS), 4, id="every-preset-tp4", marks=SWEEP),
    ],
)
def test_every_number_of_other_models_is_the_dense_models(
    tmp_path: Path, variants: tuple[str, ...], tp_size: int
) -> None:
    for variant in variants:
        save_case(tmp_path, variant, (tp_size,), LENGTHS)
    for of_rank in launch(in_ranks, tp_size, tmp_path, {variant: variant for variant in variants}, {}, tp_size):
        assert of_rank.keys() == set(variants)
        assert not {variant: wrong(of) for variant, of in of_rank.items() if wrong(of)}


def test_batches_of_a_proof_are_of_uneven_lengths() -> None:
    from autotp_plan.factories import example_batch
    from autotp_plan.runtime.verify.random_inputs import Batches

    batches = Batches(vocab_size=9, length=12, padding=None, uneven=True)
    assert [batches(seed).shape[1] for seed in (1, 2, 3)] == [11, 12, 11]
    own = example_batch.Batches(ids="ids", labels=(), words=9, length=12, uneven=True)
    assert [own(seed).kwargs["ids"].shape[1] for seed in (1, 2, 3)] == [11, 12, 11]
