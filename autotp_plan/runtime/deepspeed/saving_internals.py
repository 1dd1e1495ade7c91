"""The private names of DeepSpeed's engine that save weights: what a sharded model's engine has in their place.

Each is called by the engine itself, by Accelerate or by Hugging Face's Trainer; `tests/runtime/test_canaries.py`
asserts that they are there in a second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autotp_plan.schemas.upstream import private, replaced

_PACKAGE = "deepspeed"

SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""The scripts that DeepSpeed copies into a checkpoint: they join ZeRO's partitions, but know no TP ranks."""


def check_saving_methods(engine: Any) -> None:
    """Check that the engine still has the methods that `SavesFullTensors` takes the place of.

    Relies on all of those that it names.

    Raises:
        MissingDependencyError: DeepSpeed saves by another method, which would write shards as the model.
    """
    used_for = "saving a sharded model as a model"
    private(engine, "_copy_recovery_script", _PACKAGE, used_for)
    private(engine, "_consolidated_16bit_state_dict", _PACKAGE, used_for)
    private(engine, "_zero3_consolidated_16bit_state_dict", _PACKAGE, used_for)
    private(engine, "_replace_module_consolidated_state_dict", _PACKAGE, used_for)


@contextmanager
def collected_scripts(engine: Any, saves: list[tuple[str, Exception | None]]) -> Iterator[None]:
    """While active, an error in copying DeepSpeed's scripts is added to `saves` as `(path, error)`, and not raised.

    Relies on `_copy_recovery_script(save_path)`.
    """
    copy = private(engine, "_copy_recovery_script", _PACKAGE, "telling all ranks that a save failed")

    def collect(save_path: str) -> None:
        try:
            copy(save_path)
        except OSError as error:
            saves.append((str(error.filename or save_path), error))

    with replaced(engine, "_copy_recovery_script", collect):
        yield


class SavesFullTensors:
    """Methods of DeepSpeed's engine that would save one TP rank's shards as the model; mixed into its class.

    Relies on `_copy_recovery_script(save_path)`, which `save_checkpoint` calls on the first rank, and on
    `_consolidated_16bit_state_dict`, `_zero3_consolidated_16bit_state_dict` (with `exclude_frozen_parameters`) and
    `_replace_module_consolidated_state_dict`, which are called on every rank.
    """

    recovery_script: str

    @abstractmethod
    def full_state_dict(self, only_trained: bool) -> Any:
        """The state dict of the model without sharding, on the first rank."""

    def _copy_recovery_script(self, save_path: str) -> None:
        for name in SCRIPTS:
            (Path(save_path) / name).write_text(self.recovery_script, encoding="utf-8")

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        return self.full_state_dict(exclude_frozen_parameters)

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        return self.full_state_dict(exclude_frozen_parameters)

    def _replace_module_consolidated_state_dict(self) -> Any:
        return self.full_state_dict(False)
