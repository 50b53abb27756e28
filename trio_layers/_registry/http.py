"""The names of httpx that this package uses, and clients with our settings.

Only `trio_layers.testing` and the files ``http*.py`` import httpx. Functions that look inside a
client do so with `getattr`, and change nothing if httpx has changed there.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final

import httpcore
from httpx import (
    URL,
    AsyncByteStream,
    AsyncClient,
    Headers,
    HTTPError,
    InvalidURL,
    Limits,
    Proxy,
    Request,
    Response,
    StreamError,
    Timeout,
    create_ssl_context,
)

from .._version import __version__
from .http_backend import LargeReads

__all__ = [
    "CLOSE_GRACE",
    "URL",
    "AsyncByteStream",
    "AsyncClient",
    "HTTPError",
    "Headers",
    "InvalidURL",
    "Request",
    "Response",
    "StreamError",
    "Timeout",
    "create_ssl_context",
    "new_client",
    "pools_of",
    "proxy_of",
    "read_more_at_once",
]

CLOSE_GRACE: Final = 5.0
"""Seconds that the closing of a connection may take."""


def new_client(
    context: ssl.SSLContext, max_connections: int, proxy: str | None = None
) -> AsyncClient:
    """Make an httpx client that ignores the environment and keeps no cookies.

    Args:
        context: The TLS settings and certificates.
        max_connections: The most connections of its pool.
        proxy: The URL of the proxy for all its requests; ``None`` for direct requests.
    """
    client = AsyncClient(
        verify=context,
        proxy=None if proxy is None else Proxy(proxy),
        trust_env=False,
        limits=Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        headers={"User-Agent": f"trio-layers/{__version__}"},
        # Registries need no cookies, and a cookie that is not kept cannot reach another host.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
    )
    read_more_at_once(client)
    return client


def proxy_of(client: AsyncClient, url: URL) -> str | None:
    """Return host and port of the proxy for a URL, for messages.

    ``None`` stands for no proxy, or for a version of httpx that does not show it.
    """
    find = getattr(client, "_transport_for_url", None)
    transport = None if find is None else find(url)
    proxy = getattr(getattr(transport, "_pool", None), "_proxy_url", None)
    if not isinstance(proxy, httpcore.URL):
        return None
    host = proxy.host.decode("ascii", "replace")
    return f"{f'[{host}]' if ':' in host else host}:{proxy.origin.port}"


def read_more_at_once(client: AsyncClient) -> None:
    """Let a new client read more bytes at once from plain connections; see `LargeReads`.

    httpx has no option for a network backend, and its pool has no public place for one. If the
    pool's private place has moved, the client stays as it is. A TLS connection never gives more
    than one record.
    """
    for pool in pools_of(client):
        backend = getattr(pool, "_network_backend", None)
        if isinstance(backend, httpcore.AsyncNetworkBackend):
            pool._network_backend = LargeReads(backend)


def pools_of(client: AsyncClient) -> Iterator[httpcore.AsyncConnectionPool]:
    """Yield the connection pools of a client."""
    transports = [getattr(client, "_transport", None), *getattr(client, "_mounts", {}).values()]
    for transport in transports:
        pool = getattr(transport, "_pool", None)
        if isinstance(pool, httpcore.AsyncConnectionPool):
            yield pool
