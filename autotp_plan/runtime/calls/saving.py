"""`save_pretrained` and `push_to_hub` of a sharded transformers model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel

from autotp_plan.runtime.calls.loaded import loaded_of
from autotp_plan.runtime.checkpoint.full_tensors import full_shapes
from autotp_plan.runtime.checkpoint.plain_checkpoint import save_plain_checkpoint
from autotp_plan.schemas.errors import Fault, MismatchError, OptionError

_UPLOAD = (
    "on every rank model.save_pretrained(folder), then on one rank huggingface_hub.upload_folder(repo_id=..., "
    "folder_path=folder)"
)


class SavesPretrained(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Saving of a sharded transformers model as transformers saves one that is not sharded."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the full model as a plain Hugging Face checkpoint in the model's dtypes; every rank calls it.

        The first rank writes, and gets the tensors of the other ranks one at a time. The arguments are those of
        `PreTrainedModel.save_pretrained`.

        Args:
            save_directory: a folder of the first rank.
            is_main_process: true on the first rank.
            state_dict: full tensors by the names of the modules, as `state_dict()` of the model without sharding has
                them. Then the rank that calls it writes them, and no other rank need call it.
            push_to_hub: not for a sharded model.
            max_shard_size: the largest size of a file.
            variant: as in `model.<variant>.safetensors`.
            token: not used, as nothing is uploaded.
            save_peft_format: of no effect without adapters.
            save_original_format: give the tensors the names that the checkpoint has, and not those of the modules.
            distributed_checkpoint: not for a sharded model.
            kwargs: `safe_serialization=True` alone.

        Raises:
            OptionError: an option that a sharded model cannot honour. As all errors the same on every rank, except
                where a `state_dict` is given.
            MismatchError: `state_dict` holds shards, or the model has other parameters than its plan.
            OutputError: the folder cannot be written.
        """
        faults = _option_faults(push_to_hub, distributed_checkpoint, kwargs)
        loaded = loaded_of(self)
        first = torch.distributed.get_rank() == 0
        if first and not is_main_process and state_dict is None:
            faults.append(_option_fault("is_main_process", "False on the first rank", "True where torch's rank is 0"))
        if faults:
            raise OptionError(faults)
        options: dict[str, Any] = {
            "variant": variant,
            "save_peft_format": save_peft_format,
            "save_original_format": save_original_format,
        }
        if state_dict is not None:
            if is_main_process:
                _check_full(self, state_dict)
                super().save_pretrained(
                    save_directory, is_main_process, state_dict, max_shard_size=max_shard_size, **options
                )
            return
        middle = f".{variant}" if variant else ""
        save_plain_checkpoint(
            self,
            Path(save_directory),
            loaded.plan,
            loaded.ranks,
            loaded.source,
            weights_name=f"model{middle}.safetensors",
            index_name=f"model.safetensors.index{middle}.json",
            max_file_bytes=max_shard_size,
            original_names=save_original_format,
            write_config=lambda folder: super(SavesPretrained, self).save_pretrained(folder, state_dict={}, **options),
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Not for a sharded model, of which every rank would upload.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            Fault(
                code="no-upload-of-a-sharded-model",
                what="a sharded model cannot be uploaded by one call",
                where=f"{type(self).__name__}.push_to_hub",
                got="a rank's part of the model",
                expected="the full model in a folder",
                next=_UPLOAD,
            )
        )


def _option_faults(push_to_hub: bool, distributed_checkpoint: bool, others: dict[str, Any]) -> list[Fault]:
    faults = []
    if push_to_hub:
        faults.append(_option_fault("push_to_hub", "True", "False", _UPLOAD))
    if distributed_checkpoint:
        next_step = "leave it out; to resume the job, plan.save_checkpoint(engine, folder)"
        faults.append(_option_fault("distributed_checkpoint", "True", "False", next_step))
    for name, value in others.items():
        if name == "safe_serialization":
            if not value:
                faults.append(_option_fault(name, "False", "True, which writes safetensors"))
        else:
            faults.append(_option_fault(name, repr(value), "an option of save_pretrained"))
    return faults


def _option_fault(name: str, got: str, expected: str, next_step: str = "leave it out") -> Fault:
    return Fault(
        code="save-option",
        what="a sharded model cannot be saved with this option",
        where=f"save_pretrained({name}=...)",
        got=got,
        expected=expected,
        next=next_step,
    )


def _check_full(model: Any, state_dict: dict[str, Any]) -> None:
    """Raise MismatchError where a given state dict holds shards."""
    shapes = full_shapes(model)
    faults = [
        Fault(
            code="state-dict-of-shards",
            what="the state dict holds one rank's shard of a tensor",
            where=f"save_pretrained(state_dict=...): {name}",
            got=str(list(tensor.shape)),
            expected=f"the full tensor, {list(shapes[name])}",
            next="leave out state_dict, on every rank",
        )
        for name, tensor in state_dict.items()
        if isinstance(tensor, Tensor) and name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    partly = [name for name in state_dict if name not in shapes and name.endswith("_shared")]
    faults += [
        Fault(
            code="state-dict-of-shards",
            what="the state dict holds one rank's shard of a tensor",
            where=f"save_pretrained(state_dict=...): {name}",
            got="a part that several ranks hold",
            expected=f"the full tensor {name.removesuffix('_shared')}",
            next="leave out state_dict, on every rank",
        )
        for name in partly
    ]
    if faults:
        raise MismatchError(faults)
