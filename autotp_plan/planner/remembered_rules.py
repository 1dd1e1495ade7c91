"""The rules of a plan as its document remembers them: from the arguments of `compile_plan`, and to them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.planner.deepspeed.read_config import TensorParallelSection, parse_section
from autotp_plan.planner.rules.preset_files import INFER, NONE
from autotp_plan.schemas.plan.rules import Rules
from autotp_plan.schemas.spec import SpecFile

_TP_SIZE = "autotp_size"


def remembered(
    *,
    preset: str,
    specs: Sequence[SpecFile],
    uneven: bool,
    deepspeed: TensorParallelSection | None,
    strict: bool,
    cut_vision: bool,
    sequence_parallel: bool,
    factory: ModuleFactory | None,
) -> Rules | None:
    """The rules to keep in a plan; None where its entries name them all, which are those of a preset."""
    written = {} if deepspeed is None else deepspeed.written
    section = {key: value for key, value in written.items() if key != _TP_SIZE}
    more = specs or section or strict or cut_vision or sequence_parallel or factory
    if preset not in (NONE, INFER) and not more:
        return None
    return Rules(
        preset=preset,
        specs=tuple(dataclasses.replace(spec, description="").to_dict() for spec in specs),
        deepspeed=section or None,
        strict=strict,
        uneven=uneven,
        cut_vision=cut_vision,
        sequence_parallel=sequence_parallel,
        module=None if factory is None else factory.name,
    )


def arguments(rules: Rules) -> dict[str, Any]:
    """The arguments of `compile_plan` that rules stand for.

    Raises:
        DocumentError: a spec file or section in them is not what one can be.
    """
    return {
        "preset": rules.preset,
        "specs": [SpecFile.from_dict(spec) for spec in rules.specs],
        "deepspeed": None if rules.deepspeed is None else parse_section(rules.deepspeed),
        "strict": rules.strict,
        "uneven": rules.uneven,
        "cut_vision": rules.cut_vision,
        "sequence_parallel": rules.sequence_parallel,
    }
