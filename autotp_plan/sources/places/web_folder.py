"""A model in a folder of a web server that answers requests for ranges of files. Such a server lists nothing.

So the weights are those that the index names, and of the small files those that models usually have are asked for.
"""

from __future__ import annotations

import json
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from autotp_plan.schemas.storage.files import StoredFile
from autotp_plan.sources.places.found_folder import WEIGHTS, FoundFolder
from autotp_plan.sources.places.location import RemoteLocation
from autotp_plan.sources.torch_files.torch_checkpoint import TORCH_INDEX_NAME
from autotp_plan.sources.transfer.http_connections import answer
from autotp_plan.sources.transfer.http_file import TIMEOUT, HttpFile
from autotp_plan.sources.transfer.in_flight import CONNECTIONS
from autotp_plan.sources.transfer.persistence import Refused, check_status, persist
from autotp_plan.sources.transfer.temporary_folder import TemporaryFolder

USUAL = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "README.md", "LICENSE",
)  # fmt: skip


def web_folder(location: RemoteLocation) -> FoundFolder:
    """The files of a model on a web server. config.json and the index are fetched, weights are not.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = TemporaryFolder(lambda name: _content(_url(location, name)))
    folder.fetch((CONFIG_NAME, INDEX_NAME))
    sizes: dict[str, int] = {}
    for single, index in WEIGHTS:
        folder.fetch((index,))
        sizes = _sizes(location, [single, *_named(folder.path / index)])
        if sizes or (folder.path / index).exists():
            break
    if not sizes and not any((folder.path / name).exists() for name in (CONFIG_NAME, INDEX_NAME, TORCH_INDEX_NAME)):
        raise CheckpointError(_nothing(location))
    elsewhere: dict[str, StoredFile] = {
        name: HttpFile(name=name, size=size, url=_url(location, name), where=_url(location, name))
        for name, size in sizes.items()
    }
    return FoundFolder(
        given=location.url, folder=folder.path, elsewhere=elsewhere, complete=lambda: folder.fetch(USUAL)
    )


def _sizes(location: RemoteLocation, names: list[str]) -> dict[str, int]:
    """The bytes of those of the files that are there."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = zip(names, pool.map(lambda name: _size(_url(location, name)), names))
        return {name: size for name, size in found if size is not None}


def _named(index: Path) -> list[str]:
    """The files with weights that an index names; what is wrong with it is found by others."""
    if not index.exists():
        return []
    try:
        found = json.loads(index.read_bytes())["weight_map"].values()
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    return sorted({name for name in found if isinstance(name, str) and "/" not in name})


def _url(location: RemoteLocation, name: str) -> str:
    parts = urllib.parse.urlsplit(location.url)
    path = f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _content(url: str) -> bytes | None:
    """A file; None where there is none."""
    found: list[bytes] = []

    def attempt() -> None:
        with answer(url, {}, timeout=TIMEOUT) as (response, _):
            if response.status not in (404, 410):
                check_status(response.status, response.reason, response.headers)
                found.append(response.read())

    persist(attempt, url)
    return found[0] if found else None


def _size(url: str) -> int | None:
    """The bytes of a file; None where there is none."""
    found: list[int] = []

    def attempt() -> None:
        with answer(url, {}, method="HEAD", timeout=TIMEOUT) as (response, _):
            if response.status in (404, 410):
                return
            check_status(response.status, response.reason, response.headers)
            length = response.getheader("Content-Length")
            if length is None:
                raise Refused(response.status, "the server does not say how large the file is", response.headers)
            found.append(int(length))

    persist(attempt, url)
    return found[0] if found else None


def _nothing(location: RemoteLocation) -> Fault:
    return Fault(
        code="web-no-model",
        what="there is no model in this folder of the server",
        where=location.url,
        got="404 for config.json and for weights",
        expected=f"config.json, and {SINGLE_NAME} or {INDEX_NAME}",
        next="give the URL of the folder that has these files",
    )
