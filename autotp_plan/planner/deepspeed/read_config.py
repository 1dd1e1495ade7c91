"""A DeepSpeed JSON config as people have it today: its `tensor_parallel` section, applied or refused.

Field by field as `TPTrainingConfig` and `AutoTPConfig` of DeepSpeed 0.19.8 read it
(deepspeed/runtime/tensor_parallel/config.py, deepspeed/module_inject/autotp_config.py). Fields that DeepSpeed parses
and never reads are noted, not obeyed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import DocumentError, Fault
from autotp_plan.schemas.spec import SpecFile

_DTYPES = {
    "fp32": "float32", "float": "float32", "float32": "float32", "torch.float32": "float32",
    "fp16": "float16", "half": "float16", "float16": "float16", "torch.float16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16", "torch.bfloat16": "bfloat16",
}  # fmt: skip

_KNOWN = frozenset(
    {"autotp_size", "preset_model", "partition_config", "dtype", "tp_overlap_comm", "vocab_parallel_lm_head"}
    | {"vocab_parallel_ce_backend", "tensor_parallel", "tp", "injection_policy_tuple", "keep_module_on_host"}
    | {"replace_with_kernel_inject", "kernel_inject"}
)

_KNOWN_NESTED = frozenset({"tp_size", "tp_grain_size", "mpu", "tp_group"})

_IGNORED_PARTITION_KEYS = {
    "tp_size": "DeepSpeed overwrites it with autotp_size",
    "embedding_partition_dim": "DeepSpeed never reads it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallelSection:
    """What a `tensor_parallel` section asks for, in our words; `written` is the section itself."""

    tp_size: int | None = None
    preset_model: str | None = None
    partition_config: SpecFile | None = None
    dtype: str | None = None
    tp_overlap_comm: bool = False
    vocab_parallel_lm_head: bool | None = None
    strict_mode: bool = False
    head_names: tuple[str, ...] = ("lm_head", "embed_out")
    notes: tuple[str, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)


def read_deepspeed_config(path: Path) -> TensorParallelSection:
    """The `tensor_parallel` section of the DeepSpeed config in `path`.

    Raises:
        DocumentError: with every fault found.
    """
    config = documents.read_json(path, "DeepSpeed config")
    if not isinstance(config, dict):
        raise DocumentError(_fault(str(path), type(config).__name__, "a JSON object, as DeepSpeed reads it"))
    if "tensor_parallel" not in config:
        known = "a tensor_parallel section"
        hint = next(filter(None, (documents.did_you_mean(key, ["tensor_parallel"]) for key in config)), "")
        raise DocumentError(_fault(str(path), "keys " + ", ".join(sorted(config)), known, hint))
    return parse_section(config["tensor_parallel"])


def parse_section(section: Any) -> TensorParallelSection:
    """What a `tensor_parallel` section, a JSON value, asks for.

    Raises:
        DocumentError: with every fault found.
    """
    if not isinstance(section, dict):
        raise DocumentError(_fault("tensor_parallel", type(section).__name__, "a JSON object"))
    faults: list[Fault] = []
    notes: list[str] = []
    for key in sorted(section.keys() - _KNOWN):
        hint = documents.did_you_mean(key, _KNOWN)
        faults.append(_fault(f"tensor_parallel.{key}", key, "a key that DeepSpeed knows", hint))
    tp_size = _typed(section, "autotp_size", int, faults)
    if tp_size is not None and tp_size < 0:
        faults.append(_fault("tensor_parallel.autotp_size", str(tp_size), "a positive integer"))
    _check_nested(section.get("tensor_parallel", section.get("tp", {})), tp_size, faults, notes)
    if section.get("replace_with_kernel_inject") or section.get("kernel_inject"):
        faults.append(
            _fault("tensor_parallel.replace_with_kernel_inject", "true", "false: kernels are for inference only")
        )
    if section.get("injection_policy_tuple"):
        faults.append(
            _fault("tensor_parallel.injection_policy_tuple", "a policy", "none: say it as partition_config.layer_specs")
        )
    if section.get("keep_module_on_host"):
        notes.append("keep_module_on_host is not applied: a rank reads only its own shard, straight to its device.")
    backend = section.get("vocab_parallel_ce_backend", "torch")
    if backend != "torch":
        faults.append(_fault("tensor_parallel.vocab_parallel_ce_backend", repr(backend), '"torch"'))
    vocab_parallel = _typed(section, "vocab_parallel_lm_head", bool, faults)
    if vocab_parallel:
        notes.append(
            "vocab_parallel_lm_head: the head is cut by vocabulary and its output gathered; "
            "the loss is computed on full logits."
        )
    dtype = section.get("dtype")
    if dtype is not None and _DTYPES.get(str(dtype)) is None:
        faults.append(_fault("tensor_parallel.dtype", repr(dtype), "one of " + ", ".join(sorted(_DTYPES))))
    given = section.get("partition_config")
    partition = _partition_config(given, faults, notes)
    flags = given if isinstance(given, dict) else {}
    strict = _typed(flags, "strict_mode", bool, faults, "tensor_parallel.partition_config")
    result = TensorParallelSection(
        tp_size=tp_size or None,
        preset_model=_typed(section, "preset_model", str, faults),
        partition_config=partition,
        dtype=_DTYPES.get(str(dtype)) if dtype is not None else None,
        tp_overlap_comm=bool(_typed(section, "tp_overlap_comm", bool, faults)),
        vocab_parallel_lm_head=vocab_parallel,
        strict_mode=bool(strict),
        head_names=_head_names(flags, faults),
        notes=tuple(notes),
        written=section,
    )
    if faults:
        raise DocumentError(faults)
    return result


def _check_nested(nested: Any, tp_size: int | None, faults: list[Fault], notes: list[str]) -> None:
    """DeepSpeed's `TPConfig`, which training hardly reads."""
    if not isinstance(nested, dict):
        faults.append(_fault("tensor_parallel.tp", repr(nested), "a JSON object"))
        return
    for key in sorted(nested.keys() - _KNOWN_NESTED):
        hint = documents.did_you_mean(key, _KNOWN_NESTED)
        faults.append(_fault(f"tensor_parallel.tp.{key}", key, "a key that DeepSpeed knows", hint))
    for key in ("mpu", "tp_group"):
        if nested.get(key) is not None:
            faults.append(_fault(f"tensor_parallel.tp.{key}", repr(nested[key]), "null: a JSON file cannot hold it"))
    if nested.get("tp_size", 1) not in (1, tp_size):
        faults.append(_fault("tensor_parallel.tp.tp_size", repr(nested["tp_size"]), f"autotp_size ({tp_size})"))
    if nested.get("tp_grain_size", 1) != 1:
        notes.append("tp_grain_size is not applied: cuts fall between the units that the rules give.")


def _partition_config(data: Any, faults: list[Fault], notes: list[str]) -> SpecFile | None:
    if data is None:
        return None
    if isinstance(data, dict):
        for key, reason in _IGNORED_PARTITION_KEYS.items():
            if key in data:
                notes.append(f"partition_config.{key} is not applied: {reason}.")
        if "lm_head_patterns" in data:
            notes.append(
                "partition_config.lm_head_patterns counts for row-parallel heads; otherwise the preset or a rule of "
                "your own says which weight is the head."
            )
        ours = (*_IGNORED_PARTITION_KEYS, "strict_mode", "lm_head_patterns")
        data = {key: value for key, value in data.items() if key not in ours}
        if isinstance(data.get("layer_specs"), list):
            data["layer_specs"] = [_without_idle_keys(*one, notes) for one in enumerate(data["layer_specs"], 1)]
    try:
        return SpecFile.from_dict(data, "partition_config")
    except DocumentError as error:
        prefix = "tensor_parallel.partition_config."
        faults.extend(
            dataclasses.replace(f, where=(prefix + f.where).removesuffix(".the partition_config")) for f in error.faults
        )
        return None


def _without_idle_keys(number: int, rule: Any, notes: list[str]) -> Any:
    """A rule without `gather_output` where DeepSpeed does not look at it."""
    if not isinstance(rule, dict) or rule.get("gather_output") is not True:
        return rule
    kind = str(rule.get("partition_type", "column")).lower()
    if kind not in ("row", "skip"):
        return rule
    notes.append(f"gather_output of ds-config #{number} is not applied: it is for column, and the rule is {kind}.")
    return {key: value for key, value in rule.items() if key != "gather_output"}


def _head_names(partition: dict[str, Any], faults: list[Fault]) -> tuple[str, ...]:
    """`lm_head_patterns`: names of modules that are heads, whole names and no patterns."""
    names = partition.get("lm_head_patterns") or ["lm_head", "embed_out"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        where = "tensor_parallel.partition_config.lm_head_patterns"
        faults.append(_fault(where, repr(names), "a list of names of modules"))
        return ()
    return tuple(names)


def _typed(section: dict[str, Any], key: str, kind: type, faults: list[Fault], where: str = "tensor_parallel") -> Any:
    value = section.get(key)
    if value is None or type(value) is kind:
        return value
    names = {int: "an integer", bool: "true or false", str: "a string"}
    faults.append(_fault(f"{where}.{key}", repr(value), names[kind]))
    return None


def _fault(where: str, got: str, expected: str, hint: str = "") -> Fault:
    return Fault(
        code="deepspeed-config-value",
        what="the DeepSpeed config has a wrong value",
        where=where,
        got=got,
        expected=expected,
        next=hint or "correct it as DeepSpeed's AutoTP documentation says",
    )
