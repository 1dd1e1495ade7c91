"""From what a user gave to a model's files: the one place that decides what a string means."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.dequantize.plain_checkpoint import DEFAULT_DTYPE, plain_checkpoint
from autotp_plan.schemas.collection import paused
from autotp_plan.schemas.storage.checkpoint import Checkpoint, read_config
from autotp_plan.sources.places.found_folder import FoundFolder
from autotp_plan.sources.places.location import HubLocation, parse_location
from autotp_plan.sources.weight_files import EXPLICIT_KEY, holds_weights, read_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder(FoundFolder):
    """Where a model is, and whether it has a config and weights."""

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
"""A model as it is given: a path, an id of the hub, a URL; or one that was found already."""


def model_folder(place: Place) -> ModelFolder:
    """Where the files of a model are that a user named.

    Args:
        place: a folder; `org/name`, `org/name@revision` or `hf://org/name@revision/sub/folder`, a repository of the
            hub; or a URL of a folder with the files. Of the last two config.json and the index are fetched.

    Raises:
        OptionError: it names no model.
        CheckpointError: a repository or folder far away cannot be read.
        MissingDependencyError: the package that reads from there is not installed.
    """
    if isinstance(place, ModelFolder):
        return place
    location = parse_location(place)
    if isinstance(location, Path):
        return ModelFolder(given=str(place), folder=location)
    # imported here: what reads from far away takes longer to import than all that reads a folder
    if isinstance(location, HubLocation):
        from autotp_plan.sources.places.hub import hub_folder

        found = hub_folder(location)
    elif location.is_web:
        from autotp_plan.sources.places.web_folder import web_folder

        found = web_folder(location)
    else:
        from autotp_plan.sources.places.bucket import bucket_folder

        found = bucket_folder(location)
    return ModelFolder(**{entry.name: getattr(found, entry.name) for entry in dataclasses.fields(found)})


@paused()
def open_checkpoint(place: Place, dtype: str | None = None) -> Checkpoint:
    """The headers of a model's weights; no tensor is read.

    Args:
        place: where the model is.
        dtype: what weights are that are quantised on disk: BF16, F16 or F32; None for BF16. They are computed when they
            are read.

    Raises:
        CheckpointError: a file is missing, broken or does not hold what the index says; `from_pretrained` would read
            other weights than those in the folder; weights are quantised in a way that is not understood; or as
            `model_folder`.
        DocumentError: the index or config.json is not JSON.
    """
    found = model_folder(place)
    checkpoint = read_weights(found.folder, found.elsewhere, found.config())
    return plain_checkpoint(checkpoint, dtype or DEFAULT_DTYPE)
