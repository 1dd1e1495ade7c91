"""Loading and starting: what is wrong is said before any communication, on every rank alike; what is right trains."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import AutoTPError, MismatchError
from tests.helpers.launch import launch
from tests.helpers.paths import ROOT
from tests.helpers.programs import output_of


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama/` and `qwen2/` checkpoints, plans `llama.tp1.json`, `llama.tp2.json` ..., shards `llama.tp2/`."""
    import torch

    from autotp_plan.planner import compile_plan, presplit
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("runtime")
    save_checkpoint(work / "llama", "llama")
    save_checkpoint(work / "qwen2", "qwen2")
    save_checkpoint(work / "bf16", "llama", torch.bfloat16)
    for name, tp_size in (("llama", 1), ("llama", 2), ("qwen2", 1), ("bf16", 2)):
        plan = compile_plan(work / name, tp_size=tp_size)
        (work / f"{name}.tp{tp_size}.json").write_text(plan.to_json())
        presplit(plan, work / name, work / f"{name}.tp{tp_size}")
    return work


def message(plan_file: Path, weights: Path, **options: Any) -> str:
    from autotp_plan.runtime import load_plan

    with pytest.raises(AutoTPError) as caught:
        load_plan(plan_file).load_model(weights, **options)
    return str(caught.value)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / folder.name


def test_a_world_size_that_tp_does_not_divide_is_refused(work: Path) -> None:
    text = message(work / "llama.tp2.json", work / "llama.tp2")
    assert "the number of processes does not fit the plan" in text
    assert "got:      1" in text and "multiple of the plan's tp_size, 2" in text


def test_shards_of_another_plan(work: Path) -> None:
    assert "the shards are of another plan" in message(work / "llama.tp1.json", work / "qwen2.tp1")


def test_another_checkpoint_is_refused(work: Path) -> None:
    text = message(work / "llama.tp1.json", work / "qwen2")
    assert "a tensor of the plan is missing" in text and "lm_head.weight" in text
    assert "config.json is not the one the plan was compiled from" in text


def test_missing_short_and_unfinished_shards_are_refused(work: Path, tmp_path: Path) -> None:
    folder = copy_of(work / "llama.tp1", tmp_path)
    plan = work / "llama.tp1.json"
    victim = next(folder.glob("tp-00*.safetensors"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    assert f"got:      {len(content) - 1} bytes" in message(plan, folder)
    victim.unlink()
    assert "No such file" in message(plan, folder)
    victim.write_bytes(content[:-9] + b"        !")
    (folder / "autotp_shards.json").unlink()
    assert "a finished shards folder" in message(plan, folder)


def test_small_files_that_were_changed_are_noticed(work: Path, tmp_path: Path) -> None:
    """Of the same size each: a number of the config that no shape depends on, and the last byte of any small file."""
    folder = copy_of(work / "llama.tp1", tmp_path)
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-01'))
    assert config.read_text() != text
    found = message(work / "llama.tp1.json", folder)
    assert "config.json is not the one the plan was compiled from" in found and str(config) in found
    assert "pre-split again" in found
    config.write_text(text)
    for name in ("config.json", "generation_config.json", "autotp_plan.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + b" ")
        found = message(work / "llama.tp1.json", folder)
        assert str(folder / name) in found and "CRC-32" in found
        (folder / name).write_bytes(data)


def test_a_shard_of_another_run_is_noticed(work: Path, tmp_path: Path) -> None:
    folder = copy_of(work / "llama.tp1", tmp_path)
    victim = next(folder.glob("tp-00*.safetensors"))
    fingerprint = json.loads((folder / "autotp_plan.json").read_text())["fingerprint"].encode()
    victim.write_bytes(victim.read_bytes().replace(fingerprint, fingerprint[:-4] + b"0000"))
    assert "a file of another plan" in message(work / "llama.tp1.json", folder)


def test_a_folder_that_does_not_exist_is_refused(work: Path) -> None:
    assert "no such folder" in message(work / "llama.tp1.json", work / "nowhere")


def test_a_model_with_other_parameters_is_refused(work: Path) -> None:
    import torch
    from torch import nn

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    text = message(work / "llama.tp1.json", work / "llama.tp1", model=model)
    assert "the model has a parameter that the plan does not know\n  where:    0.weight" in text
    assert "the model lacks a parameter of the plan\n  where:    lm_head.weight" in text


def test_modules_that_no_tensor_parallel_layer_can_run_are_refused(work: Path) -> None:
    import torch
    from torch import nn

    from autotp_plan.huggingface.meta_model import build_model
    from autotp_plan.runtime.loading.check_model import check_model
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(work / "llama.tp2.json")
    model: Any = build_model(work / "llama", plan.model.architecture)

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    mlp = model.model.layers[0].mlp
    mlp.up_proj = Scaled(64, 96, bias=False, device="meta")
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(MismatchError) as caught:
        check_model(model, plan)
    text = str(caught.value)
    assert "no tensor-parallel layer runs column for this module" in text and "Scaled" in text
    assert "an embedding option cannot be kept" in text and "max_norm=1.0" in text


def test_ranks_that_share_only_some_indices_are_refused(work: Path) -> None:
    from autotp_plan.huggingface.meta_model import build_model
    from autotp_plan.runtime.loading.check_model import check_model
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(work / "llama.tp2.json")
    name = next(entry.layout for entry in plan.parameters if entry.name.endswith("down_proj.weight"))
    shared = dataclasses.replace(plan.layouts[name], intervals=(((0, 96),), ((48, 96),)))
    wrong = dataclasses.replace(plan, layouts={**plan.layouts, name: shared})
    with pytest.raises(MismatchError, match="share parts of this parameter in a way that no"):
        check_model(build_model(work / "llama", plan.model.architecture), wrong)


def test_a_parallel_layer_has_the_collectives_of_its_kind(work: Path) -> None:
    """A row-parallel layer's output may be copied, as that of Mamba's `x_proj` is; nothing else can be done."""
    from autotp_plan.huggingface.meta_model import build_model
    from autotp_plan.runtime.loading.check_model import check_model
    from autotp_plan.schemas.plan.document import Crossing, Plan, PlannedModule

    plan = Plan.read(work / "llama.tp2.json")
    model = build_model(work / "llama", plan.model.architecture)

    def check(module: PlannedModule) -> None:
        check_model(model, dataclasses.replace(plan, modules=(module,)))

    copied = Crossing(operation="copy")
    check(PlannedModule(module="model.layers.0.mlp.down_proj", output=copied))
    for wrong in (
        PlannedModule(module="model.layers.0.mlp.up_proj", output=copied),
        PlannedModule(module="model.layers.0.mlp.down_proj", output=Crossing(operation="copy", interval=(0, 4))),
        PlannedModule(module="model.layers.0.mlp.down_proj", output=copied, inputs={"input": copied}),
    ):
        with pytest.raises(MismatchError, match="cannot be given collectives of its own"):
            check(wrong)


def test_a_deepspeed_config_of_another_tp_size_is_refused(work: Path) -> None:
    from autotp_plan.runtime.deepspeed.engine_config import engine_config
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(work / "llama.tp2.json")
    with pytest.raises(MismatchError, match=r"tensor_parallel\.autotp_size"):
        engine_config({"tensor_parallel": {"autotp_size": 4}}, plan)
    user = {"tensor_parallel": {"autotp_size": 2, "preset_model": "llama", "tp_overlap_comm": True}}
    assert engine_config(user, plan)["tensor_parallel"] == {"autotp_size": 2, "tp_overlap_comm": True}
    assert user["tensor_parallel"]["preset_model"] == "llama", "the caller's config must not change"


def test_only_the_ranks_bytes_are_read(work: Path) -> None:
    """Half the bytes of the checkpoint, and of each cut tensor exactly the wanted runs."""
    from autotp_plan.runtime.loading.weights import open_weights
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(work / "llama.tp2.json")
    source = open_weights(work / "llama", plan)
    for weight in source.of_rank(1):
        wanted = sum(part.length for part in weight.byte_ranges())
        size = weight.stored.size
        assert wanted == (size // 2 if weight.layout.dim is not None else size), weight.name


def in_three_ranks(plan_file: Path, shards: Path) -> str:
    import torch

    from autotp_plan.runtime import load_plan

    try:
        load_plan(plan_file).load_model(shards)
    except AutoTPError as error:
        from deepspeed.utils import groups

        assert groups._TENSOR_MODEL_PARALLEL_GROUP is None, "groups were made before the mismatch was found"
        assert torch.distributed.is_initialized()
        return str(error)
    return "no error"


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_every_rank_raises_the_same_error_before_groups_are_made(work: Path) -> None:
    messages = launch(in_three_ranks, 3, work / "llama.tp2.json", work / "llama.tp2", timeout=120)
    assert len(set(messages)) == 1
    assert "got:      3" in messages[0]


def batches_and_bf16(plan_file: Path, shards: Path) -> dict[str, Any]:
    """Inside a rank: which samples this rank draws over two epochs; and five bf16 steps under each ZeRO stage."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens
    from tests.helpers.parity import engine_settings, engine_steps

    plan = load_plan(plan_file)
    dataset = TokenDataset(synthetic_tokens(256, 12 * 8), 8)
    model = plan.load_model(shards)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    engine, _, loader, _ = plan.initialize(
        model, config=engine_settings(1, bf16={"enabled": True}), training_data=dataset
    )
    seen = [batch["input_ids"].tolist() for batch in loader]
    train_batch_size = engine.train_batch_size()
    engine.destroy()
    histories = {}
    for stage in (0, 1, 2, 3):
        model = plan.load_model(shards)
        histories[stage] = engine_steps(plan, model.train(), stage, bf16={"enabled": True})
    ranks = plan.ranks
    return {
        "tp_rank": ranks.tp_rank, "dp_rank": ranks.dp_rank, "seen": seen, "histories": histories,
        "train_batch_size": train_batch_size,
    }  # fmt: skip


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_data_parallel_ranks_draw_different_batches_and_bf16_trains(work: Path) -> None:
    import torch

    from tests.helpers.models import load_dense
    from tests.helpers.parity import dense_steps

    found = launch(batches_and_bf16, 4, work / "bf16.tp2.json", work / "bf16.tp2", timeout=280)
    assert [(rank["tp_rank"], rank["dp_rank"]) for rank in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert found[0]["seen"] == found[1]["seen"] and found[2]["seen"] == found[3]["seen"]
    drawn = [{tuple(sample) for batch in found[rank]["seen"] for sample in batch} for rank in (0, 2)]
    assert not drawn[0] & drawn[1] and len(drawn[0] | drawn[1]) == 12
    assert found[0]["train_batch_size"] == 4, "two samples on each of two data-parallel ranks"
    dense = dense_steps(load_dense(work / "bf16", torch.float32), 2)
    for history in found[0]["histories"].values():
        for (loss, norm), (dense_loss, dense_norm) in zip(history, dense, strict=True):
            assert loss == pytest.approx(dense_loss, rel=2e-2)
            assert norm == pytest.approx(dense_norm, rel=5e-2)


def training_program(*arguments: object, ranks: int) -> list[object]:
    return ["torchrun", "--standalone", "--nproc-per-node", ranks, "-m", "autotp_plan.runtime.train", *arguments]


@pytest.mark.distributed
@pytest.mark.timeout(220)
def test_the_training_program_prints_and_records_its_steps(work: Path, tmp_path: Path) -> None:
    command = training_program(
        "--plan", work / "llama.tp2.json", "--shards", work / "llama.tp2",
        "--dp-size", 2, "--zero-stage", 2, "--seq-length", 16, "--num-steps", 3,
        "--metrics", tmp_path / "metrics.jsonl", ranks=4,
    )  # fmt: skip
    output = output_of(command, timeout=200)
    steps = re.findall(r"^step (\d)/3  loss \d+\.\d+  [\d,]+ tokens/s  [\d,]+ MiB$", output, re.MULTILINE)
    assert steps == ["1", "2", "3"], output
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert "Traceback" not in output


@pytest.mark.distributed
@pytest.mark.timeout(3 * 220)
def test_the_training_program_refuses_bad_input_without_traceback(work: Path) -> None:
    def refusal(*arguments: object) -> str:
        command = training_program("--plan", work / "llama.tp2.json", "--shards", *arguments, ranks=2)
        return output_of(command, timeout=200, fails=True)

    output = refusal(work / "qwen2.tp1")
    assert output.count("error: the shards are of another plan") in (1, 2), (
        "by each rank, unless torchrun ended it before"
    )
    assert 'File "' not in output.split("ChildFailedError")[0].split("E1")[0]
    output = refusal(work / "llama.tp2", "--save-shards", work / "llama.tp2")
    assert "error: the shards could not be saved after training" in output, "before training, not after"
    output = refusal(work / "llama.tp2", "--data", ROOT / "README.md")
    assert "there is no tokenizer to read the text with" in output


def test_embedding_classes_that_can_be_vocab_parallel() -> None:
    import torch
    from torch import nn
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    from autotp_plan.runtime.tensor_parallel.embedding import can_be_vocab_parallel

    class Normed(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / self.weight.norm()

    class Own(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(input, self.weight)

    assert can_be_vocab_parallel(nn.Embedding(4, 4))
    assert can_be_vocab_parallel(Gemma2TextScaledWordEmbedding(4, 4, 0, 2.0))
    assert can_be_vocab_parallel(OPTLearnedPositionalEmbedding(4, 4)), (
        "it shifts its input and looks up through super()"
    )
    assert not can_be_vocab_parallel(Normed(4, 4)), "it needs the whole table"
    assert not can_be_vocab_parallel(Own(4, 4)), "it goes past super()"
    assert not can_be_vocab_parallel(nn.Linear(4, 4))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_live_module_compiles_to_the_same_bytes_as_its_checkpoint(work: Path, name: str) -> None:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotp_plan.planner import check_checkpoint, compile_plan

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work / name), dtype=torch.float32)
    plan = compile_plan(model, tp_size=2)
    assert plan.to_json() == compile_plan(work / name, tp_size=2).to_json()
    assert check_checkpoint(plan, work / name) == []


def given_other_batches(work: Path, lora: bool) -> dict[str, Any]:
    """Inside a rank: what the first forward says of batches that are this rank's own."""
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers.models import batch

    plan = load_plan(work / "llama.tp2.json")
    rank = torch.distributed.get_rank()

    def say(train: bool, *seeds: int) -> list[str]:
        model = plan.load_model(work / "llama.tp2")
        if lora:
            from peft import LoraConfig

            model = plan.add_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
        model.train(train)
        said = []
        for seed in seeds:
            tokens = batch(seed)
            try:
                model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
                said.append("")
            except MismatchError as error:
                said.append(str(error))
        return said

    return {
        "training": say(True, rank)[0],
        "evaluation": say(False, rank)[0],
        "the same": say(True, 0, 1),
        "only the first is compared": say(True, 0, rank),
    }


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lora", [False, True])
def test_tp_ranks_with_different_batches_are_refused_at_the_first_forward(work: Path, lora: bool) -> None:
    both = launch(given_other_batches, 2, work, lora)
    assert both[0] == both[1], "every rank says the same"
    for when in ("training", "evaluation"):
        said = both[0][when]
        assert f"where:    input_ids of the first forward in {when}" in said and "attention_mask" not in said
        assert "TP rank 0: int64 [2, 12] " in said and "TP rank 1: int64 [2, 12] " in said and "plan.sampler" in said
    assert both[0]["the same"] == ["", ""] == both[0]["only the first is compared"]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_at_tp_1_no_batches_are_compared(work: Path) -> None:
    """At TP=1 there is nobody to compare with."""
    assert launch(hooks, 1, work) == [0]


def hooks(work: Path) -> int:
    from autotp_plan.runtime import load_plan

    return len(load_plan(work / "llama.tp1.json").load_model(work / "llama.tp1")._forward_pre_hooks)
