"""From the options of `runtime.train` to a DeepSpeed config and a dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens, text_tokens
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import Fault, MismatchError, OptionError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.untrusted.plain_files import not_plain
from autotp_plan.sources.model_folder import model_folder


def check_dp_size(tp_size: int, dp_size: int | None) -> None:
    """Check that there are as many processes as the plan and `--dp-size` ask for.

    Raises:
        MismatchError: there are more or fewer.
    """
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


def deepspeed_config(
    plan: Plan,
    ds_config: Path | None,
    zero_stage: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    precision: str,
) -> dict[str, Any]:
    """The DeepSpeed config of a job: that of `--ds-config`, and what other options say.

    Args:
        plan: the plan.
        ds_config: `--ds-config`, a JSON file, or None.
        zero_stage: `--zero-stage`, or None for what the config says.
        batch_size: `--batch-size`, or None for what the config says, else 1.
        learning_rate: `--learning-rate`, or None for what the config says, else 1e-4.
        precision: `auto`, `fp32` or `bf16`.

    Returns:
        A config with `train_micro_batch_size_per_gpu` and an optimizer.

    Raises:
        OptionError: the config is no object, or says a batch size of all ranks together alone.
        DocumentError: the config file cannot be read.
    """
    config: dict[str, Any] = documents.read_json(ds_config, "DeepSpeed config") if ds_config else {}
    if not isinstance(config, dict):
        raise OptionError(
            Fault(what="the DeepSpeed config is not a JSON object", where=str(ds_config), got=type(config).__name__)
        )
    if batch_size is not None or not {"train_batch_size", "train_micro_batch_size_per_gpu"} & config.keys():
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = batch_size or 1
    if "train_micro_batch_size_per_gpu" not in config:
        raise OptionError(
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


def dataset(
    data: Path | None, shards: str, model: torch.nn.Module, seq_length: int, needed: int, seed: int
) -> TokenDataset:
    """The data of `--data`, or synthetic tokens.

    Args:
        data: a text file or a folder of them, or None.
        shards: the folder that the model was loaded from, which holds the tokenizer.
        model: the model, whose vocabulary synthetic tokens are of.
        seq_length: tokens per sequence.
        needed: number of tokens after which reading stops.
        seed: of synthetic tokens.

    Raises:
        DataError: the text cannot be read, or is too short.
        MismatchError: there is no tokenizer.
    """
    if data is None:
        vocab_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return TokenDataset(synthetic_tokens(vocab_size, needed, seed), seq_length)
    from transformers import AutoTokenizer

    try:
        place = model_folder(shards)
        place.complete()
        if others := not_plain(place.folder):
            raise OSError(f"{', '.join(others)}: no plain file, and might be waited for without end")
        tokenizer = AutoTokenizer.from_pretrained(str(place.folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise MismatchError(_tokenizer_of_code(shards)) from None
        raise MismatchError(
            Fault(
                what="there is no tokenizer to read the text with",
                where=str(shards),
                got=str(error).splitlines()[0],
                expected="the tokenizer's files next to the weights",
                next="put them into the checkpoint and pre-split again, or leave out --data",
            )
        ) from None
    return TokenDataset(text_tokens(data, tokenizer, limit=needed), seq_length)


def _tokenizer_of_code(shards: str) -> Fault:
    return Fault(
        code="tokenizer-of-code",
        what="the tokenizer is code in the folder, which is never run",
        where=str(shards),
        got="an auto_map in tokenizer_config.json or config.json",
        expected="a tokenizer that transformers has",
        next="read the code; if you trust it, use it in a loop of your own (plan.initialize), or save the tokenizer as "
        "a fast one (tokenizer.json, without auto_map) and pre-split again",
    )
