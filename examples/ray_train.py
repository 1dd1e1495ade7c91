"""Ray Train on a plan: each worker loads its own shards and saves its own part of the job; a killed one is replaced.

    .venv/bin/python examples/ray_train.py --tp_size 2 --dp_size 2 --num_steps 12 --save_every 4 --kill_at 7

Needs `pip install 'autotp-plan[ray]'`. What differs from a Ray Train loop without tensor parallelism: `load_model`
reads this worker's shards and no more, `plan.initialize` gives the workers of a TP group the same batches, and all
workers write a checkpoint at once into the folder of the run, where Ray is told of it: nothing is gathered, uploaded
or held twice. `--kill_at 7` is the demonstration: a worker kills itself before step 7, Ray starts all of them again,
and they go on after the last checkpoint with the losses of a run that nothing disturbed.

It starts a Ray of its own on this machine, or uses the cluster that RAY_ADDRESS names (`auto` for the one at hand). On
several nodes `--storage_path` and `--shards` are folders that all of them share.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from tiny import RUN, checkpoint

from autotp_plan.planner import Plan, compile_plan, presplit
from autotp_plan.schemas.errors import Fault, MismatchError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train under Ray Train with a plan's tensor parallelism.")
    parser.add_argument(
        "--shards", type=Path, help="what `autotp-plan presplit` wrote; default: a tiny Llama's, made now"
    )
    parser.add_argument("--tp_size", type=int, default=2, help="of the tiny Llama; a shards folder has its own")
    parser.add_argument("--dp_size", type=int, default=2)
    parser.add_argument("--zero_stage", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_length", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=12)
    parser.add_argument("--save_every", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--storage_path", type=Path, default=RUN / "ray", help="folder for runs")
    parser.add_argument("--name", help="of the run; the same name goes on where it ended")
    parser.add_argument("--max_failures", type=int, default=3, help="how often Ray starts the workers again")
    parser.add_argument("--kill_at", type=int, metavar="STEP", help="a worker that began at step 1 kills itself here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    shards = (args.shards or tiny_shards(args.tp_size)).resolve()  # workers have a working directory of their own
    num_workers = Plan.read(shards / "autotp_plan.json").tp_size * args.dp_size
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # what a worker prints would be shown twice
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":  # also on a machine with fewer cores than workers
        ray.init(address, num_cpus=num_workers, include_dashboard=False)
    else:
        ray.init(address)
    trainer = TorchTrainer(
        train,
        train_loop_config={**vars(args), "shards": shards},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            name=args.name,
            storage_path=str(args.storage_path.resolve()),
            failure_config=FailureConfig(max_failures=args.max_failures),
        ),
    )
    result = trainer.fit()
    print(f"Ray's last checkpoint: {result.checkpoint.path}, of {result.metrics}")
    ray.shutdown()


def train(config: dict[str, Any]) -> None:
    """What each worker does. Ray has initialised torch.distributed; the plan makes its groups of it."""
    # imported here because Ray pickles this function, and fails on torch.distributed.config where it comes along
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.data.sampler import endless
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens

    plan = load_plan(config["shards"] / "autotp_plan.json")
    context = ray.train.get_context()
    folder = run_folder(context, plan.tp_size)
    model = plan.load_model(config["shards"])  # this worker's bytes only
    tokens = synthetic_tokens(model.config.vocab_size, 40 * config["seq_length"], seed=0)
    engine, _, loader, _ = plan.initialize(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=config["learning_rate"]),
        config={
            "train_micro_batch_size_per_gpu": config["batch_size"],
            "zero_optimization": {"stage": config["zero_stage"]},
        },
        training_data=TokenDataset(tokens, config["seq_length"]),
    )
    first = context.get_world_rank() == 0
    begun_anew = not resume(plan, engine, folder)
    if first and not begun_anew:
        print(f"going on after step {engine.global_steps}", flush=True)

    batches = endless(loader)
    for step in range(engine.global_steps + 1, config["num_steps"] + 1):
        if step == config["kill_at"] and begun_anew and context.get_world_rank() == context.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = {key: value.to(plan.ranks.device) for key, value in next(batches).items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / plan.ranks.dp_size
        dist.all_reduce(mean, group=plan.ranks.dp_group)
        if first:
            print(f"step {step}/{config['num_steps']}  loss {mean.item():.6f}", flush=True)
        if step % config["save_every"] == 0 or step == config["num_steps"]:
            metrics = {"step": step, "loss": mean.item()}
            report(folder / plan.save_checkpoint(engine, folder, client_state=metrics), metrics)


def report(saved: Path, metrics: dict[str, Any]) -> None:
    """Tell Ray of a checkpoint that is in the run's folder already; every worker does."""
    ray.train.report(metrics, checkpoint=Checkpoint(str(saved)), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def resume(plan: Any, engine: Any, folder: Path) -> bool:
    """Go on after the last complete checkpoint, if there is one. Every worker takes the one that the first one sees.

    It may be one that Ray has not heard of: a worker can die after the save and before the report.
    """
    latest = folder / "latest"
    tag = broadcast_from_rank_zero(latest.read_text() if latest.exists() else None)
    if tag is None:
        return False
    metrics = plan.load_checkpoint(engine, folder, tag)
    known = ray.train.get_checkpoint()
    if known is None or Path(known.path).name != tag:
        report(folder / tag, metrics)
    return True


def run_folder(context: Any, tp_size: int) -> Path:
    """Where the workers write the run's checkpoints. Raises MismatchError where Ray has placed them unsuitably."""
    storage, on_this_node = context.get_storage(), context.get_local_world_size()
    folder, faults = Path(storage.experiment_fs_path), []
    if on_this_node % tp_size:  # Ray numbers workers node by node, so that elsewhere a TP group is on one node
        faults.append(
            Fault(
                what="a TP group would span two nodes",
                where=f"Ray's node {context.get_node_rank()}",
                got=f"{on_this_node} workers",
                expected=f"a multiple of the plan's tp_size, {tp_size}",
                next="use nodes with a multiple of tp_size free GPUs each, or a plan of a smaller tp_size",
            )
        )
    if storage.storage_filesystem.type_name != "local" or not folder.is_dir():
        faults.append(
            Fault(
                what="a worker cannot write into the folder of the run",
                where=f"RunConfig(storage_path=...), on Ray's node {context.get_node_rank()}",
                got=f"{storage.storage_filesystem.type_name} storage, {folder}",
                expected="a folder that all nodes share",
                next="mount the storage on every node, and give the folder where it is mounted",
            )
        )
    if faults:
        raise MismatchError(faults)
    return folder


def tiny_shards(tp_size: int) -> Path:
    """The shards of a small random Llama, made by the first run that asks for them."""
    folder, shards = checkpoint("tiny-llama"), RUN / f"tiny-llama-tp{tp_size}"
    if not (shards / "autotp_shards.json").exists():
        presplit(compile_plan(folder, tp_size=tp_size), folder, shards)
    return shards


if __name__ == "__main__":
    main()
