"""Train a pre-split model on text or on synthetic tokens.

    torchrun --nproc-per-node 4 -m autotp_plan.runtime.train --plan plan.json --shards SHARDS --dp-size 2 \\
        --zero-stage 2 --batch-size 1 --seq-length 512 --num-steps 20 --data texts/

A short program on purpose: the loop is DeepSpeed's, and copying it is how to write yours. Rank 0 alone prints.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from autotp_plan.schemas.errors import AutoTPError, CheckpointError, Fault, MismatchError

_PATH = click.Path(path_type=Path)
STOPPED = 75
"""The exit status of a job that a signal stopped and that saved: EX_TEMPFAIL of sysexits.h, "try again"."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--plan", "plan_file", type=_PATH, required=True, help="Plan file.")
@click.option(
    "--shards", required=True, help="Shards folder, or the original checkpoint: a folder, an id of the hub or a URL."
)
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
@click.option("--checkpoints", type=_PATH, help="Folder to save the job in, and to resume it from when it holds one.")
@click.option(
    "--resume",
    default="latest",
    show_default=True,
    help="What of --checkpoints to resume from: latest, auto (the newest that is sound), or a tag.",
)
@click.option("--trust-checkpoint", is_flag=True, help="Resume also from files that hold more than data.")
@click.option("--allow-nonfinite", is_flag=True, help="Train on where a loss, gradient or weight is NaN or inf.")
@click.option("--save-every", type=click.IntRange(1), help="Steps between saves; at the end only when left out.")
@click.option("--take-over", is_flag=True, help="Write to --checkpoints although its lock names another job.")
@click.option("--keep-last", type=click.IntRange(1), help="Checkpoints to keep; all when left out.")
@click.option("--save-shards", type=_PATH, help="New folder for the trained weights, for `autotp-plan merge`.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), help="Seconds that a rank waits for another; default 600."
)
@click.option(
    "--loss-chunks", type=click.IntRange(1), help="Compute the loss from this many chunks of the logits, one at a time."
)
@click.option(
    "--activation-checkpointing",
    type=click.Choice(["selective", "full"]),
    help="Compute again in the backward: selective: what is cheap; full: everything between inputs of layers.",
)
@click.option("--local_rank", type=int, hidden=True, expose_value=False, help="The deepspeed launcher gives it.")
def main(**options: Any) -> None:
    """Train a pre-split model under DeepSpeed, with the plan's tensor parallelism and ZeRO."""
    with _quiet():
        try:
            if not _train(**options):
                sys.exit(STOPPED)
        except AutoTPError as error:
            click.echo("\n".join(f"error: {fault}" for fault in error.faults), err=True)
            sys.exit(2)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _train(
    plan_file: Path, shards: str, dp_size: int | None, seq_length: int, num_steps: int, data: Path | None, seed: int,
    metrics: Path | None, checkpoints: Path | None, save_every: int | None, save_shards: Path | None,
    keep_last: int | None = None, take_over: bool = False, resume: str = "latest", trust_checkpoint: bool = False,
    timeout: float | None = None, allow_nonfinite: bool = False, loss_chunks: int | None = None,
    activation_checkpointing: str | None = None, **options: Any,
) -> bool:  # fmt: skip
    """Train; returns whether it came to its end, and was not asked to stop before."""
    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.data.loader import training_loader
    from autotp_plan.runtime.data.sampler import endless
    from autotp_plan.runtime.deepspeed.agreement import together
    from autotp_plan.runtime.stop_signals import StopSignals
    from autotp_plan.runtime.train_outputs import check_job_outputs
    from autotp_plan.runtime.train_report import Report
    from autotp_plan.runtime.train_setup import check_dp_size, dataset, deepspeed_config
    from autotp_plan.runtime.train_waits import Doing
    from autotp_plan.schemas.jobs.job_folder import is_job

    plan = load_plan(plan_file)
    check_dp_size(plan.tp_size, dp_size)
    config = deepspeed_config(plan.document, **options)
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    plan.init_mesh(timeout=timeout)  # by which all ranks hear of what one cannot write
    check_job_outputs(
        plan, config, dtype, checkpoints, save_shards, metrics, num_steps, save_every, keep_last, take_over
    )
    started = time.monotonic()
    model = plan.load_model(
        shards, dtype=dtype, loss_chunks=loss_chunks, activation_checkpointing=activation_checkpointing
    )
    ranks = plan.ranks
    report = Report(metrics, _is_first())
    report.say(f"loaded rank 0 of {plan.tp_size} from {shards} in {time.monotonic() - started:.1f} s")
    needed = num_steps * ranks.dp_size * config["train_micro_batch_size_per_gpu"]
    needed *= config.get("gradient_accumulation_steps", 1) * seq_length
    what_to_do = "give a --data that every rank can read"
    windows = together(
        lambda: dataset(data, shards, model, seq_length, needed, seed), "no data to train on", what_to_do
    )
    torch.manual_seed(seed + ranks.dp_rank)  # of dropout: the same on all TP ranks of a group
    engine, _, loader, _ = plan.initialize(
        model, config=config, training_data=windows, seed=seed, check_finite=not allow_nonfinite
    )
    engine.train()
    if checkpoints is not None and is_job(checkpoints):
        tag = _tag(resume, checkpoints)
        saved = plan.load_checkpoint(engine, checkpoints, tag, trust_checkpoint=trust_checkpoint)
        if saved.get("windows") != len(windows):  # begun with another --num-steps: go on with the data it had
            windows = dataset(data, shards, model, seq_length, saved.get("windows", 0) * seq_length, seed)
            _check_data(saved, windows, checkpoints)
            loader = training_loader(engine, windows, ranks, seed=seed)
            plan.load_checkpoint(
                engine, checkpoints, tag, trust_checkpoint=trust_checkpoint
            )  # the new loader's position
        _check_data(saved, windows, checkpoints)
        report.say(f"resumed after step {engine.global_steps} of {checkpoints}")
        if engine.global_steps >= num_steps:
            report.say(f"nothing to do: --num-steps {num_steps} are done")
    report.begin(engine.global_steps)
    batches = endless(loader)
    stop = StopSignals(ranks.device) if checkpoints is not None else None
    with Doing(timeout) as doing:
        for step in range(engine.global_steps + 1, num_steps + 1):
            began = time.monotonic()
            loss_sum, tokens = torch.zeros(()), 0
            for _ in range(engine.gradient_accumulation_steps()):
                batch = {key: value.to(ranks.device) for key, value in next(batches).items()}
                doing(f"the forward of step {step}")
                loss = engine(**batch, use_cache=False).loss
                doing(f"the backward of step {step}")
                engine.backward(loss)
                doing(f"the optimizer's part of step {step}")
                engine.step()
                loss_sum += loss.detach().float().cpu()
                tokens += batch["input_ids"].numel() * ranks.dp_size
            doing(f"the mean loss of step {step}")
            mean = loss_sum.to(ranks.device) / engine.gradient_accumulation_steps() / ranks.dp_size
            torch.distributed.all_reduce(mean, group=ranks.dp_group)
            report.step(step, num_steps, mean.item(), tokens / (time.monotonic() - began), ranks.device)
            stopping = stop is not None and stop.was_asked()
            if checkpoints is not None and (stopping or step == num_steps or (save_every and step % save_every == 0)):
                doing(f"saving the job after step {step}")
                state = _data_of(windows)
                plan.save_checkpoint(engine, checkpoints, None, state, keep_last=keep_last, take_over=take_over)
            if stopping and step < num_steps:
                report.say(f"asked to stop: saved after step {step}; the same command goes on")
                return False
        if save_shards is not None:
            doing("saving the shards")
            plan.save_shards(engine, save_shards)
            report.say(f"saved the weights in {save_shards}; `autotp-plan merge` makes a checkpoint of them")
    return True


def _tag(resume: str, checkpoints: Path) -> str | None:
    """The checkpoint to resume from; None for what the file `latest` names. Every rank calls it."""
    from autotp_plan.runtime.deepspeed.agreement import gathered
    from autotp_plan.schemas.jobs.job_folder import newest_sound

    if resume != "auto":
        return None if resume == "latest" else resume
    found = gathered(lambda: newest_sound(checkpoints) if _is_first() else None, "the checkpoints could not be read")[0]
    if found is None:
        raise CheckpointError(
            Fault(
                code="nothing-sound",
                what="there is no sound checkpoint to resume from",
                where=str(checkpoints),
                got="none whose bytes are those that were saved",
                expected="a folder that save_checkpoint wrote",
                next="`autotp-plan check` of that folder says what is wrong; a new folder starts from the shards",
            )
        )
    return found


def _data_of(windows: Any) -> dict[str, int]:
    """What a job remembers of its data: how many sequences there are, and how long each is."""
    return {"windows": len(windows), "seq_length": windows.windows.shape[1]}


def _check_data(saved: dict[str, Any], windows: Any, checkpoints: Path) -> None:
    mine = _data_of(windows)
    if {**mine, **saved} != mine:  # a job of version 0.1 does not say how long its sequences are
        raise MismatchError(
            Fault(
                what="the data is not that of the saved job",
                where=str(checkpoints),
                got=f"{mine['windows']} sequences of {mine['seq_length']} tokens",
                expected=f"{saved.get('windows')} sequences of {saved.get('seq_length', 'as many')} tokens",
                next="give the --data and --seq-length that the job was begun with",
            )
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While active, the terminal is this program's: DeepSpeed and torch print at import, on every rank."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecated. Please use.*_single")
    with contextlib.ExitStack() as stack:
        if not _is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            warnings.simplefilter("ignore")
        import deepspeed.utils

        deepspeed.utils.logger.setLevel(logging.WARNING)
        yield


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
