"""Another way to train a sharded model than `plan.initialize`: right, or refused with what to call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

STEPS = 3


def samples(step: int, dp_rank: int) -> Any:
    import torch

    return torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(10 * step + dp_rank))


def loop(model: Any, optimizer: Any, dp_rank: int, backward: Callable[[Any], None], clip: Any = None) -> list[float]:
    losses = []
    for step in range(STEPS):
        tokens = samples(step, dp_rank)
        loss = model(input_ids=tokens, labels=tokens).loss
        backward(loss)
        if clip is not None:
            clip()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def dense(folder: Path, dp_size: int, clip: float | None) -> list[list[float]]:
    """The losses of each data-parallel rank, with the mean gradient over all."""
    import torch

    from tests.helpers.models import load_dense

    model = load_dense(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    found: list[list[float]] = [[] for _ in range(dp_size)]
    for step in range(STEPS):
        for dp_rank in range(dp_size):
            tokens = samples(step, dp_rank)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / dp_size).backward()
            found[dp_rank].append(loss.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return found


class Lightning:
    """What Lightning wraps: a module of its own that holds the model."""

    @staticmethod
    def of(model: Any) -> Any:
        from torch import nn

        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, **batch: Any) -> Any:
                return self.model(**batch)

        return Module()


def accelerated(model: Any, plan: Any, adapt: bool, config: dict[str, Any] | None) -> tuple[list[float], list[Any]]:
    """Accelerate's own loop, without Trainer."""
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin

    from tests.helpers import trl

    trl.forget_accelerator()
    plugin = None if config is None else DeepSpeedPlugin(hf_ds_config=config)
    PartialState(cpu=True)
    accelerator = Accelerator(cpu=config is None, deepspeed_plugin=plugin)
    if adapt:
        plan.adapt_accelerator(accelerator)
    tokens = [row for step in range(STEPS) for dp_rank in range(2) for row in samples(step, dp_rank)]
    data: Any = [{"input_ids": row, "labels": row} for row in tokens]
    loader: Any = torch.utils.data.DataLoader(data, batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, gathered = [], []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        gathered.append(accelerator.gather_for_metrics(batch["input_ids"][:, 0]).tolist())
    return losses, gathered


def right_ways(plan_file: Path, folder: Path) -> dict[str, Any]:
    """TP=2 x DP=2."""
    import deepspeed
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from autotp_plan.runtime import load_plan

    plan = load_plan(plan_file)
    dp_rank = plan.init_mesh().dp_rank
    found: dict[str, Any] = {"dp_rank": dp_rank}
    model = plan.load_model(folder).train()
    wrapped = DistributedDataParallel(model, process_group=plan.ranks.dp_group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    found["ddp"] = loop(wrapped, optimizer, dp_rank, lambda loss: loss.backward())

    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
    for name, module in (("engine", lambda it: it), ("lightning", Lightning.of)):
        model = plan.load_model(folder).train()
        engine, *_ = deepspeed.initialize(
            model=module(model), config={**config, "tensor_parallel": {"autotp_size": 2}},
            model_parameters=list(model.parameters()), optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3),
        )  # fmt: skip
        found[name] = loop(engine, engine, dp_rank, engine.backward)
        engine.destroy()
    found["accelerate"], found["gathered"] = accelerated(plan.load_model(folder), plan, True, config)
    return found


def refused_ways(plan_file: Path, folder: Path, out: Path) -> dict[str, str]:
    import deepspeed
    import torch
    from deepspeed import initialize  # as a script that has imported it before
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from transformers import Trainer, TrainingArguments

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens
    from autotp_plan.schemas.errors import MismatchError
    from tests.helpers import trl

    plan = load_plan(plan_file)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    data = TokenDataset(synthetic_tokens(256, 32 * 12), 12)

    def trained(model: Any, deepspeed: Any) -> None:
        trl.forget_accelerator()
        Trainer(model, TrainingArguments(str(out), deepspeed=deepspeed, max_steps=1, use_cpu=True, report_to=[]),
                train_dataset=data).train()  # fmt: skip

    def evaluated(model: Any) -> None:
        trl.forget_accelerator()
        Trainer(model, TrainingArguments(str(out), use_cpu=True, report_to=[]), eval_dataset=data).evaluate()

    def layer_by_layer(model: Any) -> None:
        fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (2,)))

    ways: dict[str, Callable[[Any], Any]] = {
        "evaluation alone": evaluated,  # first: a DeepSpeed config leaves a variable in the environment
        "ddp": DistributedDataParallel,
        "ddp of a part": lambda model: DistributedDataParallel(model.model.layers[0]),
        "ddp by a mesh": lambda model: DistributedDataParallel(model, device_mesh=init_device_mesh("cpu", (2,))),
        "ddp of Lightning": lambda model: DistributedDataParallel(Lightning.of(model)),
        "fsdp": FullyShardedDataParallel,
        "fsdp of Lightning": lambda model: FullyShardedDataParallel(Lightning.of(model)),
        "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
        "fsdp2 of a layer": layer_by_layer,
        "data parallel": DataParallel,
        "engine": lambda model: initialize(model=model, config=config),
        "engine of Lightning": lambda model: initialize(model=Lightning.of(model), config=config),
        "inference": lambda model: deepspeed.init_inference(model, dtype=torch.float32),
        "Trainer": lambda model: trained(model, None),
        "Trainer with DeepSpeed": lambda model: trained(model, {**config, "train_micro_batch_size_per_gpu": "auto"}),
        "Trainer with autotp_size": lambda model: trained(
            model, {**config, "train_micro_batch_size_per_gpu": "auto", "tensor_parallel": {"autotp_size": 2}}
        ),
        "Accelerate": lambda model: accelerated(model, plan, False, None),
        "Accelerate with DeepSpeed": lambda model: accelerated(model, plan, False, config),
        "adapt_accelerator without DeepSpeed": lambda model: accelerated(model, plan, True, None),
    }
    found = {}
    for name, way in ways.items():
        try:
            way(plan.load_model(folder).train())
        except MismatchError as error:
            found[name] = str(error)
        else:
            found[name] = "not refused"
    from tests.helpers.models import load_dense

    DistributedDataParallel(load_dense(folder))  # what is not sharded is wrapped as ever
    FullyShardedDataParallel(load_dense(folder), device_id=torch.device("cpu"))
    fully_shard(load_dense(folder), mesh=init_device_mesh("cpu", (2,)))
    return found


def unsharded_ways(plan_file: Path, folder: Path) -> bool:
    """TP=1: nothing is sharded, nothing refused."""
    from torch.nn.parallel import DistributedDataParallel

    from autotp_plan.runtime import load_plan

    model = DistributedDataParallel(load_plan(plan_file).load_model(folder).train())
    tokens = samples(0, 0)
    return bool(model(input_ids=tokens, labels=tokens).loss.isfinite())


@pytest.fixture(scope="module")
def plan_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Path]]:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("wrappers")
    folder = save_checkpoint(work / "model", "llama")
    files = {size: work / f"plan-{size}.json" for size in (1, 2)}
    for size, file in files.items():
        file.write_text(compile_plan(folder, tp_size=size).to_json())
    return folder, files


def test_right_ways_have_the_dense_models_losses(plan_files: tuple[Path, dict[int, Path]]) -> None:
    folder, files = plan_files
    unclipped, clipped = dense(folder, 2, None), dense(folder, 2, 1.0)
    assert unclipped != clipped
    for found in launch(right_ways, 4, files[2], folder):
        dp_rank = found["dp_rank"]
        assert found["ddp"] == pytest.approx(unclipped[dp_rank], rel=1e-5)
        for name in ("engine", "lightning", "accelerate"):
            assert found[name] == pytest.approx(clipped[dp_rank], rel=1e-5), name
        each = [[*samples(step, 0)[:, 0].tolist(), *samples(step, 1)[:, 0].tolist()] for step in range(STEPS)]
        assert found["gathered"] == each, "each sample once"


def test_other_ways_are_refused_with_what_to_call(plan_files: tuple[Path, dict[int, Path]], tmp_path: Path) -> None:
    folder, files = plan_files
    for found in launch(refused_ways, 2, files[2], folder, tmp_path):
        without = found.pop("adapt_accelerator without DeepSpeed")
        assert "Accelerate does not run under DeepSpeed" in without and "DeepSpeedPlugin" in without
        assert "model.generate" in found.pop("inference")
        for name, error in found.items():
            assert "takes each rank's shards for the full model" in error, (name, error)
            for call in ("plan.initialize", "plan.adapt_trainer", "plan.adapt_accelerator"):
                assert call in error, name
        assert "process_group=plan.ranks.dp_group" in found["ddp"]


def test_with_one_tp_rank_nothing_is_refused(plan_files: tuple[Path, dict[int, Path]]) -> None:
    folder, files = plan_files
    assert launch(unsharded_ways, 2, files[1], folder) == [True, True]
