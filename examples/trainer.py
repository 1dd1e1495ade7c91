"""Hugging Face's Trainer on a plan: train, evaluate, save, resume.

    .venv/bin/torchrun --nproc-per-node 4 examples/trainer.py --model_name tiny-llama --tp_size 2 --num_steps 6

Two lines differ from a script without tensor parallelism: `plan.load_model` in place of `from_pretrained`, and
`plan.adapt_trainer(trainer)`. `--dense` is that script: run with plain python and twice the `--batch_size`, it takes
the same steps. `--output_dir` gets Trainer's checkpoints, from which `--resume FOLDER` goes on, and `final/`, a plain
checkpoint that `from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import json

import torch
from tiny import HELP, RUN, checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from autotp_plan.planner import compile_plan
from autotp_plan.runtime import TrainingPlan
from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train with Hugging Face's Trainer and a plan's tensor parallelism.")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the deepspeed launcher")
    parser.add_argument("--model_name", default="tiny-llama", help=HELP)
    parser.add_argument("--tp_size", type=int, default=2)
    parser.add_argument("--zero_stage", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seq_length", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output_dir", default=str(RUN / "trainer"))
    parser.add_argument("--resume", metavar="FOLDER", help="go on from a checkpoint of Trainer's")
    parser.add_argument("--dense", action="store_true", help="the whole model in one process, without DeepSpeed")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    folder = checkpoint(args.model_name)
    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": args.zero_stage},
    }
    training_args = TrainingArguments(
        args.output_dir,
        deepspeed=None if args.dense else ds_config,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=args.num_steps,
        learning_rate=args.learning_rate,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.num_steps // 2,
        save_steps=args.num_steps // 2,
        use_cpu=not torch.accelerator.is_available(),  # Accelerate sees one process on a machine without accelerator
        report_to=[],
        disable_tqdm=True,
    )
    if args.dense:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    else:
        plan = TrainingPlan(compile_plan(folder, tp_size=args.tp_size))
        model = plan.load_model(folder)

    vocab_size, length = model.config.vocab_size, args.seq_length
    trainer = Trainer(
        model,
        training_args,
        train_dataset=TokenDataset(synthetic_tokens(vocab_size, 64 * length, seed=0), length),
        eval_dataset=TokenDataset(synthetic_tokens(vocab_size, 10 * length, seed=1), length),
        processing_class=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    if not args.dense:
        plan.adapt_trainer(trainer)
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(args.output_dir + "/final")
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            shown = {key: entry[key] for key in ("step", "loss", "eval_loss", "grad_norm") if key in entry}
            print(json.dumps({**shown, "batch_size": trainer.get_total_train_batch_size(training_args)}))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
