"""What training steps of one rank take, with DeepSpeed's own engine and optimizer, on tensors without data."""

from __future__ import annotations

import contextlib
import gc
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from autotp_plan.huggingface.internals import with_sequences_unpacked
from autotp_plan.planner.estimate.document import Part, RankEstimate, Traffic
from autotp_plan.planner.estimate.settings import Settings
from autotp_plan.runtime.deepspeed.engine_config import engine_config
from autotp_plan.runtime.deepspeed.internals import skip_sums_over_one_rank
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import flat_groups
from autotp_plan.runtime.estimate.fake_internals import FusedAttention, Watch, count_operations, engine_without_data
from autotp_plan.runtime.estimate.fake_rank import fake_rank
from autotp_plan.runtime.optimizers.grad_norm import use_global_norm
from autotp_plan.runtime.tensor_parallel.gathered_weight import showing_shards
from autotp_plan.schemas.plan.document import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_OPERATIONS = {
    "allreduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter", "broadcast_": "broadcast",
    "alltoall_": "all-to-all", "alltoall_base_": "all-to-all", "reduce_": "reduce", "barrier": "barrier",
}  # fmt: skip
_MOST_RUN = 3
"""Forwards and backwards that are run of a step: the first, the last, and one for all between them."""
_ON_HOST = ("master weights", "optimizer states")


def engine_step(plan: Plan, tp_rank: int, settings: Settings, config: dict[str, Any] | None = None) -> RankEstimate:
    """Two training steps of one rank of a world that is not there. A process can do it once; see `fake_rank`.

    DeepSpeed's engine is made and steps as in a job. In the first step the optimizer makes its states; the second one
    is what every further step takes.

    Args:
        plan: of a transformers model.
        tp_rank: whose shards; it is the first data-parallel rank, which holds no less than the others.
        settings: how the plan is trained.
        config: a DeepSpeed config with further settings: buckets, gradient clipping.

    Raises:
        MismatchError: the plan has no config, or its model is not the one that transformers builds; or the config has a
            wrong value.
        CheckpointError: transformers cannot build the model.
    """
    model, ranks, mode = fake_rank(plan, tp_rank, settings.dp_size, DTYPES[settings.dtype])
    return run_engine(plan, model, ranks, mode, settings, config or {})


def run_engine(
    plan: Plan,
    model: Any,
    ranks: Ranks,
    mode: contextlib.AbstractContextManager[Any] | None,
    settings: Settings,
    config: dict[str, Any],
) -> RankEstimate:
    """As `engine_step`, of a model in training mode that is there.

    Args:
        plan: of the model.
        model: from `fake_rank`, or from `load_model`.
        ranks: this process's place in the mesh.
        mode: active while the model runs: what `fake_rank` returned; None for a model with data, in a job.
        settings: as for `engine_step`.
        config: as for `engine_step`.
    """
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable()
    run = min(settings.gradient_accumulation_steps, _MOST_RUN)
    further = settings.gradient_accumulation_steps - run
    seen = _Seen(model, ranks, "gradients and buckets" if settings.zero_stage else "gradients")
    gc.collect()
    gc.freeze()  # so that collecting what a layer left behind takes milliseconds
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(engine_without_data(model))
        stack.enter_context(seen.watch)
        if mode is not None and settings.device == "cuda":
            stack.enter_context(FusedAttention())
        stack.enter_context(showing_shards())
        stack.enter_context(with_sequences_unpacked())
        engine = _engine(plan, model, ranks, settings, config, run)
        seen.made(engine)
        tokens = torch.zeros(settings.micro_batch_size, settings.seq_length, dtype=torch.long, device=ranks.device)
        for step in range(2):
            seen.steps = step
            for micro_step in range(run):
                seen.times = 1 + further * (micro_step == 1)
                with seen.phase("forward"):
                    loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
                with seen.phase("backward"):
                    engine.backward(loss)
                del loss
            seen.times = 1
            with seen.phase("optimizer step"):
                engine.step()
            seen.stepped(engine)
    return seen.estimate(plan, ranks, settings)


def _engine(
    plan: Plan, model: nn.Module, ranks: Ranks, settings: Settings, config: dict[str, Any], micro_steps: int
) -> Any:
    """DeepSpeed's engine, with an optimizer whose step takes no memory but that of its states, as fused ones."""
    zero = dict(config.get("zero_optimization") or {})
    for offload in ("offload_optimizer", "offload_param"):
        zero.pop(offload, None)
    made = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler", "train_batch_size")}
    made |= {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": micro_steps,
        "zero_optimization": {**zero, "stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
    }
    for dtype in ("bf16", "fp16"):
        section = dict(config.get(dtype) or {})
        made[dtype] = {**section, "enabled": settings.dtype == dtype}
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = _OPTIMIZERS[settings.optimizer](parameters)
    use_global_norm()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(made, plan), mpu=groups)
    check = getattr(engine, "first_dataloader_check", None)
    if check is not None:  # of the first batch, over ranks that are not there
        check.remove()
        engine.first_dataloader_check = None
    skip_sums_over_one_rank(engine)
    return engine


_OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda given: torch.optim.AdamW(given, fused=True),
    "adam": lambda given: torch.optim.Adam(given, fused=True),
    "sgd": lambda given: torch.optim.SGD(given, fused=True),
    "momentum": lambda given: torch.optim.SGD(given, momentum=0.9, fused=True),
    "lion": lambda given: torch.optim.SGD(given, momentum=0.9, fused=True),  # one tensor of a weight's size, too
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Peak:
    """The most that was held in a phase."""

    bytes: int
    when: str
    parts: dict[str, int]


class _Seen:
    """What is seen while a rank trains: its memory by what it is for, collectives and operations of its last step."""

    def __init__(self, model: nn.Module, ranks: Ranks, gradients: str) -> None:
        self._gradients = gradients
        self.steps, self.times = -1, 1
        self._ranks, self._phase, self._at, self._when = ranks, "initialize", "", ""
        self._tensor, self._data = (set(_members(group)) for group in (ranks.tp_group, ranks.dp_group))
        self._collectives: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._operations: Counter[str] = Counter()
        self._peaks: dict[tuple[int, str], _Peak] = {}
        self._forward: list[_Peak] = []
        self.watch = Watch(self._see, name=self._name)
        self.watch.at_new_peak = self._note
        self.watch.rename(model.parameters(), "weights")
        self.watch.rename(model.buffers(), "buffers")
        self._model = model
        self._hook(model)

    def _hook(self, model: nn.Module) -> None:
        """Follow the model's progress, and name gradients when they are made."""
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        layers = max(lists, key=len, default=nn.ModuleList())
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._sets(f"layer {number + 1} of {len(layers)}"))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            head.register_forward_pre_hook(self._sets("head and loss"))
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        for name, parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._gradient(name))  # type: ignore[no-untyped-call]

    def _sets(self, where: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, __: Any) -> None:
            if self._phase == "forward":
                self._at = where

        return hook

    def _gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._at = f"after the gradient of {name}"
            if parameter.grad is not None:
                self.watch.rename([parameter.grad], self._gradients)
            gc.collect(0)

        return hook

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While active, a part of a step is done."""
        self._end()
        self._phase, self._at = name, ""
        with count_operations() as flops:
            yield
        if self.steps == 1:
            self._operations[name] += self.times * int(flops.get_total_flops())
        self._end()

    def _end(self) -> None:
        """Note the peak of the phase that ends."""
        peak = _Peak(
            bytes=self.watch.peak,
            when=f"{self._phase}, {self._when}" if self._when else self._phase,
            parts={what: size for what, size in self.watch.peak_parts.items() if size},
        )
        key = (self.steps, self._phase)
        if key not in self._peaks or peak.bytes > self._peaks[key].bytes:
            self._peaks[key] = peak
        self.watch.restart_peak()
        self._when = self._at = ""

    def made(self, engine: Any) -> None:
        """The engine is there: what of its memory holds the weights, and the master weights."""
        self._end()
        held = [one for group in engine.basic_optimizer.param_groups for one in group["params"]]
        if engine.zero_optimization_stage() > 0:
            held = flat_groups(engine.optimizer)
        self.watch.rename(held, "master weights")
        self._rename_weights()
        self._collectives.clear()
        self._bytes.clear()

    def _rename_weights(self) -> None:
        for parameter in self._model.parameters():
            shard = getattr(parameter, "ds_tensor", None)
            self.watch.rename([parameter.data] if shard is None else [shard], "weights")

    def stepped(self, engine: Any) -> None:
        """A step is over: what of its memory holds the optimizer's states."""
        states = engine.basic_optimizer.state.values()
        tensors = (one for state in states for one in state.values() if isinstance(one, Tensor))
        self.watch.rename(tensors, "optimizer states")
        self._rename_weights()
        self.watch.restart_peak()

    def _note(self) -> None:
        self._when = self._at

    def _name(self) -> str:
        """What a new tensor is for, by the code that makes it."""
        maker = _maker(inspect.currentframe())
        if self._phase == "initialize":
            return "optimizer states" if maker == "optimizer" else "buffers of ZeRO"
        if maker == "gathering":
            return "gathered weights"
        if self._phase == "forward":
            return "logits and loss" if self._at == "head and loss" else "activations"
        if self._phase == "backward":
            return {"engine": self._gradients, "model": "activations computed again"}.get(maker, "temporary")
        return "optimizer states" if maker == "optimizer" and self.steps == 0 else "temporary"

    def _see(self, operation: str, group: Any, size: int) -> None:
        if self.steps != 1:
            return
        members = set(_members(group))
        over = "tensor" if members == self._tensor else "data" if members == self._data else "all"
        key = (_OPERATIONS.get(operation, operation.strip("_")), over)
        if len(members) > 1:
            self._collectives[key] += self.times
            self._bytes[key] += self.times * size

    def estimate(self, plan: Plan, ranks: Ranks, settings: Settings) -> RankEstimate:
        """What was seen."""
        peaks = {key: _on_device(peak, settings) for key, peak in self._peaks.items()}
        highest = max(peaks.values(), key=lambda peak: peak.bytes)
        phases: dict[str, int] = {}
        for (_, name), peak in sorted(peaks.items(), key=lambda item: item[0][0]):
            phases[name] = max(peak.bytes, phases.get(name, 0))
        last = self._peaks[(1, "optimizer step")].parts
        host = [Part(what=what, bytes=last[what]) for what in _ON_HOST if what in last]
        return RankEstimate(
            tp_ranks=(ranks.tp_rank,),
            peak=highest.bytes,
            when=highest.when,
            at_peak=tuple(Part(what=what, bytes=size) for what, size in sorted(highest.parts.items(), key=_by_size)),
            phases=tuple(Part(what=what, bytes=size) for what, size in phases.items()),
            host=tuple(host) if settings.offload == "optimizer" else (),
            traffic=tuple(
                Traffic(operation=operation, group=group, count=count, bytes=self._bytes[operation, group])
                for (operation, group), count in sorted(self._collectives.items())
            ),
            forward_operations=self._operations["forward"],
            backward_operations=self._operations["backward"],
        )


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]


def _on_device(peak: _Peak, settings: Settings) -> _Peak:
    """A peak without what is offloaded."""
    if settings.offload == "none":
        return peak
    parts = {what: size for what, size in peak.parts.items() if what not in _ON_HOST}
    return _Peak(bytes=sum(parts.values()), when=peak.when, parts=parts)


def _members(group: Any) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


_MAKERS = (
    ("/torch/optim/", "optimizer"),
    ("/deepspeed/runtime/zero/part", "gathering"),  # partition_parameters, ..._coordinator
    ("/deepspeed/runtime/", "engine"),
    ("/transformers/", "model"),
)


def _maker(frame: FrameType | None) -> str:
    """Who makes a tensor: the code on the stack that is nearest to it and known."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_engine_run_backward":
            return "autograd"
        for part, maker in _MAKERS:
            if part in code.co_filename:
                return maker
        frame = frame.f_back
    return ""
