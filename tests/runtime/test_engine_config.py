"""The DeepSpeed config of `initialize`: what DeepSpeed cannot take is refused with the key, not by its own error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.planner.sequence_parallel import with_sequence_parallel
from autotp_plan.runtime.deepspeed.engine_config import check_settings, engine_config, unread_checkpointing
from autotp_plan.schemas.errors import MismatchError
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import write_llama

RIGHT: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
    "gradient_clipping": 1.0,
}


class OneRank:
    """A mesh of one rank."""

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_world_size(self) -> int:
        return 1


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return compile_plan(write_llama(tmp_path_factory.mktemp("llama")), tp_size=1)


def check(config: dict[str, Any], plan: Plan) -> None:
    check_settings(engine_config(config, plan), OneRank())


def test_a_right_config_passes(plan: Plan) -> None:
    check(RIGHT, plan)
    check({**RIGHT, "bf16": {"enabled": True}, "train_batch_size": 4, "gradient_accumulation_steps": 4}, plan)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("train_micro_batch_size_per_gpu", "x"), ("train_micro_batch_size_per_gpu", [1]),
        ("train_micro_batch_size_per_gpu", -1), ("optimizer", "adam"), ("optimizer", [1]), ("optimizer", {"type": 3}),
        ("zero_optimization", "1"), ("zero_optimization", {"stage": "x"}), ("zero_optimization", {"stage": 9}),
        ("bf16", "x"), ("bf16", {"enabled": "x"}), ("fp16", 3), ("gradient_clipping", "x"), ("gradient_clipping", True),
        ("gradient_accumulation_steps", "2"), ("scheduler", 3), ("scheduler", []), ("steps_per_print", "x"),
        ("activation_checkpointing", 3), ("flops_profiler", "x"), ("communication_data_type", 3), ("data_types", 4),
        ("tensor_parallel", 3), ("tensor_parallel", [1]), ("tensor_parallel", {"tp": 3}),
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_refused_with_its_key(plan: Plan, where: str, value: Any) -> None:
    with pytest.raises(MismatchError) as caught:
        check({**RIGHT, where: value}, plan)
    (fault,) = caught.value.faults
    assert (fault.code, fault.where) == ("wrong-deepspeed-value", where), fault
    assert type(value).__name__ in fault.got and fault.next.startswith("correct the value")


@pytest.mark.parametrize("size", ["1", 1.0, True, None, [1]])
def test_a_tp_size_of_a_wrong_type_says_so(plan: Plan, size: Any) -> None:
    """Not `got: 1, expected: 1`."""
    with pytest.raises(MismatchError) as caught:
        check({**RIGHT, "tensor_parallel": {"autotp_size": size}}, plan)
    (fault,) = caught.value.faults
    assert fault.where == "tensor_parallel.autotp_size" and fault.got.startswith(type(size).__name__)


def test_activation_checkpointing_that_nothing_reads_is_named(plan: Plan) -> None:
    asks = engine_config({**RIGHT, "activation_checkpointing": {"partition_activations": True, "profile": False}}, plan)
    said = unread_checkpointing(asks, is_read=False)
    assert said is not None and "activation_checkpointing (partition_activations)" in said
    assert unread_checkpointing(asks, is_read=True) is None
    for section in ({}, {"partition_activations": False, "number_checkpoints": None}, None):
        assert unread_checkpointing({**RIGHT, "activation_checkpointing": section}, is_read=False) is None


def test_deep_compile_of_a_sharded_stream_is_refused(tmp_path: Path) -> None:
    plan = compile_plan(write_llama(tmp_path), tp_size=2)
    asked = {**RIGHT, "compile": {"deepcompile": True}}
    engine_config(asked, plan)
    sharded = with_sequence_parallel(plan)
    engine_config({**RIGHT, "compile": {"deepcompile": False}}, sharded)
    with pytest.raises(MismatchError, match=r"compile\.deepcompile") as refused:
        engine_config(asked, sharded)
    assert "leave the key out" in refused.value.faults[0].next
    engine_config(RIGHT, sharded)
