"""Vision-language models with images: trained from shards as the dense model is, the vision tower's gradients too."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.planner.fallback import vision_tower
from autotp_plan.planner.shards.presplit import presplit
from autotp_plan.runtime.verify.run import try_plan, verify_plan
from autotp_plan.schemas.errors import CompileError
from tests.helpers.launch import launch
from tests.helpers.wrappers import INFERRED, OTHERS, WRAPPERS, save_wrapper
from tests.planner.fallback.test_tp_plan import right

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


TOWER = " with its tower sharded"


def wrong(variant: str) -> list[str]:
    """The parameters of a tower whose gradients a planted error sums over the ranks, although each has all of it."""
    return {"gemma3": ["model.vision_tower.post_layernorm.weight"], "qwen3_vl": ["model.visual.merger.norm.bias"]}[
        variant
    ]


def prepare(work: Path, variants: Iterable[str], tp_size: int = 2) -> None:
    """Checkpoints in float64, shards of two ranks, batches with images, and the dense model's numbers."""
    import torch
    from transformers import AutoModelForImageTextToText

    from autotp_plan.inference.infer import infer_rules
    from autotp_plan.runtime.verify.float64_passes import EXPERTS, dense_reader, run_passes_and_steps
    from autotp_plan.runtime.verify.random_inputs import Batches, images_for

    for variant in variants:
        name, _, tower = variant.partition(TOWER)
        folder = save_wrapper(work / variant, name, torch.float64)
        plan = compile_plan(folder, tp_size=tp_size, prove=right, infer=infer_rules, cut_vision=bool(tower))
        sharded = {"vis" in entry.name for entry in plan.expanded() if entry.style != "replicated"}
        assert sharded == {False, bool(tower)}
        presplit(plan, folder, work / f"{variant}.shards")
        (work / f"{variant}.json").write_text(plan.to_json())
        dense = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, **EXPERTS).train()
        batches = Batches(vocab_size=240, length=8, padding=0, images=images_for(dense))
        assert batches.images is not None
        parameters = dict(dense.named_parameters())
        names = [entry.name for entry in plan.expanded() if entry.name in parameters]
        numbers = run_passes_and_steps(dense, dense_reader(dense), names, batches)
        graded = {name for name in numbers["gradient"] if numbers["gradient"][name].abs().max() > 0}
        assert [name for name in graded if "vis" in name] and any("language_model" in n or "text" in n for n in graded)
        torch.save((dataclasses.asdict(batches), numbers), work / f"{variant}.pt")


def in_ranks(work: Path, variants: Iterable[str]) -> dict[str, float]:
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.verify.compare import errors
    from autotp_plan.runtime.verify.float64_passes import EXPERTS, run_passes_and_steps, shard_reader
    from autotp_plan.runtime.verify.random_inputs import Batches

    found, options = {}, dict[str, Any](EXPERTS)
    for variant in variants:
        data, dense = torch.load(work / f"{variant}.pt")
        plan = load_plan(work / f"{variant}.json")
        model = plan.load_model(work / f"{variant}.shards", **options).train()
        names = list(dense["stepped"])
        numbers = run_passes_and_steps(model, shard_reader(model), names, Batches.from_dict(data))
        rank = plan.ranks.tp_rank
        assert numbers["gradient"].keys() == dense["gradient"].keys()
        found[variant] = max(
            e for kinds in errors(dense, numbers, plan.document, rank).values() for e in kinds.values()
        )
    return found


QUICK = ("idefics2", "ovis2", "qwen2_5_omni_thinker", "video_llama_3")
"""Of those without an entry in the table: each takes images in a way of its own."""
TOWERS = tuple(f"{name}{TOWER}" for name in ("gemma3", "internvl", "llama4", "llava", "mistral3", "qwen2_5_vl"))
"""One of each kind of tower: siglip, InternViT, Llama 4's, clip, pixtral, Qwen's."""


@pytest.mark.parametrize(
    ("variants", "tp_size"),
    [
        pytest.param((*WRAPPERS, *QUICK, *TOWERS), 2, id="known"),
        pytest.param(tuple(sorted(OTHERS.keys() - set(QUICK))), 2, id="others", marks=pytest.mark.slow),
        pytest.param(tuple(f"{name}{TOWER}" for name in (*WRAPPERS, *OTHERS) if name != "got_ocr2"), 4, id="towers",
                     marks=pytest.mark.slow),
        pytest.param(("qwen3_5", f"qwen3_5{TOWER}"), 2, id="inferred", marks=pytest.mark.slow),
        pytest.param(tuple(sorted(INFERRED.keys() - {"qwen3_5"})), 2, id="others-inferred", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_wrapper_trains_with_images_as_the_dense_model(
    tmp_path: Path, variants: tuple[str, ...], tp_size: int
) -> None:
    """Three passes and two optimizer steps in float64: losses, logits, every gradient and every parameter."""
    prepare(tmp_path, variants, tp_size)
    for found in launch(in_ranks, tp_size, tmp_path, variants):
        assert found.keys() == set(variants)
        assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("variant", ["gemma3", "qwen3_vl"])
def test_a_tower_whose_gradient_is_summed_is_found(tmp_path: Path, variant: str) -> None:
    """`verify` makes images by itself, or the tower would have no gradient to compare."""
    plan = compile_plan(save_wrapper(tmp_path / "model", variant), tp_size=2)
    proof = verify_plan(plan, attention=("eager",))
    assert proof.proven, proof.conclusions()
    assert proof.twin["no_images"] is None and proof.twin["batches"]["images"]["count"] == 4
    planted = [
        dataclasses.replace(entry, partial_gradient=True) if entry.name in wrong(variant) else entry
        for entry in plan.parameters
    ]
    assert planted != list(plan.parameters)
    proof = verify_plan(dataclasses.replace(plan, parameters=tuple(planted)), attention=("eager",))
    assert not proof.proven and proof.wrong == wrong(variant)


CUT = [
    ("qwen2_5_vl", 2, {"model.visual.blocks.*.attn": 3, "model.visual.blocks.*.mlp": 3}),
    pytest.param("mistral3", 2, {"model.vision_tower.transformer.layers.*.attention": 2,
                                 "model.vision_tower.transformer.layers.*.feed_forward": 2}, marks=pytest.mark.slow),
    pytest.param("gemma3", 4, {"model.vision_tower.encoder.layers.*.self_attn": 3,
                               "model.vision_tower.encoder.layers.*.mlp": 3}, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "tp_size", "modules"), CUT)
def test_a_tower_is_sharded_with_proof(tmp_path: Path, variant: str, tp_size: int, modules: dict[str, int]) -> None:
    """As `compile --cut-vision` does, with a proof that runs images through the tower."""
    plan = compile_plan(save_wrapper(tmp_path, variant), tp_size=tp_size, prove=try_plan, cut_vision=True)
    sharded = ", ".join(f"{name} ({count})" for name, count in modules.items())
    assert {f"--cut-vision: sharded, and proven with images, are {text}." for text in permuted(sharded)} & {*plan.notes}


def permuted(sharded: str) -> set[str]:
    """The modules of a note in either order."""
    return {sharded, ", ".join(reversed(sharded.split(", ")))}


WRONG_RULES = [
    ("qwen2_5_vl", "qkv", ((96,), -1), 24),  # all heads of q on one rank, and all of v on the other
    pytest.param("gemma3", "self_attn.q_proj", ((16, 16), -1), 8, marks=pytest.mark.slow),  # every second head of q
    pytest.param("gemma3", "mlp.fc2", (-1, (24, 24)), 1, marks=pytest.mark.slow),  # other features than those of fc1
]


@pytest.mark.parametrize(("variant", "layer", "shape", "unit"), WRONG_RULES)
def test_a_wrong_rule_for_a_tower_is_found_by_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, layer: str, shape: Any, unit: int
) -> None:
    """Every row is on one rank and every sum is right; only a run with images shows what is wrong."""
    from autotp_plan.planner.fallback import with_tower

    changed: list[str] = []

    def wrong_rules(*args: Any) -> Any:
        tower = vision_tower.tower_rules(*args)
        specs = []
        for spec in tower.rules.layer_specs:
            if spec.patterns[0].endswith(re.escape(f".{layer}.weight") + "$"):
                changed.append(spec.patterns[0])
                spec = dataclasses.replace(spec, shape=shape, unit=unit)
            specs.append(spec)
        return dataclasses.replace(tower, rules=dataclasses.replace(tower.rules, layer_specs=tuple(specs)))

    monkeypatch.setattr(with_tower, "tower_rules", wrong_rules)
    with pytest.raises(CompileError, match="the vision tower cannot be sharded") as refused:
        compile_plan(save_wrapper(tmp_path, variant), tp_size=2, prove=try_plan, cut_vision=True)
    assert changed and "differ from the unsharded model's" in refused.value.faults[0].got


def test_a_published_size_gives_a_small_twin(tmp_path: Path) -> None:
    """Widths of a tower have no common divisor with the language model's, and need none."""
    from autotp_plan.huggingface import scale_config

    config: dict[str, Any] = {
        "model_type": "gemma3", "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "head_dim": 128,
                        "num_key_value_heads": 16, "num_hidden_layers": 62, "vocab_size": 262208},
        "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_hidden_layers": 27,
                          "num_attention_heads": 16, "patch_size": 14},
    }  # fmt: skip
    divisor = scale_config.divisors(config)[0]
    assert divisor == 32
    small = scale_config.shrink(config, divisor=divisor, layers=2, experts=None, tp_size=2)
    text, vision = small["text_config"], small["vision_config"]
    assert (text["hidden_size"], text["head_dim"], text["num_attention_heads"]) == (168, 4, 32)
    assert (text["num_hidden_layers"], vision["num_hidden_layers"]) == (2, 2)
    assert vision["hidden_size"] == 16 * 8 and vision["image_size"] == 4 * vision["patch_size"]
    assert small["image_token_index"] < text["vocab_size"] and small["image_token_index"] != text["pad_token_id"]
    assert json.loads(json.dumps(small)) == small


class ImageData:
    """Rows of tokens with an image each, as a data set for Trainer: pixels of all patches of an image in one item."""

    def __init__(self, batches: Any, rows: int) -> None:
        self.batches, self.rows = batches, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        batch = self.batches(row // 2)
        at = row % 2
        per_image = batch["pixel_values"].shape[0] // 2
        item = {name: value[at] for name, value in batch.items() if name != "pixel_values"}
        pixels = batch["pixel_values"][at * per_image : (at + 1) * per_image]
        return {**item, "labels": item["input_ids"], "pixel_values": pixels}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: patches of several images follow one another."""
    import torch

    return {
        name: torch.cat([item[name] for item in items])
        if name == "pixel_values"
        else torch.stack([item[name] for item in items])
        for name in items[0]
    }


def losses_under_trainer(folder: Path, out: Path, plan: Any, data: ImageData, rows: int) -> list[float]:
    import torch
    from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

    from autotp_plan.runtime import TrainingPlan

    sharded = None if plan is None else TrainingPlan(plan)
    deepspeed = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto"}
    arguments = TrainingArguments(
        str(out), deepspeed=None if sharded is None else deepspeed, max_steps=2, learning_rate=1e-3, use_cpu=True,
        per_device_train_batch_size=rows, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        optim="adamw_torch", max_grad_norm=1.0, remove_unused_columns=False,
    )  # fmt: skip
    model = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        if sharded is None
        else sharded.load_model(folder)
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    if sharded is not None:
        sharded.adapt_trainer(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("dp_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_trainer_trains_with_images(tmp_path: Path, dp_size: int) -> None:
    """With data parallelism too, where the unsharded model takes the rows of all DP ranks at once."""
    import torch
    from transformers import AutoModelForImageTextToText

    from autotp_plan.runtime.verify.random_inputs import Batches, images_for

    folder = save_wrapper(tmp_path / "model", "qwen2_5_vl", torch.float32)
    images = images_for(AutoModelForImageTextToText.from_pretrained(folder))
    data = ImageData(Batches(vocab_size=240, length=8, padding=0, images=images), 4 * dp_size)
    (dense,) = launch(losses_under_trainer, 1, folder, tmp_path / "dense", None, data, 2 * dp_size)
    plan = compile_plan(folder, tp_size=2)
    for losses in launch(losses_under_trainer, 2 * dp_size, folder, tmp_path / "out", plan, data, 2):
        assert len(losses) == 2 and losses == pytest.approx(dense, rel=1e-4)


SETTINGS = {
    "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}  # fmt: skip


def images_in_four_ranks(folder: Path, plan: Any, data: ImageData, prompt: dict[str, Any]) -> dict[str, Any]:
    """Two TP ranks and two DP ranks: generation, a step of training, and images that differ between TP ranks."""
    import torch

    from autotp_plan.runtime import TrainingPlan
    from autotp_plan.schemas.errors import MismatchError

    sharded = TrainingPlan(plan)
    model = sharded.load_model(folder, check_batches_every=1)
    tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _, loader, _ = sharded.initialize(
        model, config=SETTINGS, optimizer=optimizer, training_data=data, collate_fn=collate
    )
    steps = []
    for batch in loader:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        steps.append((batch, float(loss.detach())))
    refused = {}
    for kind in ("tensor", "list"):
        pixels = (
            batch["pixel_values"] + sharded.ranks.tp_rank * (torch.arange(len(batch["pixel_values"])) == 3)[:, None]
        )
        try:
            engine(**{**batch, "pixel_values": pixels if kind == "tensor" else [*pixels.split(16)]})
        except MismatchError as error:
            refused[kind] = error.faults[0].where
    return {"tokens": tokens, "steps": steps, "refused": refused, "dp_rank": sharded.ranks.dp_rank}


def test_images_in_initialize_and_generate_with_data_parallelism(tmp_path: Path) -> None:
    """Every DP rank trains on its own images; generation and losses are the dense model's."""
    import torch
    from transformers import AutoModelForImageTextToText

    from autotp_plan.runtime.verify.random_inputs import Batches, images_for

    folder = save_wrapper(tmp_path / "model", "qwen2_5_vl", torch.float32)
    dense = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    batches = Batches(vocab_size=240, length=8, padding=None, images=images_for(dense))
    prompt = batches(9)
    plan = compile_plan(folder, tp_size=2)
    found = launch(images_in_four_ranks, 4, folder, plan, ImageData(batches, 8), prompt)
    expected = dense.generate(**prompt, max_new_tokens=4, do_sample=False)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    first, second = ([one["steps"] for one in found if one["dp_rank"] == rank] for rank in (0, 1))
    assert len(first[0]) == len(second[0]) == 2
    for step in zip(*first, *second):
        for (one, _), (other, _) in (step[:2], step[2:]):
            assert all(torch.equal(one[name], other[name]) for name in one), "the ranks of a TP group"
        assert not torch.equal(step[0][0]["pixel_values"], step[2][0]["pixel_values"])
        losses = [dense(**batch).loss for batch, _ in (step[0], step[2])]
        assert [loss for _, loss in (step[0], step[2])] == pytest.approx(
            [float(loss.detach()) for loss in losses], rel=1e-5
        )
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one in found:
        assert torch.equal(one["tokens"], expected)
        assert one["refused"] == {
            "tensor": "pixel_values of forward 7 in training", "list": "pixel_values[0] of forward 8 in training",
        }  # fmt: skip
