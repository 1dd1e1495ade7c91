"""Three ranks of jobs of 1024: what they hold, whom they talk to and what a step costs, beside sums made by hand.

What is expected comes from config.json and from what the architecture computes, not from a plan or from a run.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile
from benchmarks.scale import BASE, measure, sweeps
from benchmarks.scale_report import rows
from tests.helpers.launch import launch
from tests.helpers.paths import PLANS, ROOT

TP, DP, LENGTH = 8, 128, 2048
RANKS = (0, 515, 1023)  # TP rank 0 of DP rank 0, 3 of 64, 7 of 127
BF16, FLOAT32 = 2, 4

Facts = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


def run_a_rank(plan_file: Path) -> Facts:
    """One of `RANKS`: its shards, its groups, its step, and the collectives of a forward alone."""
    import torch
    from torch import distributed as dist

    from autotp_plan.runtime.estimate.fake_internals import Watch
    from autotp_plan.runtime.estimate.fake_rank import fake_rank
    from autotp_plan.runtime.estimate.training_step import Batch, run_step

    rank = RANKS[int(os.environ["RANK"])]
    if dist.is_initialized():
        dist.destroy_process_group()  # the one that the launch has made, for that of 1024 ranks
    model, ranks, mode = fake_rank(Plan.read(plan_file), rank, DP, torch.bfloat16)
    step = run_step(model, ranks, mode, Batch(sequences=1, length=LENGTH), activation_checkpointing=None)
    in_forward: Counter[int] = Counter()
    with mode, torch.no_grad(), Watch(lambda _, __, size: in_forward.update([size])):
        tokens = torch.zeros(1, LENGTH, dtype=torch.long, device=ranks.device)
        model(input_ids=tokens, labels=tokens, use_cache=False)
    return {
        "tensor-parallel group": dist.get_process_group_ranks(ranks.tp_group),
        "data-parallel group": dist.get_process_group_ranks(ranks.dp_group),
        "words": model.get_input_embeddings().held,
        "shapes": {name: tuple(one.shape) for name, one in model.named_parameters()},
        "bytes": step.parameters,
        "gradients": step.backward[-1][0],
        "kinds": {(one.operation, one.group) for one in step.collectives},
        "sums of the forward": dict(in_forward),
        "sums": {one.tensor_bytes: one.count for one in step.collectives},
        "forward operations": step.forward_operations,
        "backward operations": step.backward_operations,
    }


def expected(
    rank: int, config: dict[str, Any], shapes: Shapes, products: int, attention: tuple[int, int],
    forward: dict[int, int], backward: dict[int, int],
) -> Facts:  # fmt: skip
    """What `run_a_rank` is to find.

    Args:
        rank: of the 1024.
        config: config.json.
        shapes: of the weights of layers, by name.
        products: multiplications by weights that the rank makes for each token.
        attention: rows of queries and keys, and of values, of the rank's heads in all layers.
        forward: numbers of sums in the forward, by bytes, without those of the embedding and the loss.
        backward: the same of the backward, without that of the head.
    """
    first, hidden, words = rank // TP * TP, config["hidden_size"], config["vocab_size"] // TP
    vocabulary = {f"{name}.weight": (words, hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes = {**shapes, **vocabulary, "model.norm.weight": (hidden,)}
    residual = LENGTH * hidden * BF16
    # the embedding's parts; of each token the largest logit, then the sum of exponentials and the label's logit
    in_forward = Counter(forward) + Counter({residual: 1, LENGTH * FLOAT32: 1, 2 * LENGTH * FLOAT32: 1})
    products += words * hidden
    queries, values = attention
    # products with the weights' gradients and the inputs'; of attention four, and scores again where they are not kept
    scores = 2 * LENGTH * LENGTH
    in_backward = {4 * LENGTH * products + scores * (n * queries + 2 * values) for n in (2, 3)}
    size = BF16 * sum(map(math.prod, shapes.values()))
    return {
        "tensor-parallel group": list(range(first, first + TP)),
        "data-parallel group": list(range(rank % TP, TP * DP, TP)),
        "words": ((rank % TP * words, (rank % TP + 1) * words),),
        "shapes": shapes,
        "bytes": size,
        "gradients": size,
        "kinds": {("allreduce_", "tensor")},
        "sums of the forward": dict(in_forward),
        "sums": dict(in_forward + Counter(backward) + Counter({residual: 1})),
        "forward operations": 2 * LENGTH * products + scores * (queries + values),
        "backward operations": frozenset(in_backward),
    }


def differing(found: Facts, wanted: Facts) -> set[str]:
    """The facts that are not as expected. Of a set of numbers one is."""
    assert found.keys() == wanted.keys()
    return {
        name
        for name, value in wanted.items()
        if (found[name] not in value if isinstance(value, frozenset) else found[name] != value)
    }


def llama(config: dict[str, Any], rank: int) -> Facts:
    """Sums: after attention and after the MLP, and in the backward before each."""
    layers, hidden, intermediate = (
        config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )  # fmt: skip
    head = hidden // config["num_attention_heads"]
    queries, keys = hidden // TP, config["num_key_value_heads"] // TP * head
    layer = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (intermediate // TP, hidden),
        "mlp.up_proj": (intermediate // TP, hidden), "mlp.down_proj": (hidden, intermediate // TP),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    products = sum(math.prod(shape) for shape in layer.values() if len(shape) == 2)
    sums = {LENGTH * hidden * BF16: 2 * layers}
    shapes = in_layers(layer, range(layers))
    return expected(rank, config, shapes, layers * products, (layers * queries, layers * queries), sums, sums)


def in_layers(layer: Shapes, layers: range) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{number}.{name}.weight": shape for number in layers for name, shape in layer.items()}


def deepseek(config: dict[str, Any], rank: int) -> Facts:
    """Sums: after attention, after an MLP, after experts and after the shared one.

    Latents, rotary keys and routers are replicated: in the backward the gradients of latents and rotary keys are summed
    in attention, those of the chosen experts' weights in front of the experts.
    """
    layers, dense, hidden = (config[key] for key in ("num_hidden_layers", "first_k_dense_replace", "hidden_size"))
    moe, heads, chosen = layers - dense, config["num_attention_heads"] // TP, config["num_experts_per_tok"]
    plain, rotary, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    of_queries, of_keys, experts = config["q_lora_rank"], config["kv_lora_rank"], config["n_routed_experts"]
    expert, intermediate = config["moe_intermediate_size"] // TP, config["intermediate_size"] // TP
    attention = {
        "self_attn.q_a_proj": (of_queries, hidden), "self_attn.q_b_proj": (heads * (plain + rotary), of_queries),
        "self_attn.kv_a_proj_with_mqa": (of_keys + rotary, hidden),
        "self_attn.kv_b_proj": (heads * (plain + value), of_keys), "self_attn.o_proj": (hidden, heads * value),
    }  # fmt: skip
    norms = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_a_layernorm": (of_queries,), "self_attn.kv_a_layernorm": (of_keys,),
    }  # fmt: skip
    mlp = {
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    shared = {
        "mlp.shared_experts.gate_proj": (expert, hidden), "mlp.shared_experts.up_proj": (expert, hidden),
        "mlp.shared_experts.down_proj": (hidden, expert), "mlp.gate": (experts, hidden),
    }  # fmt: skip
    shapes = {
        **in_layers({**attention, **norms}, range(layers)),
        **in_layers(mlp, range(dense)),
        **in_layers(shared, range(dense, layers)),
    }
    for number in range(dense, layers):
        prefix = f"model.layers.{number}.mlp.experts"
        shapes[f"{prefix}.gate_up_proj"] = (experts, 2 * expert, hidden)
        shapes[f"{prefix}.down_proj"] = (experts, hidden, expert)

    def multiplied(weights: Shapes) -> int:
        return sum(map(math.prod, weights.values()))

    products = (
        layers * multiplied(attention)
        + dense * multiplied(mlp)
        + moe * (multiplied(shared) + chosen * 3 * expert * hidden)
    )
    residual, token = LENGTH * hidden * BF16, LENGTH * BF16
    return expected(
        rank, config, shapes, products, (layers * heads * (plain + rotary), layers * heads * value),
        {residual: layers + dense + 2 * moe},
        {
            residual: dense + 2 * moe, LENGTH * chosen * FLOAT32: moe,
            token * of_queries: layers, token * of_keys: layers, token * rotary: layers,
        },
    )  # fmt: skip


def config_of(model: str) -> dict[str, Any]:
    return dict(json.loads((PLANS / model / "config.json").read_text()))


def test_llama_405b() -> None:
    config = config_of("llama_3_1_405b")
    for rank, found in zip(RANKS, launch(run_a_rank, len(RANKS), PLANS / "llama_3_1_405b" / "tp8.json")):
        assert not differing(found, llama(config, rank))


@pytest.mark.parametrize("layers", [3, pytest.param(61, marks=pytest.mark.slow)])
def test_deepseek_v3(tmp_path: Path, layers: int) -> None:
    config = config_of("deepseek_v3")
    plan_file = PLANS / "deepseek_v3" / "tp8.json"
    if layers < config["num_hidden_layers"]:
        config.update(num_hidden_layers=layers, first_k_dense_replace=1)
        (tmp_path / "config.json").write_text(json.dumps(config))
        plan_file = tmp_path / "plan.json"
        plan_file.write_text(compile_plan(tmp_path, tp_size=TP).to_json())
    for rank, found in zip(RANKS, launch(run_a_rank, len(RANKS), plan_file)):
        assert not differing(found, deepseek(config, rank))


def test_a_layer_that_is_sharded_otherwise_is_seen(tmp_path: Path) -> None:
    """The MLP of one layer, replicated: two sums less, and a rank does what eight did."""
    config = {**config_of("llama_3_1_405b"), "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    replicated = {"layer_specs": [{"patterns": [r"model\.layers\.1\.mlp\."], "partition_type": "skip"}]}
    plan = compile_plan(tmp_path, tp_size=TP, specs=[SpecFile.from_dict(replicated)])
    (tmp_path / "plan.json").write_text(plan.to_json())
    (found,) = launch(run_a_rank, 1, tmp_path / "plan.json")
    wanted = llama(config, 0)
    sums = ("sums of the forward", "sums")
    assert differing(found, wanted) == {
        *sums,
        "shapes",
        "bytes",
        "gradients",
        "forward operations",
        "backward operations",
    }
    residual = LENGTH * config["hidden_size"] * BF16
    assert [wanted[name][residual] - found[name][residual] for name in sums] == [1, 2]
    mlp = 3 * config["hidden_size"] * config["intermediate_size"]
    assert found["forward operations"] - wanted["forward operations"] == 2 * LENGTH * mlp * (TP - 1) // TP


def test_a_row_of_the_page_is_measured_again() -> None:
    """What depends on no kernel, with a quarter of the layers."""
    setting = sweeps(BASE["llama"])["layers"][0]
    (found,) = launch(measure, 1, "llama", setting)
    published = rows(json.loads((ROOT / "docs" / "scale.json").read_text()), "llama", "layers")[0]
    exact = ("weights", "forward_operations", "backward_operations", "collectives", "collective_bytes", "kinds")
    assert {name: found[name] for name in exact} == {name: published[name] for name in exact}
