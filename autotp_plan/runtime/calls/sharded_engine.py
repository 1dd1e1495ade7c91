"""The class of an engine from `initialize`: DeepSpeed's, with other methods where it would save shards as a model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from autotp_plan.runtime.calls.finite_engine import StopsAtNonFinite
from autotp_plan.runtime.checkpoint.full_tensors import full_state_dict
from autotp_plan.runtime.deepspeed.agreement import together
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.job_files import loads_data_only
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.saving_internals import SavesFullTensors, check_saving_methods
from autotp_plan.runtime.parameters.state_dicts import shards_in_state_dict
from autotp_plan.schemas.errors import CheckpointError, Fault

_SCRIPT = '''#!/usr/bin/env python
"""In the place of DeepSpeed's script, which would join the files of one TP rank and call them the model."""

import sys

sys.exit(
    "This checkpoint is of a model that autotp-plan sharded over TP ranks. To get the full model, start the job "
    "again on its mesh, load the checkpoint (plan.load_checkpoint, or engine.load_checkpoint if the engine saved it), "
    "and call engine.module.save_pretrained(folder) on every rank."
)
'''


_GATHERING = "a call that gathers the state dict, such as trainer.save_model or accelerator.get_state_dict"


class ShardedEngine(SavesFullTensors, StopsAtNonFinite):
    """Methods of the engine of a sharded model, before those of its class."""

    tp_dp_ranks: Ranks
    recovery_script = _SCRIPT

    def full_state_dict(self, only_trained: bool, call: str = _GATHERING) -> Any:
        return full_state_dict(self.module, self.tp_dp_ranks, call=call, only_trained=only_trained)

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the state dict of the full model as a pickle; every rank calls it.

        All of it is put together in the memory of the first rank's host. `engine.module.save_pretrained(folder)` needs
        the memory of one tensor, and writes safetensors.

        Args:
            save_dir: a folder of the first rank.
            save_filename: the name of the file.
            exclude_frozen_parameters: leave out what is not trained.

        Returns:
            True.

        Raises:
            OutputError: the file cannot be written. The same on every rank.
        """
        state = self.full_state_dict(exclude_frozen_parameters, "engine.save_16bit_model")

        def write() -> None:
            if state is not None:
                Path(save_dir).mkdir(parents=True, exist_ok=True)
                torch.save(state, Path(save_dir) / save_filename)

        together(write, "the weights could not be written")
        return True

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """As DeepSpeed's: each rank writes its shards, to load on the same mesh. `plan.save_checkpoint` does more."""
        check_all_call("engine.save_checkpoint")
        with shards_in_state_dict():
            return super().save_checkpoint(
                save_dir,
                tag=tag,
                client_state={} if client_state is None else client_state,
                save_latest=save_latest,
                exclude_frozen_parameters=exclude_frozen_parameters,
            )

    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, *args: Any, trust_checkpoint: bool = False, **kwargs: Any
    ) -> Any:
        """As DeepSpeed's: a checkpoint that was saved on as many TP ranks. Its files are read as data alone.

        With `trust_checkpoint` they are unpickled, whatever they hold.

        Raises:
            CheckpointError: it was saved on another number of TP ranks, or holds more than data.
        """
        check_all_call("engine.load_checkpoint")
        self._check_tp_size(Path(load_dir), tag)
        with shards_in_state_dict(), loads_data_only(self, trust_checkpoint):
            return super().load_checkpoint(load_dir, tag, *args, **kwargs)

    def _check_tp_size(self, folder: Path, tag: str | None) -> None:
        latest = folder / "latest"
        if tag is None:
            tag = latest.read_text(encoding="utf-8").strip() if latest.exists() else ""
        saved = {path.name.rpartition("mp_rank_")[2] for path in (folder / tag).glob("*mp_rank_*_model_states.pt")}
        if saved and len(saved) != self.tp_dp_ranks.tp_size:
            raise CheckpointError(
                Fault(
                    code="checkpoint-of-another-tp-size",
                    what="the checkpoint was saved on another number of TP ranks",
                    where=str(folder / tag),
                    got=f"files of {len(saved)} TP ranks",
                    expected=f"files of {self.tp_dp_ranks.tp_size}",
                    next="load it on its mesh; or, of a job that plan.save_checkpoint saved, "
                    "plan.load_checkpoint(engine, folder)",
                )
            )


def become_sharded_engine(engine: Any, ranks: Ranks) -> None:
    """Give the engine of a sharded model its class, in place.

    Args:
        engine: what `deepspeed.initialize` made.
        ranks: this process's place in the mesh.
    """
    check_saving_methods(engine)
    engine.tp_dp_ranks = ranks
    cls: Any = type(engine)
    engine.__class__ = _sharded_class(cls)


@functools.cache
def _sharded_class(cls: Any) -> Any:
    return type(cls.__name__, (ShardedEngine, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
