"""The time of a step beside sums made by hand."""

from __future__ import annotations

import pytest

from autotp_plan.planner.estimate.hardware import Hardware
from autotp_plan.planner.estimate.step_time import Cluster, step_time
from autotp_plan.schemas.estimate.document import Traffic
from autotp_plan.schemas.estimate.settings import Settings

GPU = Hardware(
    name="a GPU",
    operations_per_s=100.0,
    efficiency=0.5,
    memory_bytes_per_s=30.0,
    inside_node_bytes_per_s=40.0,
    between_nodes_bytes_per_s=20.0,
    link_efficiency=0.5,
    inside_node_latency_s=0.25,
    between_nodes_latency_s=0.5,
)
CLUSTER = Cluster(gpus=16, per_node=8, hardware=GPU)


def sent(operation: str, group: str, count: int, size: int) -> Traffic:
    return Traffic(operation=operation, group=group, count=count, bytes=size)


def test_each_part() -> None:
    traffic = [
        sent("all-reduce", "tensor", 4, 80),
        sent("all-gather", "data", 2, 40),
        sent("reduce-scatter", "data", 1, 40),
    ]
    found = step_time(CLUSTER, 4, Settings(dp_size=4, zero_stage=1), 1000, traffic, 40)
    assert found.computing == 1000 / 50
    assert found.tensor == pytest.approx(2 * 3 / 4 * 80 / 20 + 4 * 0.25), "inside of a node"
    assert found.data == pytest.approx(3 / 4 * 80 / 10 + 3 * 0.5), "between nodes"
    assert found.optimizer == pytest.approx(10 * 30 / 30), "each element of a quarter: 30 bytes"
    assert found.hidden == 0
    assert found.total == pytest.approx(sum((found.computing, found.tensor, found.data, found.optimizer)))


def test_tensor_parallel_ranks_of_two_nodes() -> None:
    found = step_time(CLUSTER, 16, Settings(), 1000, [sent("all-reduce", "tensor", 4, 80)], 40)
    assert found.tensor == pytest.approx(2 * 15 / 16 * 80 / 10 + 4 * 0.5)
    assert found.data == 0 and found.optimizer == 40.0


def test_a_group_of_one_sends_nothing() -> None:
    found = step_time(CLUSTER, 1, Settings(dp_size=16), 1000, [sent("all-reduce", "tensor", 4, 80)], 40)
    assert found.tensor == 0


def test_what_stage_3_hides() -> None:
    few = step_time(CLUSTER, 1, Settings(dp_size=8, zero_stage=3), 1000, [sent("all-gather", "data", 1, 80)], 40)
    assert few.hidden == few.data and few.total == few.computing + few.optimizer
    many = step_time(CLUSTER, 1, Settings(dp_size=8, zero_stage=3), 10, [sent("all-gather", "data", 1, 800)], 40)
    assert many.hidden == many.computing and many.total == pytest.approx(many.data + many.optimizer)
