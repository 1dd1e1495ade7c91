"""Train a model that is not from transformers, by a plan that is inferred from the model itself and proven.

    .venv/bin/python examples/own_model/train.py prepare example-run/own_model
    .venv/bin/torchrun --nproc-per-node 2 examples/own_model/train.py train example-run/own_model

`prepare` writes a random checkpoint, compiles a plan for it and pre-splits it; on the command line the plan is made by
`cd examples/own_model; autotp-plan compile --module gpt:GPT --model CHECKPOINT --tp 2 -o plan.json`. `train` loads each
rank's shards and takes ten steps on random tokens.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from gpt import GPT  # noqa: E402 - the model lies beside this file


def prepare(folder: Path) -> None:
    from safetensors.torch import save_file

    from autotp_plan.factories.module_factory import ModuleFactory
    from autotp_plan.inference.infer import infer_rules
    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.runtime import try_plan

    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = dict(GPT().named_parameters())
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
    factory = ModuleFactory(name="gpt:GPT")
    plan = compile_plan(
        checkpoint, tp_size=2, factory=factory, infer=infer_rules, prove=partial(try_plan, factory=factory)
    )
    (folder / "plan.json").write_text(plan.to_json())
    presplit(plan, checkpoint, folder / "shards")
    print(f"wrote {folder / 'plan.json'} and {folder / 'shards'}")


def train(folder: Path) -> None:
    from autotp_plan.runtime import load_plan

    plan = load_plan(folder / "plan.json")
    model = plan.load_model(folder / "shards", model=GPT)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    }
    engine, _, _, _ = plan.initialize(model, config=config)
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(plan.ranks.dp_rank))
    for step in range(1, 11):
        loss, _ = engine(tokens.to(plan.ranks.device), tokens.to(plan.ranks.device))
        engine.backward(loss)
        engine.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step}/10  loss {loss.item():.6f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"prepare": prepare, "train": train}[sys.argv[1]](Path(sys.argv[2]))
