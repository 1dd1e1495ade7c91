"""How a DeepSpeed engine writes and reads the files of a job: which it wrote, and reading them as data.

Each function states which of DeepSpeed's names it relies on, and `tests/runtime/test_canaries.py` asserts it.
"""

from __future__ import annotations

import copyreg
import enum
import importlib
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from autotp_plan.runtime.deepspeed.saving_internals import collected_scripts
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.upstream import private, replaced

_PACKAGE = "deepspeed"
_AS_DATA = "reading a saved job without running code from it"

SAVED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)
"""What DeepSpeed's files of a job hold besides tensors, numbers, text, lists and dicts: classes with data alone."""

ENGINE_KEYS = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps",
    "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
    "checkpoint_parallel_dimensions", "universal_checkpoint_info", "num_experts", "ds_autoep_layers",
    "autoep_layers", "folding",
})  # fmt: skip
"""What DeepSpeed saves next to the caller's own state, in the same dict."""


@contextmanager
def collected_saves(engine: Any) -> Iterator[list[tuple[str, Exception | None]]]:
    """While active, `engine.save_checkpoint` collects what goes wrong in writing a file, and goes on to its barriers.

    An error there would leave the other ranks waiting. Yields the list of `(path, error)` of the files that this rank
    has written, or tried to. Relies on the engine writing every file by
    `engine.checkpoint_engine.save(state_dict, path)`, but for its scripts.
    """
    saves: list[tuple[str, Exception | None]] = []
    writer = private(engine, "checkpoint_engine", _PACKAGE, "telling all ranks that a save failed")
    write = private(writer, "save", _PACKAGE, "telling all ranks that a save failed")

    def save(state_dict: Any, path: str) -> None:
        error: Exception | None = None
        try:
            write(state_dict, path)
        except Exception as raised:  # of the disk, of pickle, or torch's own when the disk is full
            error = raised
        saves.append((str(path), error))

    with replaced(writer, "save", save), collected_scripts(engine, saves), enums_by_value():
        yield saves


@contextmanager
def enums_by_value() -> Iterator[None]:
    """While active, members of DeepSpeed's enums are pickled by their value, as a class and a number.

    Python 3.11.0 to 3.11.3 pickle them as a call of `getattr`, which could fetch anything and is not read as data.
    """
    enums = {cls for cls in _saved_classes() if issubclass(cls, enum.Enum)} - copyreg.dispatch_table.keys()
    for cls in enums:
        copyreg.pickle(cls, _class_and_value)
    try:
        yield
    finally:
        for cls in enums:
            del copyreg.dispatch_table[cls]


def _class_and_value(member: enum.Enum) -> tuple[type[enum.Enum], tuple[Any]]:
    return type(member), (member.value,)


@contextmanager
def loads_data_only(engine: Any, trust: bool, held: Mapping[Path, Any] | None = None) -> Iterator[None]:
    """While active, `engine.load_checkpoint` reads files by `read_saved`; `held` are those that have been read already.

    Relies on the engine reading every file by `engine.checkpoint_engine.load(path, map_location=None)`.
    """
    reader = private(engine, "checkpoint_engine", _PACKAGE, _AS_DATA)
    private(reader, "load", _PACKAGE, _AS_DATA)
    if "load" in vars(reader):  # plan.load_checkpoint calls the engine's, which comes here again
        yield
        return

    def load(path: str, map_location: Any = None) -> Any:
        found = (held or {}).get(Path(path))
        return read_saved(Path(path), trust=trust, map_location=map_location) if found is None else found

    with replaced(reader, "load", load):
        yield


def read_saved(path: Path, *, trust: bool, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What DeepSpeed saved in a file; nothing in it is run, unless it is trusted.

    Args:
        path: the file.
        trust: unpickle it, whatever it holds.
        map_location: as of `torch.load`.
        mmap: map tensors, and read them when they are used.

    Raises:
        CheckpointError: it holds more than data, or cannot be read.
    """
    try:
        with safe_globals(_saved_classes()):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=not trust)
    except pickle.UnpicklingError as error:
        if not trust:
            raise CheckpointError(_needs_trust(path, _reason(error))) from None
        raise CheckpointError(unreadable(path, error)) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(unreadable(path, error)) from None


def check_is_data(path: Path) -> None:
    """Raise CheckpointError where `read_saved` would, without reading a tensor."""
    with safe_globals(_saved_classes()):
        try:
            found = get_unsafe_globals_in_checkpoint(path)
        except (RuntimeError, ValueError, pickle.UnpicklingError) as error:  # no zip file, or none of torch's
            raise CheckpointError(_needs_trust(path, _reason(error))) from None
    if found:
        raise CheckpointError(_needs_trust(path, ", ".join(sorted(found))))


def _saved_classes() -> list[Any]:
    found = []
    for name in SAVED_CLASSES:
        module, _, attribute = name.partition(":")
        found.append(private(importlib.import_module(module), attribute, _PACKAGE, _AS_DATA))
    return found


def _reason(error: Exception) -> str:
    """What torch found, in one line; not the advice around it, which has escapes for a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = text.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return found.splitlines()[0].split(". ")[0].strip()


def unreadable(path: Path, error: Exception) -> Fault:
    """The fault of a file of a job that cannot be read."""
    return Fault(
        code="job-unreadable",
        what="a file of the saved job cannot be read",
        where=str(path),
        got=(str(error) or type(error).__name__).splitlines()[0],
        expected="what DeepSpeed wrote there",
        next="resume from another tag",
    )


def _needs_trust(path: Path, got: str) -> Fault:
    return Fault(
        code="job-holds-code",
        what="a file of the saved job holds more than data",
        where=str(path),
        got=got,
        expected="tensors, numbers, text, and the classes that DeepSpeed saves",
        next="if you trust who wrote it, and what client_state held: load_checkpoint(..., trust_checkpoint=True)",
    )
