"""Streams: each data-parallel rank gets its share, all TP ranks of one the same, and a job goes on where it stood."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from autotp_plan.runtime.data.stream import StreamLoader
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import MismatchError
from tests.helpers.launch import launch

BATCH_SIZE = 2


class Numbers(IterableDataset[int]):
    """0, 1, 2, ..., from another one each epoch; workers divide them."""

    def __init__(self, count: int, first: int = 0, step: int = 1) -> None:
        self.numbers = range(first, first + count * step, step)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from (100 * self.epoch + number for number in self.numbers[first::step])


def ranks(dp_rank: int, dp_size: int, tp_rank: int = 0) -> Ranks:
    return Ranks(
        tp_rank=tp_rank, tp_size=2, dp_rank=dp_rank, dp_size=dp_size, tp_group=None, dp_group=None,
        device=torch.device("cpu"),
    )  # fmt: skip


def loader(data: Any, dp_rank: int = 0, dp_size: int = 2, **changes: Any) -> StreamLoader:
    options = {"batch_size": BATCH_SIZE, "drop_last": False, "is_sharded": False, "num_workers": 0, **changes}
    return StreamLoader(data, ranks(dp_rank, dp_size), begin_batch=lambda: None, **options)


def batches(source: StreamLoader) -> list[list[int]]:
    return [batch.tolist() for batch in source]


def test_data_parallel_ranks_take_turns_at_the_batches() -> None:
    assert batches(loader(Numbers(8))) == [[0, 1], [4, 5]]
    assert batches(loader(Numbers(8), 1)) == [[2, 3], [6, 7]]
    assert batches(loader(Numbers(5), 0, 1)) == [[0, 1], [2, 3], [4]]


def test_all_ranks_have_as_many_batches() -> None:
    assert batches(loader(Numbers(5))) == [[0, 1], [4, 0]], "filled up from the beginning"
    assert batches(loader(Numbers(5), 1)) == [[2, 3], [1, 2]]
    assert batches(loader(Numbers(7), 0, drop_last=True)) == [[0, 1]]
    assert batches(loader(Numbers(7), 1, drop_last=True)) == [[2, 3]]


def test_each_iteration_is_another_epoch() -> None:
    source = loader(Numbers(4))
    assert [batches(source), batches(source)] == [[[0, 1]], [[100, 101]]]
    source.set_epoch(5)
    assert batches(source) == [[500, 501]]


def test_workers_divide_the_stream() -> None:
    found = [batches(loader(Numbers(16), rank, num_workers=2)) for rank in (0, 1)]
    assert sorted(number for part in found for batch in part for number in batch) == list(range(16))


def test_a_stream_that_shards_itself_is_not_divided_again() -> None:
    for rank in (0, 1):
        own = Numbers(4, first=rank, step=2)
        assert batches(loader(own, rank, is_sharded=True)) == [[rank, rank + 2], [rank + 4, rank + 6]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 9])
def test_a_position_is_where_the_stream_goes_on(done: int, num_workers: int) -> None:
    def endless(source: StreamLoader) -> Iterator[list[int]]:
        while True:
            yield from batches_of(source)

    def batches_of(source: StreamLoader) -> Iterator[list[int]]:
        yield from (batch.tolist() for batch in source)

    source = loader(Numbers(16), 1, num_workers=num_workers)
    stream = endless(source)
    for _ in range(done):
        next(stream)
    wanted = [next(stream) for _ in range(6)]  # read ahead: what counts is what was trained on
    position = source.position(done, BATCH_SIZE, False)
    assert position == (done // 4, done % 4 * BATCH_SIZE)

    begun = []
    again = loader(Numbers(16), 1, num_workers=num_workers)
    again.set_position(*position, lambda: begun.append(True), done)
    assert not begun
    stream = endless(again)
    assert [next(stream) for _ in range(6)] == wanted
    assert begun == [True]
    further = again.position(done + 2, BATCH_SIZE, False)
    assert further == ((done + 2) // 4, (done + 2) % 4 * BATCH_SIZE)


def test_where_a_position_means_nothing() -> None:
    assert loader(Numbers(8)).why_not_from(4, same_mesh=False) == ""
    assert "not full batches" in loader(Numbers(8)).why_not_from(3, same_mesh=True)
    assert loader(Numbers(8), is_sharded=True).why_not_from(4, same_mesh=True) == ""
    assert "shards itself" in loader(Numbers(8), is_sharded=True).why_not_from(4, same_mesh=False)
    assert "workers" in loader(Numbers(8), num_workers=2).why_not_from(4, same_mesh=False)


def test_a_stream_split_by_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    def numbers(count: int) -> Iterator[dict[str, int]]:
        yield from ({"n": number} for number in range(count))

    def split(dp_rank: int, world_size: int) -> Any:
        stream = datasets.IterableDataset.from_generator(numbers, gen_kwargs={"count": 8})
        return split_dataset_by_node(stream, rank=dp_rank, world_size=world_size)

    loaders = [loader(split(rank, 2), rank, is_sharded=True) for rank in (0, 1)]
    assert sorted(n for source in loaders for batch in source for n in batch["n"].tolist()) == list(range(8))
    with pytest.raises(MismatchError, match="would be split once more") as caught:
        loader(split(0, 2))
    assert "data_is_sharded=True" in str(caught.value)
    with pytest.raises(MismatchError, match="split for another number of ranks"):
        loader(split(0, 4), is_sharded=True)  # counted TP ranks


class Tokens(IterableDataset[dict[str, torch.Tensor]]):
    """Windows of random tokens."""

    def __init__(self, count: int = 64) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(self.count):
            window = torch.randint(3, 250, (6,), generator=torch.Generator().manual_seed(number))
            window[0] = number
            yield {"input_ids": window, "labels": window}


def first_tokens(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def in_four_ranks(folder: Path) -> dict[str, Any]:
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    plan = TrainingPlan(compile_plan(folder / "checkpoint", tp_size=2))
    found: dict[str, Any] = {"initialize": initialized(plan, folder)}
    for dispatch in (None, False, True):
        found[f"trainer {dispatch}"] = trained(plan, folder, {"accelerator_config": {"dispatch_batches": dispatch}})
    found["planted"] = trained(plan, folder, {}, dispatch_again=True)["seen"]
    split = {"accelerator_config": {"split_batches": True}}
    found["trainer split"] = trained(plan, folder, split)
    options = {"save_strategy": "steps", "save_steps": 2}
    found["trainer saved"] = trained(plan, folder, options)
    found["trainer resumed"] = trained(plan, folder, options, resume=str(folder / "trainer" / "checkpoint-2"))
    return {"place": (plan.ranks.dp_rank, plan.ranks.tp_rank), **found}


def initialized(plan: Any, folder: Path) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": BATCH_SIZE,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }

    def start() -> tuple[Any, Any]:
        model = plan.load_model(folder / "checkpoint")
        engine, _, loader, _ = plan.initialize(model, config=config, training_data=Tokens())
        return engine, iter(loader)

    def step(engine: Any, source: Any) -> tuple[list[int], float]:
        batch = next(source)
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return first_tokens(batch), loss.item()

    engine, source = start()
    done = [step(engine, source) for _ in range(2)]
    plan.save_checkpoint(engine, folder / "job")
    done += [step(engine, source) for _ in range(2)]
    engine.destroy()
    engine, source = start()
    plan.load_checkpoint(engine, folder / "job")
    resumed = [step(engine, source) for _ in range(2)]
    faults = []
    samples: Any = [1, 2]
    for data, changes in ((samples, {"data_is_sharded": True}), (torch.utils.data.DataLoader(samples), {})):
        with pytest.raises(MismatchError, match="no loader can be made of this training data") as caught:
            plan.initialize(plan.load_model(folder / "checkpoint"), config=config, training_data=data, **changes)
        faults += [fault.where for fault in caught.value.faults]
    return {"done": done, "resumed": resumed, "faults": faults}


def trained(
    plan: Any, folder: Path, options: dict[str, Any], resume: str | None = None, dispatch_again: bool = False
) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder / "trainer"), per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=BATCH_SIZE,
        max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, learning_rate=1e-3,
        lr_scheduler_type="constant",
        deepspeed={"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}},
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    trainer = Trainer(plan.load_model(folder / "checkpoint"), arguments, train_dataset=Tokens(), eval_dataset=Tokens(8))
    plan.adapt_trainer(trainer)
    if dispatch_again:  # as it was without `adapt_trainer`
        trainer.accelerator.dataloader_config.dispatch_batches = None
    step, seen = trainer.training_step, []

    def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(first_tokens(inputs))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = noted
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seen": seen, "losses": losses, "evaluated": trainer.evaluate()["eval_loss"]}


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_streams_in_initialize_and_in_trainer(tmp_path: Path) -> None:
    from tests.helpers.models import load_dense, save_checkpoint

    save_checkpoint(tmp_path / "checkpoint", "llama")
    losses = dense_losses(load_dense(tmp_path / "checkpoint"), 4)
    for found in launch(in_four_ranks, 4, tmp_path):
        dp_rank, _ = found.pop("place")
        mine = [[4 * step + 2 * dp_rank, 4 * step + 2 * dp_rank + 1] for step in range(4)]
        of_initialize = found.pop("initialize")
        assert [tokens for tokens, _ in of_initialize["done"]] == mine
        assert of_initialize["resumed"] == of_initialize["done"][2:]
        assert of_initialize["faults"] == ["data_is_sharded", "training_data"]
        assert found.pop("planted") == [[2 * step, 2 * step + 1] for step in range(4)], "the error that is looked for"
        assert found.pop("trainer split")["seen"] == [[2 * step + dp_rank] for step in range(4)]
        assert found["trainer resumed"].pop("seen") == mine[2:]
        evaluated = found["trainer saved"]["evaluated"]
        for name, run in found.items():
            assert run.get("seen", mine) == mine, name
            assert run["losses"] == pytest.approx(losses, rel=1e-5), name
            assert run["evaluated"] == pytest.approx(evaluated, rel=1e-6), name


def dense_losses(model: Any, steps: int) -> list[float]:
    """The losses of steps on four samples each, with Trainer's AdamW and clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    stream, losses = iter(Tokens()), []
    for _ in range(steps):
        tokens = torch.stack([next(stream)["input_ids"] for _ in range(4)])
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
