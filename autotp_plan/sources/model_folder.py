"""A model's files: the small ones in a folder of this machine, the weights there or elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotp_plan.schemas.storage.checkpoint import Checkpoint, read_config
from autotp_plan.schemas.storage.files import StoredFile
from autotp_plan.sources.weight_files import EXPLICIT_KEY, holds_weights, read_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """Where a model is.

    Attributes:
        given: what the user gave: faults point to it.
        folder: holds config.json, the index and the tokenizer; and the weights that `elsewhere` does not name.
        elsewhere: files with weights that are not in `folder`, by name.
    """

    given: str
    folder: Path
    elsewhere: Mapping[str, StoredFile] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.given

    @property
    def holds_tensors(self) -> bool:
        """Whether it has weights, and not a config.json alone. Raises as `config`."""
        return holds_weights(self.folder, self.elsewhere) or EXPLICIT_KEY in (self.config() or {})

    def config(self) -> dict[str, Any] | None:
        """The parsed config.json; None when there is none.

        Raises:
            DocumentError: it is not JSON.
            CheckpointError: it is JSON, but not an object.
        """
        return read_config(self.folder) if self.folder.is_dir() else None


Place = str | os.PathLike[str] | ModelFolder
"""A model as it is given: a folder, or one that was found already."""


def model_folder(place: Place) -> ModelFolder:
    """The folder that a user named."""
    if isinstance(place, ModelFolder):
        return place
    return ModelFolder(given=str(place), folder=Path(place))


def open_checkpoint(place: Place) -> Checkpoint:
    """The headers of a model's weights; no tensor is read.

    Raises:
        CheckpointError: a file is missing, broken or does not hold what the index says; or `from_pretrained` would read
            other weights than those in the folder.
        DocumentError: the index or config.json is not JSON.
    """
    found = model_folder(place)
    return read_weights(found.folder, found.elsewhere, found.config())
