"""How a plan is to be trained: what an estimate is asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas.errors import Fault, OptionError
from autotp_plan.schemas.plan.document import Plan

OPTIMIZERS = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0, "momentum": 1}
"""Optimizers by name, and the tensors of a weight's size that each keeps for it."""

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Dtypes of the weights, and the bytes of an element."""

OFFLOADS = ("none", "optimizer")
DEVICES = ("cuda", "cpu")
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a plan is to be trained.

    Attributes:
        dp_size: number of data-parallel ranks.
        zero_stage: 0 to 3.
        micro_batch_size: sequences that a data-parallel rank is given at a time.
        seq_length: tokens of a sequence.
        gradient_accumulation_steps: forwards and backwards of one step.
        dtype: of the weights: `bf16`, `fp16` or `fp32`.
        optimizer: one of `OPTIMIZERS`.
        offload: `none`, or `optimizer`: master weights and optimizer states lie in the memory of the host.
        activation_checkpointing: layers keep their inputs, and compute the rest again in the backward.
        selective_checkpointing: layers keep results of matrix products and all-reduces too; instead of the former.
        loss_chunks: the loss is computed from this many chunks of a rank's words; None: from all its logits at once.
        device: `cuda`: attention by fused kernels, as on a GPU; `cpu`: as on the CPU.
    """

    dp_size: int = 1
    zero_stage: int = 0
    micro_batch_size: int = 1
    seq_length: int = 4096
    gradient_accumulation_steps: int = 1
    dtype: str = "bf16"
    optimizer: str = "adamw"
    offload: str = "none"
    activation_checkpointing: bool = False
    selective_checkpointing: bool = False
    loss_chunks: int | None = None
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens that a data-parallel rank is given in a step."""
        return self.micro_batch_size * self.seq_length * self.gradient_accumulation_steps

    @property
    def recomputed(self) -> str | None:
        """`full` or `selective` activation checkpointing, as `load_model(activation_checkpointing=...)` is given it."""
        return "full" if self.activation_checkpointing else "selective" if self.selective_checkpointing else None

    def recomputing(self, kind: str | None) -> Settings:
        """The same with another `recomputed`."""
        return dataclasses.replace(
            self, activation_checkpointing=kind == "full", selective_checkpointing=kind == "selective"
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a weight."""
        return DTYPES[self.dtype]


def check_settings(settings: Settings, plan: Plan) -> None:
    """Check that a plan can be trained so.

    Raises:
        OptionError: a number is too small, a name is unknown, or a sequence is longer than the model takes.
    """
    faults = []
    for name in ("dp_size", "micro_batch_size", "seq_length", "gradient_accumulation_steps"):
        value = getattr(settings, name)
        if value < 1:
            faults.append(_fault(name, str(value), "a number from 1 on", "give a number from 1 on"))
    if settings.zero_stage not in range(4):
        faults.append(_fault("zero_stage", str(settings.zero_stage), "0, 1, 2 or 3", "give a stage of ZeRO"))
    named = (("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("offload", OFFLOADS), ("device", DEVICES))
    for name, known in named:
        value = getattr(settings, name)
        if value not in known:
            faults.append(_fault(name, value, " or ".join(known), f"give one of {', '.join(known)}"))
    if settings.offload == "optimizer" and settings.zero_stage == 0:
        faults.append(_fault("offload", "optimizer, at ZeRO stage 0", "stage 1, 2 or 3", "give a stage from 1 on"))
    if settings.activation_checkpointing and settings.selective_checkpointing:
        got = "activation_checkpointing and selective_checkpointing"
        faults.append(_fault("selective_checkpointing", got, "one of the two, or none", "leave one of them out"))
    if settings.loss_chunks is not None and settings.loss_chunks < 1:
        faults.append(_fault("loss_chunks", str(settings.loss_chunks), "a number from 1 on", "give a number from 1 on"))
    most = longest_sequence(plan)
    if most is not None and settings.seq_length > most:
        what = "a number of tokens that the model has positions for"
        faults.append(_fault("seq_length", str(settings.seq_length), f"at most {most}", f"{what}: at most {most}"))
    if faults:
        raise OptionError(faults)


def longest_sequence(plan: Plan) -> int | None:
    """The number of positions that the plan's model has; None where its config does not say."""
    config = plan.model.config or {}
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in _LENGTH_KEYS:
                if isinstance(part.get(key), int):
                    return int(part[key])
    return None


def of_ds_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a DeepSpeed config says of `Settings`; a key that it does not have is left out.

    Raises:
        OptionError: a value that the estimate does not understand.
    """
    found: dict[str, Any] = {}
    faults: list[Fault] = []

    def take(name: str, value: Any, kind: type) -> None:
        if value is None or value == "auto":
            return
        if isinstance(value, kind) and not isinstance(value, bool):
            found[name] = value
        else:
            faults.append(_fault(name, f"{json.dumps(value)[:80]} in {where}", f"a {kind.__name__}", "correct it"))

    zero = _section(config, "zero_optimization", where)
    take("zero_stage", zero.get("stage"), int)
    take("micro_batch_size", config.get("train_micro_batch_size_per_gpu"), int)
    take("gradient_accumulation_steps", config.get("gradient_accumulation_steps"), int)
    optimizer = _section(config, "optimizer", where)
    take("optimizer", optimizer.get("type"), str)
    if "optimizer" in found:
        found["optimizer"] = found["optimizer"].lower().removeprefix("fused")
        if found["optimizer"] == "sgd" and _section(optimizer, "params", where).get("momentum"):
            found["optimizer"] = "momentum"
    for section, dtype in (("bf16", "bf16"), ("fp16", "fp16")):
        if _section(config, section, where).get("enabled") is True:
            found["dtype"] = dtype
    if _section(zero, "offload_optimizer", where).get("device", "none") != "none":
        found["offload"] = "optimizer"
    if _section(zero, "offload_param", where).get("device", "none") != "none":
        faults.append(
            _fault(
                "offload", f"zero_optimization.offload_param in {where}", "offload of the optimizer, or none",
                "estimate without offload_param: the weights of a rank then count as held by its device",
            )
        )  # fmt: skip
    if faults:
        raise OptionError(faults)
    return found


def _section(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = config.get(name)
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise OptionError(_fault(name, f"{json.dumps(value)[:80]} in {where}", "an object", "correct it"))


def _fault(where: str, got: str, expected: str, next_step: str) -> Fault:
    return Fault(
        code="estimate-setting",
        what="a training step cannot be estimated so",
        where=where,
        got=got,
        expected=expected,
        next=next_step,
    )
