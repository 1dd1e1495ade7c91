"""A model as a user gives it: a folder or a live module, its files read when they are first needed, and once."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from autotp_plan.dequantize.plain_checkpoint import DEFAULT_DTYPE
from autotp_plan.dequantize.settings import settings_of
from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.huggingface.meta_model import build_model, parameters_and_buffers
from autotp_plan.schemas.plan.entries import Dequantization, Repository
from autotp_plan.schemas.storage.checkpoint import Checkpoint
from autotp_plan.sources.model_folder import ModelFolder, open_checkpoint


@dataclass(frozen=True)
class ModelInput:
    """`given` is a model's folder, of a checkpoint or a bare config.json, or a live `torch.nn.Module`.

    `factory` makes the module of a model that is not from transformers; then there may be nothing else (`given` None).
    `dtype` is what weights become that are quantised on disk (BF16, F16 or F32; None for BF16).
    """

    given: ModelFolder | Any
    factory: ModuleFactory | None = None
    dtype: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, and not a module."""
        return isinstance(self.given, ModelFolder)

    @property
    def folder(self) -> ModelFolder:
        """The folder that was given, where it is one."""
        assert isinstance(self.given, ModelFolder), f"{self.where} is not a folder"
        return self.given

    @property
    def repository(self) -> Repository | None:
        """Where on the hub the folder's files are from; None where they are not."""
        return self.folder.repository if self.is_folder else None

    @property
    def where(self) -> str:
        """The folder, or the module's class: what faults point to."""
        if self.factory is not None and not self.is_folder:
            return f"--module {self.factory.name}"
        return str(self.given) if self.is_folder else type(self.given).__name__

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """The folder's config.json, or what `save_pretrained` would write of the module's; None when it has none.

        Raises:
            DocumentError: config.json is not JSON.
            CheckpointError: config.json is not a JSON object.
        """
        if self.is_folder:
            return self.folder.config()
        config = getattr(self.given, "config", None)
        if config is not None and hasattr(config, "to_json_string"):
            config = json.loads(config.to_json_string())
            config["architectures"] = config.get("architectures") or [type(self.given).__name__]
        return config if isinstance(config, dict) else None

    @property
    def model_type(self) -> str | None:
        """The config's `model_type`."""
        found = (self.config or {}).get("model_type")
        return found if isinstance(found, str) else None

    @property
    def architecture(self) -> str | None:
        """The class that the config names; None when it names none."""
        found = (self.config or {}).get("architectures")
        return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else None

    def tensor_names(self) -> list[str]:
        """The names of the checkpoint's tensors, or of the module's parameters.

        Raises:
            CheckpointError: as `checkpoint` and `module`.
            MissingDependencyError: as `module`.
        """
        if self.checkpoint is not None:
            return list(self.checkpoint.tensors)
        return [name for name, _ in parameters_and_buffers(self.module)]

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The headers of the folder's tensors; None for a bare config.json and for a module.

        Raises:
            CheckpointError: the folder has neither tensors nor a config.json, or its files are broken.
        """
        if not self.is_folder or (not self.folder.holds_tensors and self.config is not None):
            return None
        return open_checkpoint(self.folder, self.dtype)

    @functools.cached_property
    def dequantize(self) -> Dequantization | None:
        """How the weights of the folder are quantised on disk; None where they are not.

        Raises:
            CheckpointError: as `checkpoint`; or they are quantised in a way that is not understood.
        """
        if self.checkpoint is not None:
            return self.checkpoint.dequantize
        settings = settings_of(self.config, self.folder.folder) if self.is_folder else None
        return None if settings is None else settings.dequantization(self.dtype or DEFAULT_DTYPE)

    @functools.cached_property
    def module(self) -> Any:
        """The module that was given, that of the factory or the transformers model of the folder's config, on meta.

        Raises:
            OptionError: the factory cannot be called.
            CheckpointError: transformers cannot build the model.
            MissingDependencyError: transformers is not installed.
        """
        if self.factory is not None:
            return self.factory.on_meta()
        return build_model(self.folder.folder, on_meta="all") if self.is_folder else self.given
