"""Connections to web servers that are kept and used again, and one request over them.

`http.client` and not a larger library: its `readinto` lets the kernel write into memory that we hand out, which is
several times as fast as taking what arrives in pieces of 64 KB. Proxies are those of the environment.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import os
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping

from autotp_plan.sources.transfer.in_flight import CONNECTIONS

MOST_REDIRECTS = 8
_MOVED = frozenset({301, 302, 303, 307, 308})
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)

Origin = tuple[str, str, int]
_idle: dict[Origin, list[http.client.HTTPConnection]] = {}
_lock = threading.Lock()
os.register_at_fork(after_in_child=_idle.clear)


@contextlib.contextmanager
def answer(
    url: str, headers: Mapping[str, str], *, method: str = "GET", timeout: float
) -> Iterator[tuple[http.client.HTTPResponse, str]]:
    """The answer to a request, and the URL that gave it: redirects are followed.

    Args:
        url: where it is asked for.
        headers: `Authorization` is sent to the host of `url` alone.
        method: GET or HEAD.
        timeout: seconds without an answer, or without a byte.

    Raises:
        OSError: there is no connection, or it broke.
        http.client.HTTPException: what came is no answer.
    """
    headers = {"Accept-Encoding": "identity", **headers}
    for _ in range(MOST_REDIRECTS):
        connection, response = _asked(url, headers, method, timeout)
        try:
            target = response.getheader("Location")
            if response.status not in _MOVED or not target:
                yield response, url
                return
            response.read()
        finally:
            _keep(url, connection, response)
        target = urllib.parse.urljoin(url, target)
        if not same_host(target, url):
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
    raise http.client.HTTPException(f"more than {MOST_REDIRECTS} redirects")


def close_kept() -> None:
    """Close the connections that are kept."""
    with _lock:
        kept = [connection for of_one in _idle.values() for connection in of_one]
        _idle.clear()
    for connection in kept:
        connection.close()


def same_host(first: str, second: str) -> bool:
    """Whether two URLs are of the same host and port, and the same secrecy."""
    return _origin(first) == _origin(second)


def _asked(
    url: str, headers: Mapping[str, str], method: str, timeout: float
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """An answer. A connection that was kept may have been closed by the server since: then a new one is made."""
    parts = urllib.parse.urlsplit(url)
    proxy = _proxy(parts.scheme, parts.hostname or "")
    path = (
        url
        if proxy and parts.scheme == "http"
        else urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    )
    while True:
        with _lock:
            kept = _idle.get(_origin(url))
            connection = kept.pop() if kept else None
        reused = connection is not None
        connection = connection or _connection(_origin(url), proxy, timeout)
        try:
            connection.request(method, path, headers=dict(headers))
            return connection, connection.getresponse()
        except BaseException as error:
            connection.close()
            if not (reused and isinstance(error, _STALE)):
                raise


def _keep(url: str, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
    """Keep a connection whose answer was read to its end."""
    if response.isclosed() and connection.sock is not None:
        with _lock:
            kept = _idle.setdefault(_origin(url), [])
            if len(kept) < 2 * CONNECTIONS:
                kept.append(connection)
                return
    connection.close()


def _origin(url: str) -> Origin:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _connection(origin: Origin, proxy: urllib.parse.SplitResult | None, timeout: float) -> http.client.HTTPConnection:
    scheme, host, port = origin
    to = (host, port) if proxy is None else (proxy.hostname or "", proxy.port or 80)
    if scheme == "http":
        return http.client.HTTPConnection(*to, timeout=timeout)
    secure = http.client.HTTPSConnection(*to, timeout=timeout, context=_certificates())
    if proxy is not None:
        account = (
            f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
            if proxy.username
            else ""
        )
        basic = {"Proxy-Authorization": f"Basic {base64.b64encode(account.encode()).decode()}"} if account else {}
        secure.set_tunnel(host, port, headers=basic)
    return secure


def _proxy(scheme: str, host: str) -> urllib.parse.SplitResult | None:
    found = urllib.request.getproxies()
    url = found.get(scheme) or found.get("all")
    if not url or urllib.request.proxy_bypass(host):
        return None
    return urllib.parse.urlsplit(url if "://" in url else f"http://{url}")


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Those of the system, or of SSL_CERT_FILE; those of certifi too, which is there where huggingface_hub is."""
    context = ssl.create_default_context()
    if not os.environ.get("SSL_CERT_FILE"):
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context
