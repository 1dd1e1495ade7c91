"""A model in the hub's cache on this machine, for when the hub cannot be asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import CheckpointError, DocumentError
from autotp_plan.schemas.plan.entries import Repository
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, SINGLE_NAME
from autotp_plan.schemas.storage.files import Reader, Span, StoredFile
from autotp_plan.sources.places import hub_faults
from autotp_plan.sources.places.found_folder import WEIGHTS, FoundFolder
from autotp_plan.sources.places.location import HubLocation

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(eq=False, kw_only=True, slots=True)
class AbsentFile:
    """A file of a model that is not in the cache. Reading it says so."""

    name: str
    location: HubLocation
    why: str
    size: int = 2**62

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(hub_faults.not_cached(self.location, self.name, self.why))


def find_cached(location: HubLocation) -> Path | None:
    """The folder of a model in the cache, as far as it was downloaded; None where nothing was."""
    for name in (CONFIG_NAME, *(name for pair in WEIGHTS for name in pair)):
        found = _cached(location, name)
        if isinstance(found, str):
            return Path(found).parent
    return None


def cached_folder(location: HubLocation, why: str) -> FoundFolder:
    """The files of a model that are in the cache.

    Args:
        location: where the model is on the hub.
        why: the hub is not asked.

    Raises:
        CheckpointError: nothing of it is in the cache.
    """
    folder = find_cached(location)
    if folder is None:
        raise CheckpointError(hub_faults.not_cached(location, "", why))
    depth = len(Path(location.folder).parts)
    elsewhere: dict[str, StoredFile] = {
        name: AbsentFile(name=name, location=location, why=why)
        for name in _weights(location, folder)
        if not (folder / name).is_file()
    }
    repository = Repository(
        name=location.repository, commit=[folder, *folder.parents][depth].name, folder=location.folder
    )
    return FoundFolder(
        given=location.given,
        folder=folder,
        elsewhere=elsewhere,
        repository=repository,
        sha256=dict(_known_digests(folder)),
    )


def _known_digests(folder: Path) -> Iterator[tuple[str, str]]:
    """The SHA-256 of large files, by name: in the cache it is what their contents are called."""
    for path in folder.iterdir():
        contents = path.resolve().name
        if path.is_symlink() and _SHA256.fullmatch(contents):
            yield path.name, contents


def _weights(location: HubLocation, folder: Path) -> set[str]:
    """The files that hold the weights, as far as the cache says; what is wrong with the index is found by others."""
    for single, index in WEIGHTS:
        if (folder / single).is_file():
            return {single}
        if (folder / index).is_file():
            return _named(folder / index)
    known_not_to_exist = _cached(location, SINGLE_NAME) not in (None, str(folder / SINGLE_NAME))
    return set() if known_not_to_exist else {SINGLE_NAME}


def _named(index: Path) -> set[str]:
    try:
        found = documents.read_json(index, "index of the weights", plain=True)
    except DocumentError:
        return set()
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    return {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()


def _cached(location: HubLocation, name: str) -> object:
    """The path of a file in the cache; None where it is not there; something else where it is known not to exist."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(location.repository, location.path(name), revision=location.revision)
