"""How a plan is trained: what is refused, and what a DeepSpeed config says."""

from __future__ import annotations

from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.schemas.errors import OptionError
from autotp_plan.schemas.estimate.settings import Settings, check_settings, longest_sequence, of_ds_config
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import write_llama


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return compile_plan(
        write_llama(tmp_path_factory.mktemp("settings") / "llama", max_position_embeddings=128), tp_size=2
    )


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"dp_size": 0}, "dp_size"),
        ({"micro_batch_size": -1}, "micro_batch_size"),
        ({"seq_length": 0}, "seq_length"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"dtype": "fp8"}, "dtype"),
        ({"optimizer": "adamx"}, "optimizer"),
        ({"offload": "disk"}, "offload"),
        ({"offload": "optimizer", "zero_stage": 0}, "offload"),
        ({"device": "tpu"}, "device"),
        ({"activation_checkpointing": True, "selective_checkpointing": True}, "selective_checkpointing"),
        ({"loss_chunks": 0}, "loss_chunks"),
        ({"seq_length": 10**7}, "seq_length"),
    ],
)
def test_what_is_refused(plan: Plan, given: dict[str, Any], where: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_settings(Settings(**{"seq_length": 8, **given}), plan)
    (fault,) = caught.value.faults
    assert (fault.code, fault.where) == ("estimate-setting", where)


def test_a_sequence_of_all_positions(plan: Plan) -> None:
    most = longest_sequence(plan)
    assert most is not None and most == 128
    check_settings(Settings(seq_length=most), plan)


def test_a_ds_config() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": True},
        "optimizer": {"type": "FusedAdam", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    assert of_ds_config(config, "ds.json") == {
        "micro_batch_size": 2, "gradient_accumulation_steps": 4, "dtype": "bf16", "optimizer": "adam", "zero_stage": 3,
        "offload": "optimizer",
    }  # fmt: skip
    assert of_ds_config({"train_micro_batch_size_per_gpu": "auto"}, "ds.json") == {}
    momentum = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
    assert of_ds_config(momentum, "ds.json") == {"optimizer": "momentum"}


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"zero_optimization": 2}, "zero_optimization"),
        ({"zero_optimization": {"stage": "two"}}, "zero_stage"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps"),
    ],
)
def test_a_ds_config_that_is_refused(config: dict[str, Any], where: str) -> None:
    with pytest.raises(OptionError) as caught:
        of_ds_config(config, "ds.json")
    assert caught.value.faults[0].where == where and "ds.json" in caught.value.faults[0].got
