"""A model in a bucket, by fsspec: small files in a temporary folder, weights by ranges from where they lie.

fsspec's packages for the kinds of buckets (s3fs, gcsfs, adlfs) find credentials and servers as they document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from autotp_plan.schemas.errors import CheckpointError, Fault, MissingDependencyError, OptionError
from autotp_plan.schemas.shards.small_files import is_copied
from autotp_plan.schemas.storage.files import Reader, Span, StoredFile
from autotp_plan.sources.places.found_folder import FoundFolder, decisive
from autotp_plan.sources.places.location import RemoteLocation
from autotp_plan.sources.transfer.in_flight import fetch_spans
from autotp_plan.sources.transfer.persistence import Again, persist
from autotp_plan.sources.transfer.temporary_folder import TemporaryFolder

_T = TypeVar("_T")
ATTEMPTS = 2
"""How often in a row a range may fail: the packages make requests again themselves."""
_REFUSALS = ("NoCredentials", "CredentialRetrieval", "Auth", "Permission", "Forbidden", "AccessDenied")


@dataclass(eq=False, kw_only=True, slots=True)
class BucketFile:
    """A file of a bucket; `path` is what its file system calls it."""

    name: str
    size: int
    where: str
    path: str
    system: Any

    def __str__(self) -> str:
        return self.where

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        """As `StoredFile.read_into`. Raises CheckpointError for what is refused, or cannot be reached."""
        fetch_spans(target, spans, self._fetch)

    def _fetch(self, start: int, target: memoryview) -> None:
        def read() -> None:
            found = self.system.cat_file(self.path, start=start, end=start + len(target))
            if len(found) != len(target):
                raise EOFError(f"{self.where} has {len(found)} bytes from byte {start} on, not {len(target)}")
            target[:] = found

        _asked(self.where, read)


def bucket_folder(location: RemoteLocation) -> FoundFolder:
    """The files of a model in a bucket. config.json and the index are fetched, weights are not.

    Raises:
        CheckpointError: it cannot be read.
        OptionError: fsspec knows no such kind of place.
        MissingDependencyError: the package that reads from there is not installed.
    """
    system, path = _system(location)
    listed = _asked(location.url, lambda: system.ls(path, detail=True))
    sizes = {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"}
    small = [name for name, size in sizes.items() if is_copied(name, size)]

    def fetch(name: str) -> bytes:
        return bytes(_asked(f"{location.url}/{name}", lambda: system.cat_file(f"{path}/{name}")))

    folder = TemporaryFolder(fetch)
    folder.fetch(decisive(sizes))
    elsewhere: dict[str, StoredFile] = {
        name: BucketFile(name=name, size=size, where=f"{location.url}/{name}", path=f"{path}/{name}", system=system)
        for name, size in sizes.items()
        if name not in small and not name.endswith(".index.json")
    }
    return FoundFolder(
        given=location.url, folder=folder.path, elsewhere=elsewhere, complete=lambda: folder.fetch(small)
    )


def _system(location: RemoteLocation) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError(_package_missing(location.url, str(error))) from None
    try:
        system, path = fsspec.core.url_to_fs(location.url)
    except ImportError as error:
        raise MissingDependencyError(_package_missing(location.url, str(error))) from None
    except ValueError as error:
        raise OptionError(
            Fault(
                code="unknown-place",
                what="this is no place that a model can be read from",
                where=location.url,
                got=str(error),
                expected="a folder, an id of the hub (org/name), or a URL that fsspec knows, such as s3://bucket/folder",
                next="check the part before ://",
            )
        ) from None
    except Exception as error:
        raise CheckpointError(_fault(location.url, error)) from None
    return system, str(path).rstrip("/")


def _asked(where: str, call: Callable[[], _T]) -> _T:
    """What a call of a file system returns; made again where that may help. Raises CheckpointError."""
    found: list[_T] = []

    def attempt() -> None:
        try:
            found.append(call())
        except Exception as error:  # those of the backends are of many kinds, and few are OSErrors
            if isinstance(error, EOFError) or _is_final(error):
                raise CheckpointError(_fault(where, error)) from None
            raise Again(_text(error)) from None

    persist(attempt, where, attempts=ATTEMPTS)
    return found[0]


def _is_final(error: Exception) -> bool:
    """Whether no repetition changes it."""
    return isinstance(error, (FileNotFoundError, PermissionError, ImportError)) or _is_refusal(error)


def _is_refusal(error: Exception) -> bool:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return isinstance(error, PermissionError) or any(part in kind for kind in kinds for part in _REFUSALS)


def _fault(where: str, error: Exception) -> Fault:
    if isinstance(error, FileNotFoundError):
        return Fault(
            code="bucket-not-there",
            what="there is nothing at this place",
            where=where,
            got=_text(error),
            expected="the folder of a model",
            next="check the name of the bucket and of the folder",
        )
    if _is_refusal(error):
        return Fault(
            code="bucket-refused",
            what="access to the bucket is refused",
            where=where,
            got=_text(error),
            expected="credentials that may list and read the folder",
            next="set them as the package for this kind of bucket documents (for s3:// AWS_PROFILE, or "
            "FSSPEC_S3_ANON=true for a public bucket)",
        )
    return Fault(
        code="bucket-unreadable",
        what="the bucket cannot be read",
        where=where,
        got=_text(error),
        expected="the files of a model",
        next="check the network and the settings of the package for this kind of bucket",
    )


def _package_missing(where: str, got: str) -> Fault:
    return Fault(
        code="bucket-package-missing",
        what="reading from this place takes a package that is not installed",
        where=where,
        got=got,
        expected="fsspec, and its package for this kind of bucket",
        next="pip install 'autotp-plan[remote]', for s3:// and gs://; fsspec's documentation names others",
    )


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no reason'}"
