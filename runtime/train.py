"""Train a pre-split model on text or on synthetic tokens.

    torchrun --nproc-per-node 4 -m autotp_plan.runtime.train --plan plan.json --shards SHARDS --dp-size 2 \\
        --zero-stage 2 --batch-size 1 --seq-length 512 --num-steps 20 --data texts/

A short program on purpose: the loop is DeepSpeed's own, and copying it is how to start your own. Rank 0 alone prints.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import AutoTPError, Fault, MismatchError
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from autotp_plan.runtime.data.text import TokenDataset

_PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--plan", "plan_file", type=_PATH, required=True, help="Plan file.")
@click.option("--shards", type=_PATH, required=True, help="Shards folder, or the original checkpoint.")
@click.option("--dp-size", type=click.IntRange(1), help="Data-parallel size; processes / tp_size when left out.")
@click.option("--zero-stage", type=click.IntRange(0, 3), help="ZeRO stage; 0 unless the DeepSpeed config says more.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Sequences per data-parallel rank and micro-step; default 1."
)
@click.option("--seq-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens per sequence.")
@click.option("--num-steps", type=click.IntRange(1), default=20, show_default=True, help="Optimizer steps.")
@click.option("--learning-rate", type=float, help="Default 1e-4, or what the DeepSpeed config says.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto: bf16 for a BF16 checkpoint, else fp32.")  # fmt: skip
@click.option("--data", type=_PATH, help="Text file, or a folder of them; synthetic tokens when left out.")
@click.option("--ds-config", type=_PATH, help="DeepSpeed config to start from; the options above win over it.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of data order, dropout and synthetic tokens."
)
@click.option("--metrics", type=_PATH, help="File for one JSON line per step.")
@click.option("--checkpoints", type=_PATH, help="Folder to save the job in, and to go on from when it holds one.")
@click.option("--save-every", type=click.IntRange(1), help="Steps between saves; at the end only when left out.")
@click.option("--save-shards", type=_PATH, help="New folder for the trained weights, for `autotp-plan merge`.")
@click.option("--local_rank", type=int, hidden=True, expose_value=False, help="The deepspeed launcher gives it.")
def main(**options: Any) -> None:
    """Train a pre-split model under DeepSpeed, with the plan's tensor parallelism and ZeRO."""
    _be_quiet()
    try:
        _train(**options)
    except AutoTPError as error:
        click.echo("\n".join(f"error: {fault}" for fault in error.faults), err=True)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _train(
    plan_file: Path, shards: Path, dp_size: int | None, seq_length: int, num_steps: int, data: Path | None, seed: int,
    metrics: Path | None, checkpoints: Path | None, save_every: int | None, save_shards: Path | None, **options: Any,
) -> None:  # fmt: skip
    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.checkpoint.job import LATEST_NAME
    from autotp_plan.runtime.data.sampler import endless

    if save_shards is not None and (save_shards / MANIFEST_NAME).exists():
        raise MismatchError(
            Fault(
                what="the shards could not be saved after training",
                where="--save-shards",
                got=f"{save_shards}, which holds finished shards",
                expected="a new folder",
                next="give another folder",
            )
        )
    plan = load_plan(plan_file)
    _check_world(plan.tp_size, dp_size)
    config = _deepspeed_config(plan.document, **options)
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    started = time.monotonic()
    model = plan.load_model(shards, dtype=dtype)
    report = _Report(metrics if _is_first() else None, _is_first())
    report.say(f"loaded rank 0 of {plan.tp_size} from {shards} in {time.monotonic() - started:.1f} s")
    needed = num_steps * plan.ranks.dp_size * config["train_micro_batch_size_per_gpu"]
    needed *= config.get("gradient_accumulation_steps", 1) * seq_length
    dataset = _dataset(data, shards, model, seq_length, needed, seed)
    torch.manual_seed(seed + plan.ranks.dp_rank)  # of dropout: the same on all TP ranks of a group
    engine, _, loader, _ = plan.initialize(model, config=config, training_data=dataset, seed=seed)
    engine.train()
    if checkpoints is not None and (checkpoints / LATEST_NAME).exists():
        _resume(plan, engine, checkpoints, len(dataset))
        report.say(f"going on after step {engine.global_steps} of {checkpoints}")
    report.begin(engine.global_steps)
    batches = endless(loader)
    for step in range(engine.global_steps + 1, num_steps + 1):
        began = time.monotonic()
        loss_sum, tokens = torch.zeros(()), 0
        for _ in range(engine.gradient_accumulation_steps()):
            batch = {key: value.to(plan.ranks.device) for key, value in next(batches).items()}
            loss = engine(**batch, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach().float().cpu()
            tokens += batch["input_ids"].numel() * plan.ranks.dp_size
        mean = loss_sum.to(plan.ranks.device) / engine.gradient_accumulation_steps() / plan.ranks.dp_size
        torch.distributed.all_reduce(mean, group=plan.ranks.dp_group)
        report.step(step, num_steps, mean.item(), tokens / (time.monotonic() - began), plan.ranks.device)
        if checkpoints is not None and (step == num_steps or (save_every and step % save_every == 0)):
            plan.save_checkpoint(engine, checkpoints, client_state={"windows": len(dataset)})
    if save_shards is not None:
        plan.save_shards(engine, save_shards)
        report.say(f"saved the weights in {save_shards}; `autotp-plan merge` makes a checkpoint of them")


def _resume(plan: Any, engine: Any, checkpoints: Path, windows: int) -> None:
    saved = plan.load_checkpoint(engine, checkpoints).get("windows")
    if saved != windows:
        raise MismatchError(
            Fault(
                what="the data is not that of the saved job",
                where=str(checkpoints),
                got=f"{windows} sequences",
                expected=f"{saved} sequences",
                next="give the --data, --seq-length, --batch-size and --num-steps that the job was begun with",
            )
        )


class _Report:
    """What rank 0 shows of each step, and the metrics file."""

    def __init__(self, metrics: Path | None, speaks: bool) -> None:
        self.metrics, self.speaks = metrics, speaks

    def begin(self, last_step: int) -> None:
        """Keep the metrics of the steps that a resumed job has done, and no others."""
        if self.metrics:
            lines = self.metrics.read_text(encoding="utf-8").splitlines(True) if self.metrics.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
            documents.write_atomically(self.metrics, "".join(kept))

    def say(self, text: str) -> None:
        if self.speaks:
            click.echo(text)

    def step(self, step: int, num_steps: int, loss: float, speed: float, device: torch.device) -> None:
        memory = _memory(device)
        self.say(f"step {step:>{len(str(num_steps))}}/{num_steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  {memory}")
        if self.metrics:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss, "tokens_per_second": speed}) + "\n")


def _be_quiet() -> None:
    """Leave the terminal to this program: DeepSpeed and torch speak at import, on every rank."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not _is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it stays open as long as the process
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecated. Please use.*_single")
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)


def _check_world(tp_size: int, dp_size: int | None) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dp_size is not None and world_size != tp_size * dp_size:
        raise MismatchError(
            Fault(
                what="the number of processes does not fit the plan",
                where="world size",
                got=f"{world_size} processes",
                expected=f"{tp_size * dp_size}: tp_size {tp_size} of the plan x --dp-size {dp_size}",
                next=f"launch with torchrun --nproc-per-node {tp_size * dp_size}, or change --dp-size",
            )
        )


def _deepspeed_config(
    plan: Any,
    ds_config: Path | None,
    zero_stage: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    precision: str,
) -> dict[str, Any]:
    config: dict[str, Any] = documents.read_json(ds_config, "DeepSpeed config") if ds_config else {}
    if not isinstance(config, dict):
        raise MismatchError(
            Fault(what="the DeepSpeed config is not a JSON object", where=str(ds_config), got=type(config).__name__)
        )
    if batch_size is not None or not {"train_batch_size", "train_micro_batch_size_per_gpu"} & config.keys():
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = batch_size or 1
    if "train_micro_batch_size_per_gpu" not in config:
        raise MismatchError(
            Fault(
                what="the batch size of a rank is not given",
                where="train_micro_batch_size_per_gpu",
                got="train_batch_size alone",
                expected="train_micro_batch_size_per_gpu, or --batch-size",
                next="give --batch-size N",
            )
        )
    if zero_stage is not None:
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": zero_stage}
    if "optimizer" not in config:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
    if learning_rate is not None:
        config["optimizer"].setdefault("params", {})["lr"] = learning_rate
    dtypes = {parameter.dtype for parameter in plan.parameters}
    if precision == "bf16" or (precision == "auto" and "BF16" in dtypes and "bf16" not in config):
        config["bf16"] = {"enabled": True}
    elif precision == "fp32":
        config.pop("bf16", None)
    config.setdefault("steps_per_print", 10**9)
    return config


def _dataset(
    data: Path | None, shards: Path, model: torch.nn.Module, seq_length: int, needed: int, seed: int
) -> TokenDataset:
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens, text_tokens

    if data is None:
        vocab_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return TokenDataset(synthetic_tokens(vocab_size, needed, seed), seq_length)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(shards))
    except (OSError, ValueError) as error:
        raise MismatchError(
            Fault(
                what="there is no tokenizer to read the text with",
                where=str(shards),
                got=str(error).splitlines()[0],
                expected="the tokenizer's files beside the weights",
                next="put them into the checkpoint and pre-split again, or leave out --data",
            )
        ) from None
    return TokenDataset(text_tokens(data, tokenizer, limit=needed), seq_length)


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB at most on the device"
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return f"{kib / 1024:,.0f} MiB"


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _program() -> None:
    """`main`, without tearing the interpreter down after it: a thread of gloo's may then abort a run that went well.

    Seen once in some hundred runs as "terminate called without an active exception", after the last file was written.
    """
    try:
        main()
    except SystemExit as ending:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code if isinstance(ending.code, int) else ending.code is not None)


if __name__ == "__main__":
    _program()
