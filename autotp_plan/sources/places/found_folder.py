"""A model's files once it was found: the small ones in a folder of this machine, the weights there or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autotp_plan.schemas.plan.entries import Repository
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from autotp_plan.schemas.storage.files import StoredFile
from autotp_plan.sources.torch_files.torch_checkpoint import TORCH_INDEX_NAME, TORCH_NAME


def _nothing() -> None:
    """All small files are there already."""


WEIGHTS = ((SINGLE_NAME, INDEX_NAME), (TORCH_NAME, TORCH_INDEX_NAME))
"""The single file of weights, or the index of several: `from_pretrained` takes the first pair that is there."""
DECISIVE = (CONFIG_NAME, "adapter_config.json", INDEX_NAME)
"""The small files that decide which weights are read; where there are no safetensors files, the index of others too."""


def decisive(names: Collection[str]) -> list[str]:
    """Those of the files of a folder that decide which weights are read."""
    others = () if INDEX_NAME in names or SINGLE_NAME in names else (TORCH_INDEX_NAME,)
    return [name for name in (*DECISIVE, *others) if name in names]


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFolder:
    """Where a model is.

    Attributes:
        given: what the user gave: faults point to it.
        folder: holds config.json and the index; and the weights that `elsewhere` does not name.
        elsewhere: files with weights that are not in `folder`, by name.
        repository: the repository and commit of the hub that the files are of; None where they are of none.
        complete: fetches the other small files (tokenizer, generation) into `folder`.
        sha256: the SHA-256 that files should have, in hexadecimal digits, by name, as far as the hub says it.
    """

    given: str
    folder: Path
    elsewhere: Mapping[str, StoredFile] = field(default_factory=dict)
    repository: Repository | None = None
    complete: Callable[[], None] = _nothing
    sha256: Mapping[str, str] = field(default_factory=dict)
