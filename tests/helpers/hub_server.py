"""A server on loopback that answers as the Hugging Face hub does, and fails when it is told to.

Written after what the hub sends: `/api/models/NAME/revision/REVISION`, `/NAME/resolve/REVISION/FILE` with
`X-Repo-Commit`, `X-Linked-Etag` and a redirect to signed links for large files, `X-Error-Code` for what it refuses.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_LARGE = (".safetensors", ".bin", "tokenizer.model")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Request(NamedTuple):
    """What was asked for and what was sent: `sent` are bytes of the body."""

    method: str
    path: str
    range: str
    authorization: str
    status: int
    sent: int


class Trouble(NamedTuple):
    """An answer that is not what it should be: another status, or a body that is cut after `cut` bytes."""

    status: int = 0
    headers: Mapping[str, str] = {}
    cut: int = -1


@dataclass
class Repository:
    """A repository with one branch.

    Attributes:
        files: the contents of files, or files that have them, by path.
        commit: the commit that `main` is.
        gated: the token that may read it; empty for everybody.
        sha256: what the hub says where that is not what a file has.
        older: what there was at other commits.
        has_checksums: whether the hub says what the SHA-256 of large files is.
    """

    files: dict[str, bytes | Path]
    commit: str = "c" * 40
    gated: str = ""
    sha256: dict[str, str] = field(default_factory=dict)
    older: dict[str, Repository] = field(default_factory=dict)
    has_checksums: bool = True

    def size(self, path: str) -> int:
        """Bytes of a file."""
        found = self.files[path]
        return len(found) if isinstance(found, bytes) else found.stat().st_size

    def digest(self, path: str) -> str:
        """The SHA-256 that the hub has of a file."""
        if path not in self.sha256:
            found = self.files[path]
            self.sha256[path] = hashlib.sha256(found if isinstance(found, bytes) else found.read_bytes()).hexdigest()
        return self.sha256[path]


def folder_files(folder: Path, prefix: str = "") -> dict[str, bytes | Path]:
    """The files of a folder, for a repository."""
    return {prefix + path.name: path for path in sorted(folder.iterdir()) if path.is_file()}


class HubServer(http.server.ThreadingHTTPServer):
    """The server. `trouble` is asked before each answer what to do instead; `requests` is what happened."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.trouble: Callable[[str, str], Trouble | None] = lambda method, path: None
        self.links = 0
        self.answers_ranges = True
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent(self, part: str = "") -> int:
        """Bytes that were sent in answer to requests whose path has `part`."""
        return sum(request.sent for request in self.requests if part in request.path)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server while the block runs."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.trouble = self.server.trouble(self.command, path)
        if self.trouble is not None and self.trouble.status:
            self._send(self.trouble.status, b"trouble", dict(self.trouble.headers))
        elif path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
        elif path == "/sent":
            self._send(200, str(self.server.sent("/link")).encode(), {})
        elif path.startswith("/files/"):
            self._file(path.removeprefix("/files/"))
        elif path.startswith("/link/"):
            self._link(path, url.query)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _repository(self, name: str, revision: str, file: bool) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif file and repository.gated and self.headers.get("Authorization") != f"Bearer {repository.gated}":
            status = 403 if self.headers.get("Authorization") else 401
            message = f"Access to model {name} is restricted."
            self._send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        elif revision in repository.older:
            return repository.older[revision]
        elif revision not in ("main", repository.commit):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return repository
        return None

    def _info(self, path: str) -> None:
        if "/tree/" in path:
            self._tree(*path.split("/tree/"))
            return
        name, _, revision = path.partition("/revision/")
        repository = self._repository(name, revision or "main", False)
        if repository is None:
            return
        siblings = []
        for file in repository.files:
            entry: dict[str, Any] = {"rfilename": file, "size": repository.size(file), "blobId": "b" * 40}
            if file.endswith(_LARGE) and repository.has_checksums:
                entry["lfs"] = {"sha256": repository.digest(file), "size": entry["size"], "pointerSize": 135}
            siblings.append(entry)
        info = {"id": name, "modelId": name, "sha": repository.commit, "private": False, "siblings": siblings}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str) -> None:
        repository = self._repository(name, revision, False)
        if repository is None:
            return
        listed = []
        for path in repository.files:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": repository.size(path), "oid": "b" * 40}
            if path.endswith(_LARGE):
                entry["lfs"] = {"oid": repository.digest(path), "size": entry["size"], "pointerSize": 135}
            listed.append(entry)
        self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name, revision, True)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if file not in repository.files:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif file.endswith(_LARGE):
            link = (
                f"http://localhost:{self.server.server_address[1]}/link/{self.server.links}/{name}/{file}?signature=1"
            )
            linked = {"X-Linked-Size": str(repository.size(file))}
            if repository.has_checksums:
                linked["X-Linked-Etag"] = f'"{repository.digest(file)}"'
            self._send(302, b"", {**headers, **linked, "Location": link})
        else:
            content = repository.files[file]
            content = content if isinstance(content, bytes) else content.read_bytes()
            self._send(200, content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _link(self, path: str, query: str) -> None:
        _, _, number, org, name, file = path.split("/", 5)
        repository = self.server.repositories[f"{org}/{name}"]
        repository = repository.older.get("".join({*repository.older}), repository)
        if int(number) != self.server.links or query != "signature=1" or self.headers.get("Authorization"):
            self._send(403, b"", {})  # a link that has expired; and a link gets no token
            return
        self._part(repository, file)

    def _file(self, path: str) -> None:
        """A file of a plain web server."""
        org, name, file = path.split("/", 2)
        repository = self.server.repositories.get(f"{org}/{name}")
        if repository is None or file not in repository.files:
            self._send(404, b"", {})
        else:
            self._part(repository, file)

    def _part(self, repository: Repository, file: str) -> None:
        found = _RANGE.fullmatch(self.headers.get("Range") or "") if self.server.answers_ranges else None
        size = repository.size(file)
        start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if found else {}
        self._reply(206 if found else 200, headers, repository.files[file], start, stop)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._reply(status, headers, body, 0, len(body))

    def _reply(self, status: int, headers: Mapping[str, str], content: bytes | Path, start: int, stop: int) -> None:
        """Bytes `start` to `stop` of the content. It is recorded before the first byte of the answer is sent:
        a client that goes on at the status line finds its request among those that happened."""
        cut = self.trouble.cut if self.trouble is not None else -1
        until = stop if cut < 0 else min(stop, start + cut)
        sent = until - start if self.command == "GET" else 0
        asked = (self.headers.get("Range") or "", self.headers.get("Authorization") or "")
        with self.server.lock:
            self.server.requests.append(Request(self.command, self.path, *asked, status, sent))
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        if self.command == "GET" and isinstance(content, bytes):
            self.wfile.write(content[start:until])
        elif self.command == "GET":
            assert isinstance(content, Path)
            with content.open("rb") as file:
                while start < until:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, min(until - start, 1 << 20))
        if until < stop:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
