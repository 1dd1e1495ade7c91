"""Which gradients a rank holds in a step, and of which parameter group a parameter is.

DeepSpeed's optimizers have attributes for it that it does not document: no other file says them, and
`tests/runtime/test_canaries.py` asserts that they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from autotp_plan.schemas.upstream import private, replaced

_PACKAGE = "deepspeed"


@contextmanager
def before_gradients_go(optimizer: Any, look: Callable[[], None]) -> Iterator[None]:
    """While active, `look` is called before an optimizer forgets gradients, as it does in a step that it skips.

    Relies on `BF16_Optimizer.clear_hp_grads()` and on `zero_grad` of all others.
    """
    name = "clear_hp_grads" if hasattr(optimizer, "clear_hp_grads") else "zero_grad"
    forget = private(optimizer, name, _PACKAGE, "naming gradients that are not finite")

    def look_and_forget(*args: Any, **kwargs: Any) -> Any:
        look()
        return forget(*args, **kwargs)

    with replaced(optimizer, name, look_and_forget):
        yield


def held_gradients(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What this rank holds of each gradient when it steps, with the parameter; nothing of those that are on the CPU.

    Under ZeRO relies on `averaged_gradients`, by group the parts of the parameters in `params_in_partition` (stages 1
    and 2) or `fp16_groups` (stage 3); in bf16 at stage 1 on `BF16_Optimizer.bf16_groups` and `fp32_groups_gradients`.
    """
    optimizer, used_for = engine.optimizer, "naming gradients that are not finite"
    if hasattr(optimizer, "averaged_gradients"):
        name = "fp16_groups" if engine.zero_optimization_stage() == 3 else "params_in_partition"
        groups = private(optimizer, name, _PACKAGE, used_for)
        for number, gradients in optimizer.averaged_gradients.items():
            yield from zip(groups[number], gradients or (), strict=False)  # padding follows the last
    elif hasattr(optimizer, "fp32_groups_gradients"):
        for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            yield from zip(group, gradients, strict=True)
    else:
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                yield parameter, parameter.grad


def parameter_groups(optimizer: Any) -> Iterator[tuple[int, Sequence[nn.Parameter]]]:
    """The model's parameters by the number of their group in `optimizer.param_groups`, which under ZeRO holds others.

    Relies on `bit16_groups` (stages 1 and 2), `bf16_groups` (bf16 at stages 0 and 1), and `fp16_groups` (fp16, and
    stage 3, where a group is several of them: `sub_group_to_group_id`).
    """
    groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", None)
    if groups is None and hasattr(optimizer, "fp16_groups"):
        numbers = getattr(optimizer, "sub_group_to_group_id", None)
        for at, group in enumerate(optimizer.fp16_groups):
            yield (at if numbers is None else numbers[at]), group
    elif groups is None:
        yield from enumerate(group["params"] for group in optimizer.param_groups)
    else:
        yield from enumerate(groups)
