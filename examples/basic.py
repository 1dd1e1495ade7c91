"""DeepSpeed's basic AutoTP example on a plan: the same flags, synthetic tokens.

    .venv/bin/torchrun --nproc-per-node 4 examples/basic.py --model_name tiny-llama --tp_size 2 --dp_size 2 \\
        --seq_length 64 --num_steps 5 --precision fp32

What differs from training/tensor_parallel/basic_example of DeepSpeedExamples: `load_plan` and `load_model` take the
place of `from_pretrained`, `plan.initialize` that of `deepspeed.initialize`; the groups, the `mpu` and the broadcast of
the batches are gone, because `plan.ranks` knows them. `deepspeed --num_gpus 4` in place of torchrun starts it as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import HELP, checkpoint

from autotp_plan.planner import compile_plan
from autotp_plan.runtime import TrainingPlan, load_plan


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on synthetic tokens with a plan's tensor parallelism.")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the deepspeed launcher")
    parser.add_argument("--model_name", default="tiny-llama", help=HELP)
    parser.add_argument("--plan", help="plan file; default: the shards' own, or compiled now from the checkpoint")
    parser.add_argument("--tp_size", type=int, default=4)
    parser.add_argument("--dp_size", type=int, default=2)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_length", type=int, default=1024)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32"])
    return parser.parse_args()


def plan_of(folder: str, args: argparse.Namespace) -> TrainingPlan:
    """The plan to train by: compiled before, by `autotp-plan compile`, or here for a checkpoint that has none."""
    file = args.plan or Path(folder) / "autotp_plan.json"
    if Path(file).exists():
        return load_plan(file)
    return TrainingPlan(compile_plan(folder, tp_size=args.tp_size))


def main() -> None:
    args = parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]

    folder = checkpoint(args.model_name)
    plan = plan_of(folder, args)
    model = plan.load_model(folder, dtype=dtype)

    ds_config = {
        "train_batch_size": args.batch_size * args.dp_size,
        "train_micro_batch_size_per_gpu": args.batch_size,
        "zero_optimization": {"stage": args.zero_stage},
        "tensor_parallel": {"autotp_size": args.tp_size},
        "data_parallel_size": args.dp_size,
    }
    if args.precision != "fp32":
        ds_config[args.precision] = {"enabled": True}

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    engine, _, _, _ = plan.initialize(model, optimizer=optimizer, config=ds_config)

    # one stream of tokens per data-parallel rank: the TP ranks of one draw the same, and nothing is broadcast
    generator = torch.Generator().manual_seed(plan.ranks.dp_rank)
    for step in range(args.num_steps):
        tokens = torch.randint(model.config.vocab_size, (args.batch_size, args.seq_length), generator=generator)
        tokens = tokens.to(plan.ranks.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0:
            print(f"step {step + 1}/{args.num_steps}  loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
