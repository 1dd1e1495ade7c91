"""Supervised fine-tuning with TRL's SFTTrainer on a plan.

    .venv/bin/torchrun --nproc-per-node 4 examples/trl_sft.py --model_name tiny-llama --tp_size 2 --num_steps 6

Two lines differ from a script without tensor parallelism: `plan.load_model` in place of `from_pretrained`, and
`plan.adapt_trainer(trainer)`. `--dense` is that script: run with plain python and twice the `--batch_size`, it takes
the same steps. `--data` is a JSON Lines file with a "text" in each line; without it some sentences are made up.
"""

from __future__ import annotations

import argparse
import json

import torch
from datasets import Dataset, load_dataset
from tiny import HELP, RUN, checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from autotp_plan.planner import compile_plan
from autotp_plan.runtime import TrainingPlan


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune with TRL and a plan's tensor parallelism.")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the deepspeed launcher")
    parser.add_argument("--model_name", default="tiny-llama", help=HELP)
    parser.add_argument("--data", metavar="FILE", help="JSON Lines with a text in each line")
    parser.add_argument("--tp_size", type=int, default=2)
    parser.add_argument("--zero_stage", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--num_steps", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output_dir", default=str(RUN / "trl_sft"))
    parser.add_argument("--dense", action="store_true", help="the whole model in one process, without DeepSpeed")
    return parser.parse_args()


def made_up() -> Dataset:
    """Sixty-four sums, as text."""
    return Dataset.from_list(
        [{"text": f"{one} and {other} are {one + other}"} for one in range(8) for other in range(8)]
    )


def main() -> None:
    args = parse_args()
    folder = checkpoint(args.model_name)
    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": args.zero_stage},
    }
    config = SFTConfig(
        args.output_dir,
        deepspeed=None if args.dense else ds_config,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.num_steps,
        learning_rate=args.learning_rate,
        logging_steps=1,
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    if args.dense:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    else:
        plan = TrainingPlan(compile_plan(folder, tp_size=args.tp_size))
        model = plan.load_model(folder)
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=load_dataset("json", data_files=args.data, split="train") if args.data else made_up(),
        processing_class=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    if not args.dense:
        plan.adapt_trainer(trainer)
    trainer.train()
    trainer.save_model(args.output_dir + "/final")
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            shown = {key: entry[key] for key in ("step", "loss", "grad_norm", "mean_token_accuracy") if key in entry}
            if "loss" in shown:
                print(json.dumps(shown))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
