"""DeepSpeed's custom-patterns AutoTP example on a plan: GPT-NeoX by rules of one's own, on text, with a tokenizer.

    .venv/bin/torchrun --nproc-per-node 4 examples/custom_patterns.py --model_name tiny-gpt-neox --tp_size 2 \\
        --dp_size 2 --seq_length 64 --num_steps 10 --precision fp32

What differs from training/tensor_parallel/custom_patterns of DeepSpeedExamples: the layer_specs go to the planner
instead of into the DeepSpeed config; `load_model` and `plan.initialize` take the place of `from_pretrained` and
`deepspeed.initialize`; groups, `mpu` and sampler are the plan's. And one rule says the truth: GPT-NeoX interleaves q, k
and v per head, so `query_key_value` is one matrix whose units are heads. The three matrices one after the other that
the original's `shape` speaks of train with wrong numbers there; here they are refused (`--original_shape` shows it).
"""

from __future__ import annotations

import argparse
from itertools import count

import torch
import torch.distributed as dist
from tiny import HELP, checkpoint
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.runtime import TrainingPlan

HEADS = {"shape": [["3 * hidden_size"], -1], "unit": "3 * (hidden_size // num_attention_heads)"}
ORIGINAL = {"shape": [["hidden_size", "hidden_size", "hidden_size"], -1], "partition_dim": 0}
SENTENCES = [
    "A plan says where every weight is cut.",
    "A column-parallel layer computes some of the outputs.",
    "A row-parallel layer sees some of the inputs, and the ranks add up.",
    "Two ranks of one group read the same sentence.",
    "Two groups read different ones, and average what they learned.",
    "Heads stay whole; a cut goes between them.",
    "What is small is kept by everyone.",
    "The sum of the parts is the whole, to the last bit but a few.",
    "Padding is never learned from.",
    "The end of a sentence is a token too.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train GPT-NeoX on sentences by layer_specs of one's own.")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the deepspeed launcher")
    parser.add_argument("--model_name", default="tiny-gpt-neox", help=HELP)
    parser.add_argument("--tp_size", type=int, default=4)
    parser.add_argument("--dp_size", type=int, default=2)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=2e-6)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--original_shape", action="store_true", help="see the original's query_key_value refused")
    return parser.parse_args()


def layer_specs(query_key_value: dict[str, object]) -> SpecFile:
    return SpecFile.from_dict(
        {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [r".*attention\.query_key_value\.weight$"], "partition_type": "column", **query_key_value},
                {"patterns": [r".*attention\.dense\.weight$"], "partition_type": "row"},
                {"patterns": [r".*mlp\.dense_h_to_4h\.weight$"], "partition_type": "column"},
                {"patterns": [r".*mlp\.dense_4h_to_h\.weight$"], "partition_type": "row"},
                {"patterns": [r".*embed_in\.weight$", r"lm_head\.weight$"], "partition_type": "skip"},
            ],
        }
    )


class Sentences(Dataset[torch.Tensor]):
    def __init__(self, tokenizer: object, seq_length: int) -> None:
        tokens = [tokenizer(text, truncation=True, max_length=seq_length)["input_ids"] for text in SENTENCES]
        self.samples = [torch.tensor(sample) for sample in tokens]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.samples[index]


def collate(samples: list[torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Padded to the longest: never attended to, never learned from."""
    lengths = torch.tensor([len(sample) for sample in samples])
    input_ids = pad_sequence(samples, batch_first=True, padding_value=pad_token_id)
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": input_ids.masked_fill(~mask, -100)}


def main() -> None:
    args = parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]

    folder = checkpoint(args.model_name)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    specs = layer_specs(ORIGINAL if args.original_shape else HEADS)
    plan = TrainingPlan(compile_plan(folder, tp_size=args.tp_size, specs=[specs]))
    model = plan.load_model(folder, dtype=dtype)
    model.config.pad_token_id = tokenizer.pad_token_id

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

    dataset = Sentences(tokenizer, args.seq_length)
    sampler = plan.sampler(dataset, seed=args.seed)  # random, by DP rank: the TP ranks of one draw the same
    loader = DataLoader(dataset, args.batch_size, sampler=sampler, collate_fn=lambda samples: collate(samples, pad))
    pad = tokenizer.pad_token_id

    engine.train()
    for step, batch in zip(range(args.num_steps), epochs(loader, sampler)):
        batch = {key: value.to(plan.ranks.device, non_blocking=True) for key, value in batch.items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0:
            print(f"step {step + 1}/{args.num_steps}  loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


def epochs(loader, sampler):
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


if __name__ == "__main__":
    main()
