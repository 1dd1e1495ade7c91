"""What a string that names a model means: a folder of this machine, a repository of the hub, or a folder elsewhere."""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.schemas.errors import Fault, OptionError

_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
_WEB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<rest>.+)")
_REVISION_WITH_SLASHES = re.compile(r"refs/(?:pr|convert)/[^/]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::|://)")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubLocation:
    """A folder of a repository of the hub: `revision` is a branch, tag or commit, `folder` empty for the top."""

    given: str
    repository: str
    revision: str = "main"
    folder: str = ""

    def path(self, name: str) -> str:
        """A file's path in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteLocation:
    """A folder in a bucket or on a server, as a URL without a slash at its end."""

    url: str

    @property
    def is_web(self) -> bool:
        """Whether it is read by plain HTTP."""
        return self.url.startswith(("http://", "https://"))


Location = Path | HubLocation | RemoteLocation


def parse_location(given: str | os.PathLike[str]) -> Location:
    """Where a model is.

    Args:
        given: a path; `org/name`, `org/name@revision` or `hf://org/name@revision/sub/folder`; or a URL, such as
            `s3://bucket/folder`. What exists as a path is one.

    Raises:
        OptionError: it looks like a place on the hub, and cannot be one.
    """
    path = Path(given)
    if not isinstance(given, str) or path.exists():
        return path
    if given.startswith("file://"):
        return Path(urllib.parse.unquote(given.removeprefix("file://")))
    if given.startswith("hf://"):
        return _hub(given, given.removeprefix("hf://"))
    if web := _WEB.fullmatch(given.rstrip("/")):
        return _hub(given, re.sub(r"^([^/]+/[^/]+)/(?:tree|blob|resolve)/", r"\1@", web["rest"]))
    if _SCHEME.match(given):
        return RemoteLocation(url=given.rstrip("/"))
    if found := _ID.fullmatch(given):
        return HubLocation(given=given, repository=found["repository"], revision=found["revision"] or "main")
    return path


def _hub(given: str, rest: str) -> HubLocation:
    """The location `org/name@revision/sub/folder`."""
    repository, _, folder = rest.partition("@")
    if "@" in rest:
        slashes = _REVISION_WITH_SLASHES.match(folder)
        revision = slashes[0] if slashes else folder.partition("/")[0]
        folder = folder[len(revision) :].strip("/")
    else:
        repository, revision = "/".join(rest.split("/")[:2]), "main"
        folder = "/".join(rest.split("/")[2:]).strip("/")
    found = _ID.fullmatch(repository)
    outside = any(part in ("", ".", "..") for part in folder.split("/")) if folder else False
    if found is None or found["revision"] or not revision or outside or repository.startswith(("datasets/", "spaces/")):
        raise OptionError(
            Fault(
                code="hub-location",
                what="this names no model on the hub",
                where=given,
                got=f"repository {repository!r}, revision {revision!r}, folder {folder!r}",
                expected="hf://org/name, hf://org/name@revision or hf://org/name@revision/sub/folder",
                next="write it like hf://meta-llama/Llama-3.1-8B@main; a slash in a revision is written %2F",
            )
        )
    revision = urllib.parse.unquote(revision)
    return HubLocation(given=given, repository=repository, revision=revision, folder=folder)
