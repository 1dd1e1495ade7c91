"""A model in a folder of a web server that answers requests for ranges of files. Such a server lists nothing.

So the weights are those that the index names, and of the small files those that models usually have are asked for.
"""

from __future__ import annotations

import json
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from autotp_plan.schemas.storage.files import StoredFile
from autotp_plan.sources.places.found_folder import FoundFolder
from autotp_plan.sources.places.location import RemoteLocation
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
    index = folder.path / INDEX_NAME
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        urls = {name: _url(location, name) for name in _named(index.read_bytes() if index.exists() else b"")}
        sizes = dict(zip(urls, pool.map(_size, urls.values())))
    if not (index.exists() or (folder.path / CONFIG_NAME).exists() or any(size is not None for size in sizes.values())):
        raise CheckpointError(_nothing(location))
    elsewhere: dict[str, StoredFile] = {
        name: HttpFile(name=name, size=size, url=urls[name], where=urls[name])
        for name, size in sizes.items()
        if size is not None
    }
    return FoundFolder(
        given=location.url, folder=folder.path, elsewhere=elsewhere, complete=lambda: folder.fetch(USUAL)
    )


def _named(index: bytes) -> list[str]:
    """The files with weights; what is wrong with the index is found by others."""
    if not index:
        return [SINGLE_NAME]
    try:
        found = json.loads(index)["weight_map"].values()
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
