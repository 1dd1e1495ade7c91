"""Make a folder of everything that this version writes, small, for later versions to read:

    torchrun --nproc-per-node 2 -m tests.golden.make FOLDER

A checkpoint, its plans, its shards at TP=2, a job that was saved after two steps at TP=2 under ZeRO 1, the shards that
this job wrote, and the losses of the steps that followed. It says everything through public names.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NUM_STEPS, SAVED_AT = 4, 2
CONFIG = {
    "model_type": "phi3", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-3, "torch_adam": True}},
    "steps_per_print": 10**9,
}


def windows() -> Any:
    """Eight samples of six tokens."""
    import torch

    tokens = torch.randint(64, (8, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def steps(engine: Any, batches: Iterable[Any]) -> list[float]:
    """The loss of an optimizer step for each of `batches`."""
    found = []
    for batch in batches:
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def write(folder: Path) -> None:
    """What one process does before ranks train."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotp_plan.planner import compile_plan, presplit

    torch.manual_seed(0)
    values = dict(CONFIG)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint", max_shard_size="20KB")
    for tp_size in (1, 2, 4):
        (folder / f"tp{tp_size}.json").write_text(compile_plan(folder / "checkpoint", tp_size=tp_size).to_json())
    presplit(compile_plan(folder / "checkpoint", tp_size=2), folder / "checkpoint", folder / "shards")


def train(folder: Path) -> None:
    """What the ranks do."""
    import torch

    from autotp_plan.runtime import load_plan

    plan = load_plan(folder / "tp2.json")
    model = plan.load_model(folder / "shards").train()
    engine, _, loader, _ = plan.initialize(model, config=SETTINGS, training_data=windows())
    before = steps(engine, itertools.islice(loader, SAVED_AT))
    plan.save_checkpoint(engine, folder / "job", client_state={"made_by": "tests.golden.make"})
    plan.save_shards(engine, folder / "trained")
    loader.data_sampler.set_epoch(0)
    rest = iter(loader)
    epoch = [next(rest) for _ in range(NUM_STEPS)]
    after = steps(engine, epoch[SAVED_AT:])
    if torch.distributed.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps({"before": before, "after": after}) + "\n")


def main() -> None:
    """Write the folder that the command names."""
    import torch

    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "0":
        folder.mkdir()
        write(folder)
    torch.distributed.barrier()
    train(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
