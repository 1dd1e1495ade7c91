"""How long a training step takes by stated figures of a GPU and its links. Nothing of it has been measured on a GPU.

Assumed: products run at a share of the GPU's rate; collectives run as rings at a share of the bandwidth of the slowest
link (Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005) after a fixed
latency; nothing is computed while activations are all-reduced over the tensor-parallel ranks, nor while ZeRO stages 0
to 2 reduce gradients (DeepSpeed's `overlap_comm` is off for them); at stage 3 the gathers are hidden behind what is
computed, as far as that takes. The optimizer reads and writes its states once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autotp_plan.planner.estimate.hardware import Hardware
from autotp_plan.schemas.estimate.document import Traffic
from autotp_plan.schemas.estimate.settings import OPTIMIZERS, Settings

_TIMES_ROUND = {"all-reduce": 2.0}
"""How often a ring sends (n - 1) / n of a tensor; all other collectives send it once."""
_FLOAT32, _BF16 = 4, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """GPUs in nodes; TP ranks are neighbours.

    Attributes:
        gpus: all of them.
        per_node: of a node.
        hardware: each of them.
    """

    gpus: int
    per_node: int
    hardware: Hardware


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The seconds of a step.

    Attributes:
        computing: forwards and backwards.
        tensor: collectives over the tensor-parallel ranks.
        data: collectives over the data-parallel ranks.
        hidden: of those, what is done while something is computed.
        optimizer: the optimizer's step.
    """

    computing: float
    tensor: float
    data: float
    hidden: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.computing + self.tensor + self.data - self.hidden + self.optimizer


def step_time(
    cluster: Cluster, tp_size: int, settings: Settings, operations: int, traffic: Iterable[Traffic], elements: int
) -> StepTime:
    """The seconds of a step.

    Args:
        cluster: where.
        tp_size: number of tensor-parallel ranks.
        settings: how the plan is trained.
        operations: floating-point operations of a rank in a step.
        traffic: what a rank communicates in a step.
        elements: of the weights of a rank.
    """
    hardware = cluster.hardware
    seconds = {"tensor": 0.0, "data": 0.0}
    for one in traffic:
        over = "tensor" if one.group == "tensor" else "data"
        seconds[over] += _collectives(cluster, tp_size, settings.dp_size, one)
    computing = operations / (hardware.operations_per_s * hardware.efficiency)
    stepped = elements / settings.dp_size if settings.zero_stage else elements
    moved = _FLOAT32 + 2 * _FLOAT32 * (1 + OPTIMIZERS[settings.optimizer]) + _BF16
    return StepTime(
        computing=computing,
        tensor=seconds["tensor"],
        data=seconds["data"],
        hidden=min(computing, seconds["data"]) if settings.zero_stage == 3 else 0.0,
        optimizer=stepped * moved / hardware.memory_bytes_per_s,
    )


def _collectives(cluster: Cluster, tp_size: int, dp_size: int, one: Traffic) -> float:
    """The seconds of the collectives of one kind over one group."""
    hardware = cluster.hardware
    ranks, span = {"tensor": (tp_size, tp_size), "data": (dp_size, tp_size * dp_size)}.get(
        one.group, (tp_size * dp_size, tp_size * dp_size)
    )
    if ranks == 1:
        return 0.0
    inside = span <= cluster.per_node
    bandwidth = hardware.inside_node_bytes_per_s if inside else hardware.between_nodes_bytes_per_s
    latency = hardware.inside_node_latency_s if inside else hardware.between_nodes_latency_s
    sent = _TIMES_ROUND.get(one.operation, 1.0) * (ranks - 1) / ranks * one.bytes
    return sent / (bandwidth * hardware.link_efficiency) + one.count * latency
