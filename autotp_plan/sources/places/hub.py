"""A model on the hub: small files by huggingface_hub into its cache, weights by ranges from where they lie.

Only what is documented of huggingface_hub is used, so that its conventions hold: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE,
HF_HOME, gated repositories. All files are of one commit. A file that is in the cache is used from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.schemas.plan.entries import Repository
from autotp_plan.schemas.shards.small_files import is_copied
from autotp_plan.schemas.storage.files import StoredFile
from autotp_plan.sources.places import hub_faults
from autotp_plan.sources.places.found_folder import FoundFolder, decisive
from autotp_plan.sources.places.hub_cache import cached_folder, find_cached
from autotp_plan.sources.places.location import HubLocation
from autotp_plan.sources.transfer.http_file import HttpFile
from autotp_plan.sources.transfer.persistence import Again, Unreachable, check_status, persist

_T = TypeVar("_T")
_LIBRARY = {"library_name": "autotp-plan"}
_DOWNLOADS = 8


def hub_folder(location: HubLocation) -> FoundFolder:
    """The files of a model on the hub. config.json and the index are downloaded, weights are not.

    Raises:
        CheckpointError: it is not there, access to it is refused, or it cannot be reached and is not in the cache.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise hub_faults.missing(location, error) from None
    if huggingface_hub.is_offline_mode():
        return cached_folder(location, "HF_HUB_OFFLINE is set")
    cached = find_cached(location)
    try:
        listed = _listed(location, attempts=2 if cached else None)
    except Unreachable as error:
        return cached_folder(location, error.faults[0].got)
    return _folder(location, listed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listed:
    """The files of a folder at one commit: sizes, and SHA-256 of those that are kept by it, by name."""

    commit: str
    sizes: Mapping[str, int]
    sha256: Mapping[str, str]


def _listed(location: HubLocation, attempts: int | None) -> _Listed:
    from huggingface_hub import HfApi

    api = HfApi(**_LIBRARY)
    info = _asked(
        location,
        lambda: api.model_info(location.repository, revision=location.revision, files_metadata=True),
        attempts,
    )
    prefix = location.path("")
    files = {
        file.rfilename.removeprefix(prefix): file
        for file in info.siblings or ()
        if file.rfilename.startswith(prefix) and "/" not in file.rfilename.removeprefix(prefix)
    }
    return _Listed(
        commit=str(info.sha),
        sizes={name: file.size or 0 for name, file in files.items()},
        sha256={name: file.lfs.sha256 for name, file in files.items() if file.lfs is not None},
    )


def _folder(location: HubLocation, listed: _Listed) -> FoundFolder:
    small = [name for name, size in listed.sizes.items() if is_copied(name, size)]
    first = decisive(listed.sizes) or sorted(small, key=lambda name: listed.sizes[name])[:1]
    if not first:
        raise CheckpointError(hub_faults.nothing(location, listed.sizes))
    folder = _download(location, listed.commit, first)[0].parent
    elsewhere: dict[str, StoredFile] = {
        name: _stored(location, listed.commit, name, size)
        for name, size in listed.sizes.items()
        if name not in small and not name.endswith(".index.json") and not (folder / name).is_file()
    }
    return FoundFolder(
        given=location.given,
        folder=folder,
        elsewhere=elsewhere,
        repository=Repository(name=location.repository, commit=listed.commit, folder=location.folder),
        complete=lambda: _complete(location, listed.commit, folder, small),
        sha256=listed.sha256,
    )


def _complete(location: HubLocation, commit: str, folder: Path, names: Iterable[str]) -> None:
    _download(location, commit, [name for name in names if not (folder / name).is_file()])


def _download(location: HubLocation, commit: str, names: list[str]) -> list[Path]:
    """Files in the cache, downloaded where they are not yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def one(name: str, revision: str) -> Path:
        path = location.path(name)
        return Path(_asked(location, lambda: hf_hub_download(location.repository, path, revision=revision, **_LIBRARY)))

    def of_commit(path: Path, name: str) -> bool:
        return path.parents[location.path(name).count("/")].name == commit

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            # the first by the name of the revision, so that the cache remembers the commit that it is
            by_name = [location.revision, *[commit] * len(names)]
            found = list(pool.map(one, names, by_name))
            return [path if of_commit(path, name) else one(name, commit) for name, path in zip(names, found)]
    finally:
        if shown:
            enable_progress_bars()


def _stored(location: HubLocation, commit: str, name: str, size: int) -> HttpFile:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    path = location.path(name)
    return HttpFile(
        name=name,
        size=size,
        url=hf_hub_url(location.repository, path, revision=commit, endpoint=constants.ENDPOINT),
        where=f"hf://{location.repository}@{commit}/{path}",
        headers=build_hf_headers(**_LIBRARY),
        timeout=max(constants.HF_HUB_DOWNLOAD_TIMEOUT, 10),
        explain=lambda refused: hub_faults.of_answer(
            location, refused.status, refused.headers.get("X-Error-Code") or "", str(refused)
        ),
    )


def _asked(location: HubLocation, call: Callable[[], _T], attempts: int | None = None) -> _T:
    """What a call of huggingface_hub returns; it is made again as other requests are.

    Raises:
        CheckpointError: it is refused.
        Unreachable: there is no answer.
    """
    found: list[_T] = []

    def attempt() -> None:
        try:
            found.append(call())
        except Exception as error:  # its own errors, and those of the HTTP library that it uses
            _raise(location, error)

    persist(attempt, location.given, attempts=attempts)
    return found[0]


def _raise(location: HubLocation, error: Exception) -> NoReturn:
    """Raise what an error of huggingface_hub means: `Again`, or the fault."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # hf_hub_download had no answer, and looked into the cache
    what = str(error).strip().partition("\n")[0]
    if isinstance(error, errors.HfHubHTTPError):
        status, headers = error.response.status_code, error.response.headers
        what = headers.get("X-Error-Message") or what
        code = headers.get("X-Error-Code") or type(error).__name__.removesuffix("Error")
        fault = hub_faults.of_answer(location, status, code, what)
        if fault is None:
            check_status(status, what, headers)
    elif isinstance(error, errors.EntryNotFoundError):
        fault = hub_faults.of_answer(location, 404, "EntryNotFound", what)
    elif isinstance(error, errors.HFValidationError):
        fault = hub_faults.of_answer(location, 404, "RepositoryNotFound", what)
    else:
        fault = None
    if fault is None:
        raise Again(f"{type(error).__name__}: {what}") from error
    raise CheckpointError(fault) from None
