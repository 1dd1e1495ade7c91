"""The rules that a plan was compiled by, where they are more than a preset: what `reshard` makes another plan of.

Nothing but `reshard` looks at them, and only where they make the same plan again. So the fingerprint does not cover
them: a plan is the same plan with and without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """The options of `compile`: spec files, the `tensor_parallel` section of a DeepSpeed config, and the others.

    `module` is the name of the function that made the model; it is shown, and never imported because a plan says so.
    """

    preset: str = "auto"
    specs: tuple[dict[str, Any], ...] = ()
    deepspeed: dict[str, Any] | None = None
    strict: bool = False
    uneven: bool = False
    cut_vision: bool = False
    sequence_parallel: bool = False
    module: str | None = None

    def __str__(self) -> str:
        """`2 spec files, a DeepSpeed config, preset none, --strict`."""
        num_specs = len(self.specs)
        words = [f"{num_specs} spec file{'s' if num_specs > 1 else ''}"] if num_specs else []
        words += ["a DeepSpeed config"] if self.deepspeed else []
        words += [f"preset {self.preset}"] if self.preset != "auto" else []
        words += [f"--module {self.module}"] if self.module else []
        flags = {
            "--strict": self.strict,
            "--uneven": self.uneven,
            "--cut-vision": self.cut_vision,
            "--sequence-parallel": self.sequence_parallel,
        }
        return ", ".join([*words, *(flag for flag, given in flags.items() if given)])
