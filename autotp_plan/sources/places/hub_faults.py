"""What can go wrong with a model on the hub: what was understood, what was tried, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

from autotp_plan.schemas.errors import Fault, MissingDependencyError
from autotp_plan.sources.places.location import HubLocation

_EXPECTED = "a folder of this machine, or a repository of the hub"


def missing(location: HubLocation, error: ImportError) -> MissingDependencyError:
    """The package that reads from the hub is not installed."""
    return MissingDependencyError(
        Fault(
            code="hub-package-missing",
            what="there is no such folder, and reading from the hub takes a package that is not installed",
            where=location.given,
            got=f"no module named {error.name!r}",
            expected="huggingface_hub, or a folder of this machine",
            next="pip install 'autotp-plan[hub]', or give the path of a folder",
        )
    )


def not_cached(location: HubLocation, name: str, why: str) -> Fault:
    """The hub is not asked, and a file, or all of a model, is not in the cache."""
    return Fault(
        code="hub-not-cached",
        what="there is no such folder, and the model is not in the hub's cache" + (" in full" if name else ""),
        where=location.given,
        got=f"{why}; no {name or 'file'} of {location.repository} at {location.revision} in the cache",
        expected=f"{_EXPECTED} that was downloaded",
        next=f"unset HF_HUB_OFFLINE and check the network; or `{_download(location)}` where there is one; or give the "
        "path of a folder",
    )


def nothing(location: HubLocation, names: Iterable[str]) -> Fault:
    """A folder of a repository without a config.json, an index or another small file."""
    return Fault(
        code="hub-no-model",
        what="there is no model in this folder of the repository",
        where=location.given,
        got=", ".join(sorted(names)[:3]) or "no files",
        expected="config.json, and safetensors files",
        next=f"name the folder that has them: hf://{location.repository}@{location.revision}/FOLDER",
    )


def of_answer(location: HubLocation, status: int, code: str, got: str) -> Fault | None:
    """The fault of an answer of the hub; None for one that is made again, or that has no special meaning.

    Args:
        location: what was asked for.
        status: of the answer.
        code: the hub's name for the error, in the header `X-Error-Code`.
        got: what the answer says.
    """
    page = f"https://huggingface.co/{location.repository}"
    if code in ("GatedRepo", "DisabledRepo"):
        return Fault(
            code="hub-gated",
            what="access to the repository must be granted first",
            where=location.given,
            got=got,
            expected="a token of an account that may read it",
            next=f"accept the conditions at {page}, then `hf auth login` or set HF_TOKEN",
        )
    if code == "RevisionNotFound":
        return Fault(
            code="hub-no-revision",
            what="the repository has no such revision",
            where=location.given,
            got=location.revision,
            expected="a branch, a tag or a commit of the repository",
            next=f"leave out the revision, or take one of {page}/commits",
        )
    if code == "EntryNotFound":
        return Fault(
            code="hub-no-file",
            what="the repository has no such file",
            where=location.given,
            got=got,
            expected="the files of a model",
            next=f"look at {page}/tree/{location.revision}, and name the folder of the model",
        )
    if code in ("RepoNotFound", "RepositoryNotFound"):
        return Fault(
            code="hub-no-repository",
            what="there is no such folder, and no such repository on the hub that may be read",
            where=location.given,
            got=got,
            expected=_EXPECTED,
            next="check the name; a private repository takes `hf auth login` or HF_TOKEN",
        )
    if status in (401, 403):
        return Fault(
            code="hub-refused",
            what="the hub refuses access to the repository",
            where=location.given,
            got=got,
            expected="a token that may read it",
            next="`hf auth login`, or set HF_TOKEN to a token that may read it",
        )
    return None


def _download(location: HubLocation) -> str:
    revision = "" if location.revision == "main" else f" --revision {location.revision}"
    return f"hf download {location.repository}{revision}"
