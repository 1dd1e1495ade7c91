"""The private names of DeepSpeed's ZeRO: where its flat groups hold each parameter, and what it writes when it saves.

No other file says them. Each function states what it relies on and raises MissingDependencyError when it is gone;
`tests/runtime/test_canaries.py` asserts all of it in a second.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    BF16_ZERO_FILE_PREFIX,
    FP32_FLAT_GROUPS,
    LOSS_SCALER,
    MODEL_FILE_PREFIX,
    MODEL_FILE_SUFFIX,
    OPTIM_FILE_SUFFIX,
    OPTIMIZER_STATE_DICT,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_FILE_PREFIX,
)
from torch import Tensor, nn

from autotp_plan.schemas.upstream import moved, private, replaced

_PACKAGE = "deepspeed"
_FLAT_GROUPS = (  # the attributes that hold the float32 weights, of DeepSpeed's three ZeRO optimizers
    "single_partition_of_fp32_groups",  # DeepSpeedZeroOptimizer, stages 1 and 2
    "fp32_groups_flat_partition",  # BF16_Optimizer, stage 1
    "fp32_partitioned_groups_flat",  # DeepSpeedZeroOptimizer_Stage3
)
_SCALER_STATES = (LOSS_SCALER, "dynamic_loss_scale", "overflow")


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRange:
    """Consecutive elements of a flattened parameter that one DP rank's flat group holds.

    Attributes:
        group: number of the flat group.
        start: the first element of the parameter.
        at: where it lies in the flat group.
        numel: number of elements.
        padding: elements after them in the group that are of no parameter.
    """

    group: int
    start: int
    at: int
    numel: int
    padding: int = 0


# a running optimizer


def flat_groups(optimizer: Any) -> list[Tensor]:
    """This rank's float32 weights, one flat tensor per group: what torch's optimizer steps.

    Relies on the attributes of `_FLAT_GROUPS`.
    """
    found = [name for name in _FLAT_GROUPS if hasattr(optimizer, name)]
    if len(found) != 1:
        got = f"{type(optimizer).__name__} with {', '.join(found) or 'none of them'}"
        raise moved(_PACKAGE, "engine.optimizer", got, f"one of {', '.join(_FLAT_GROUPS)}")
    return [tensor.data for tensor in getattr(optimizer, found[0])]


def held_ranges(optimizer: Any, module: nn.Module, stage: int) -> dict[str, list[FlatRange]]:
    """What this rank's flat groups hold of each trainable parameter of `module`, by name; one entry for each.

    At stages 1 and 2 relies on `parameter._hp_mapping`, None where this rank holds nothing; its `param_group_index`,
    and the `start` and `numel` of `lp_fragment_address` and `get_hp_fragment_address()`. At stage 3 on
    `optimizer.grad_position[optimizer.get_param_id(parameter)] = [group, position, size]`,
    `optimizer._get_param_partition_rank(parameter)` and `parameter.ds_numel`.
    """
    found: dict[str, list[FlatRange]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[name] = list(_range_at_stage_3(optimizer, parameter) if stage == 3 else _range_before(parameter))
    return found


def _range_before(parameter: nn.Parameter) -> Iterator[FlatRange]:
    used_for = "resuming on a different mesh"
    mapping = private(parameter, "_hp_mapping", _PACKAGE, used_for)
    if mapping is None:
        return
    held = private(mapping, "lp_fragment_address", _PACKAGE, used_for)
    flat = private(mapping, "get_hp_fragment_address", _PACKAGE, used_for)()
    group = private(mapping, "param_group_index", _PACKAGE, used_for)
    yield FlatRange(group=group, start=held.start, at=flat.start, numel=held.numel)


def _range_at_stage_3(optimizer: Any, parameter: nn.Parameter) -> Iterator[FlatRange]:
    used_for = "resuming on a different mesh"
    positions = private(optimizer, "grad_position", _PACKAGE, used_for)
    identifier = private(optimizer, "get_param_id", _PACKAGE, used_for)(parameter)
    if identifier not in positions:
        raise moved(_PACKAGE, "engine.optimizer.grad_position", "a parameter is not in it", "every trainable parameter")
    group, at, size = positions[identifier]
    start = private(optimizer, "_get_param_partition_rank", _PACKAGE, used_for)(parameter) * size
    numel = max(0, min(size, full_numel(parameter) - start))
    yield FlatRange(group=group, start=start, at=at, numel=numel, padding=size - numel)


def full_numel(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter before ZeRO 3 partitioned it. Relies on `parameter.ds_numel`."""
    numel: int = private(parameter, "ds_numel", _PACKAGE, "the size of a parameter under ZeRO 3")
    return numel


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter before ZeRO 3 partitioned it, if it did. Relies on `parameter.ds_shape`."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_managed_by_zero3(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 partitions a parameter, gathered or not. Relies on `ds_id`, which it gives to each."""
    return hasattr(parameter, "ds_id")


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 has taken the elements of a parameter away, until they are gathered. Relies on `ds_numel`."""
    return hasattr(parameter, "ds_id") and parameter.numel() != full_numel(parameter)


def partition_of(parameter: nn.Parameter, dp_rank: int) -> tuple[int, Tensor] | None:
    """What this DP rank holds of a parameter under ZeRO 3: its first element, and its elements without padding.

    None for a parameter that ZeRO 3 has not partitioned, which has no `ds_id`. Relies on `parameter.ds_tensor`, its
    `ds_numel` (with padding), and `parameter.ds_numel`.
    """
    if not hasattr(parameter, "ds_id"):
        return None
    held = private(parameter, "ds_tensor", _PACKAGE, "saving weights under ZeRO 3")
    size = private(held, "ds_numel", _PACKAGE, "saving weights under ZeRO 3")
    start = dp_rank * size
    return start, held.detach().reshape(-1)[: max(0, min(size, full_numel(parameter) - start))]


def swaps_to_disk(optimizer: Any) -> bool:
    """Whether the optimizer's state lies on NVMe. Relies on `swap_optimizer` of the ZeRO 3 optimizer, if it is one."""
    return bool(getattr(optimizer, "swap_optimizer", False))


@contextmanager
def full_parameters(engine: Any) -> Iterator[None]:
    """While active, ZeRO 3 lets weights be loaded into the engine's model; at other stages nothing is to be done.

    Relies on `optimizer.checkpoint_event_prologue()` and `checkpoint_event_epilogue()`, which `load_checkpoint` calls.
    """
    partitioned = engine.zero_optimization_stage() == 3
    if partitioned:
        private(engine.optimizer, "checkpoint_event_prologue", _PACKAGE, "loading weights under ZeRO 3")()
    yield
    if partitioned:
        private(engine.optimizer, "checkpoint_event_epilogue", _PACKAGE, "loading weights under ZeRO 3")()


def load_optimizer_state(
    optimizer: Any, stage: int, dp_size: int, states: dict[int, dict[str, Any]], saved: SavedOptimizer
) -> None:
    """Put `states` (by flat group) and the hyperparameters, loss scale and overflow of `saved` into the optimizer.

    Its float32 weights are what lies in `flat_groups` already. Relies on the keys of `optimizer.state_dict()`, on
    `load_state_dict([state of each DP rank], load_optimizer_states=..., load_from_fp32_weights=...)`, and at stages 1
    and 2 on `update_lp_params()`, which copies the float32 weights into the parameters.
    """
    state = optimizer.state_dict()
    key = _base_key(stage)
    if key not in state:
        raise moved(_PACKAGE, "engine.optimizer.state_dict()", ", ".join(map(str, state)), f"the key {key!r}")
    own_groups, saved_groups = state[key][PARAM_GROUPS], saved.param_groups
    groups = [{**group, "params": own["params"]} for own, group in zip(own_groups, saved_groups, strict=True)]
    state[key] = {"state": states, PARAM_GROUPS: groups}
    for name in _SCALER_STATES:
        if name in state and name in saved.state:
            state[name] = saved.state[name]
    optimizer.load_state_dict([state] * dp_size, load_optimizer_states=True, load_from_fp32_weights=True)
    if stage < 3:
        private(optimizer, "update_lp_params", _PACKAGE, "resuming on a different mesh")()


@contextmanager
def muon_updates(make: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """While active, ZeRO 1 and 2 call `make(muon_update)` for `muon_update`.

    Relies on `get_flat_partition` importing it from `deepspeed.runtime.zero.muon.original_muon` when it is called.
    """
    module = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    update = private(module, "muon_update", _PACKAGE, "Muon under ZeRO")
    with replaced(module, "muon_update", make(update)):
        yield


def wrap_flat_partition(optimizer: Any, around: Callable[[Callable[[], Any], Sequence[Tensor]], Any]) -> None:
    """Let ZeRO 1 or 2 call `around(call, parameters)` where it orthogonalises the gradients of `parameters`, in order.

    Relies on `optimizer.get_flat_partition(tensor_list, ...)`, which goes through the list from front to back.
    """
    flat_partition = private(optimizer, "get_flat_partition", _PACKAGE, "Muon under ZeRO")

    def get_flat_partition(tensor_list: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        return around(lambda: flat_partition(tensor_list, *args, **kwargs), tensor_list)

    optimizer.get_flat_partition = get_flat_partition


# what it saves


def model_states_file(stage: int, tp_rank: int, dp_rank: int = 0) -> str:
    """The file with the module's state of a TP rank; at stage 3 that of one of its DP ranks."""
    of_dp_rank = f"{ZERO_FILE_PREFIX}{dp_rank}_" if stage == 3 else ""
    return f"{of_dp_rank}{MODEL_FILE_PREFIX}{tp_rank:02d}{MODEL_FILE_SUFFIX}"


def optimizer_states_files(tp_rank: int, dp_rank: int) -> tuple[str, str]:
    """The file with the optimizer's state of a rank: its name in float32 and fp16 training, and in bf16 training."""
    rank = f"{dp_rank}_{MODEL_FILE_PREFIX}{tp_rank:02d}{OPTIM_FILE_SUFFIX}"
    return ZERO_FILE_PREFIX + rank, BF16_ZERO_FILE_PREFIX + rank


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """The optimizer's state of one rank as DeepSpeed saved it.

    Relies on the keys of `deepspeed.checkpoint.constants` that are imported above.
    """

    state: Mapping[str, Any]
    stage: int

    @classmethod
    def of_file(cls, content: Mapping[str, Any], stage: int) -> SavedOptimizer:
        """From what an optimizer states file holds."""
        return cls(_key(content, OPTIMIZER_STATE_DICT), stage)

    @property
    def flat_groups(self) -> list[Tensor]:
        """The float32 weights; at stages 1 and 2 without the padding at their end."""
        groups: list[Tensor] = _key(self.state, SINGLE_PARTITION_OF_FP32_GROUPS if self.stage < 3 else FP32_FLAT_GROUPS)
        return groups

    @property
    def states(self) -> dict[int, dict[str, Any]]:
        """torch's optimizer states, by flat group."""
        found: dict[int, dict[str, Any]] = _key(_key(self.state, _base_key(self.stage)), "state")
        return found

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Hyperparameters such as learning rates, by parameter group."""
        found: list[dict[str, Any]] = _key(_key(self.state, _base_key(self.stage)), PARAM_GROUPS)
        return found

    def addresses(self) -> Iterator[tuple[str, int, int, int]]:
        """At stages 1 and 2: `(parameter, group, position in the flat group, elements)` of what this rank holds."""
        for group, mapping in enumerate(_key(self.state, PARAM_SLICE_MAPPINGS)):
            for name, address in mapping.items():
                yield name, group, address.start, address.numel


def trainable_shapes(model_states: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """The trainable parameters of a model states file in the order of each flat group, with this TP rank's shapes."""
    found: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    listed = _key(model_states, PARAM_SHAPES)
    for group, shapes in enumerate(listed):
        for name, shape in shapes.items():
            found[group][name] = tuple(shape)
    return [found[group] for group in range(len(listed))]


def _base_key(stage: int) -> str:
    """Where torch's optimizer is in the state dict of DeepSpeed's."""
    key: str = BASE_OPTIMIZER_STATE if stage < 3 else OPTIMIZER_STATE_DICT
    return key


def _key(content: Mapping[str, Any], key: str) -> Any:
    if key not in content:
        raise moved(_PACKAGE, "a file of the saved job", f"the keys {', '.join(map(str, content))}", f"the key {key!r}")
    return content[key]
