"""httpx, imported by nothing else but `trio_layers.testing`: what is used of it, and a client made
our way.

A blob comes in half a megabyte at a time, where the network is faster. httpcore asks its network
backend for 64 KiB at a time, and each of them takes its way through eight layers of calls: for an
image of 367 MB that is half a second, more than its hashing. httpx has no option for it, and its
pool no public place for a backend of one's own; so it is put where the pool keeps its own, if
that is where it was when this was written. Else all works as before.

A request is sent by `send`, which takes back what a pool loses when that is cancelled, in the same
way, and sends it again if the connection that was kept for it has ended.
"""
# ruff: noqa: ASYNC109  the timeouts are parameters of what is overridden

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final, final

import httpcore
import trio
from httpx import (
    URL,
    AsyncByteStream,
    AsyncClient,
    ConnectError,
    ConnectTimeout,
    Headers,
    HTTPError,
    InvalidURL,
    Limits,
    NetworkError,
    Proxy,
    ProxyError,
    ReadError,
    RemoteProtocolError,
    Request,
    Response,
    StreamError,
    Timeout,
    TimeoutException,
    WriteError,
    create_ssl_context,
)

from .._printable import printable_line
from .._version import __version__

__all__ = [
    "CLOSE_GRACE",
    "URL",
    "AsyncByteStream",
    "AsyncClient",
    "HTTPError",
    "Headers",
    "InvalidURL",
    "Response",
    "StreamError",
    "Timeout",
    "close_connection",
    "connection_failed",
    "create_ssl_context",
    "discreet",
    "never_connected",
    "new_client",
    "proxy_of",
    "read_more_at_once",
    "send",
]

_AT_ONCE: Final = 512 * 1024

# Seconds.
CLOSE_GRACE: Final = 5.0

_SENT_TWICE: Final = frozenset({"GET", "HEAD"})


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
        # Registries need none, and what is not kept cannot reach another one.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
    )
    read_more_at_once(client)
    return client


def proxy_of(client: AsyncClient, url: URL) -> str | None:
    """Host and port of the proxy through which a client asks there, for people; ``None`` if there
    is none, or httpx is not as it was when this was written: it does not say.
    """
    find = getattr(client, "_transport_for_url", None)
    transport = None if find is None else find(url)
    proxy = getattr(getattr(transport, "_pool", None), "_proxy_url", None)
    if not isinstance(proxy, httpcore.URL):
        return None
    host = proxy.host.decode("ascii", "replace")
    return f"{f'[{host}]' if ':' in host else host}:{proxy.origin.port}"


def read_more_at_once(client: AsyncClient) -> None:
    """Have a client that was just made read more at once, over plain connections. A TLS
    connection gives no more than a record.
    """
    for pool in _pools(client):
        backend = getattr(pool, "_network_backend", None)
        if isinstance(backend, httpcore.AsyncNetworkBackend):
            pool._network_backend = _Backend(backend)


async def send(client: AsyncClient, request: Request) -> Response:
    """Send a request, follow no redirect, and give the answer with its body open.

    A server may close a connection that it kept just as a request is sent on it. A request that may
    be sent twice then is, as by Go's `net/http` (transport.go, `shouldRetryRequest`): on the next
    connection kept, or on a new one, where it is sent once.

    Cancelled, or failed, nothing is left of it in the client's pool. httpcore itself forgets a
    connection that it has begun to make, and counts it for ever as one that is in use: over TLS, if
    the cancellation comes in the handshake's last step; through a proxy, in any.

    Raises:
        HTTPError, UnicodeError: as httpx does; the latter for a host that cannot be one.
    """
    while True:
        way = ConnectionTrace()
        request.extensions["trace"] = way.trace
        try:
            with discreet():
                return await _send_once(client, request, way)
        except BaseException as error:
            lost = [*_take_lost(client)]
            with trio.move_on_after(CLOSE_GRACE, shield=True):
                for stream in way.unowned:
                    await stream.aclose()
                for connection in lost:
                    await connection.aclose()
            # Each round ends a connection that was kept.
            if not (way.kept and request.method in _SENT_TWICE and _closed_unanswered(error)):
                raise


async def close_connection(response: Response) -> None:
    """Close the connection of a response whose client has been closed.

    A pool that is closed while a connection is being made forgets that connection (httpcore).
    """
    stream = response.extensions.get("network_stream")
    if isinstance(stream, httpcore.AsyncNetworkStream):
        await stream.aclose()


async def _send_once(client: AsyncClient, request: Request, way: ConnectionTrace) -> Response:
    try:
        return await client.send(request, stream=True, follow_redirects=False, auth=None)
    except HTTPError:
        raise
    except Exception as error:
        # httpcore expects a SOCKS proxy's reply to be correct and to arrive in one piece. Any other
        # reply raises an exception that is not httpx's.
        if not way.greets_socks:
            raise
        text = "the SOCKS proxy did not answer as it should"
        raise ProxyError(text, request=request) from error


@final
class ConnectionTrace:
    """How a request has gone to its server, as httpcore tells it."""

    def __init__(self) -> None:
        # Connections that were made, until something of httpcore's closes them.
        self.unowned: list[httpcore.AsyncNetworkStream] = []
        # The request has begun to be sent, on a connection that was not made for it.
        self.kept = False
        # The SOCKS handshake with the proxy is under way.
        self.greets_socks = False
        self._connected = False

    async def trace(self, event: str, info: Mapping[str, object]) -> None:
        if event.endswith(".connect_tcp.complete"):
            stream = info["return_value"]
            assert isinstance(stream, httpcore.AsyncNetworkStream)
            self.unowned.append(stream)
            self._connected = True
        elif ".setup_socks5_connection." in event:
            self.greets_socks = not event.endswith(".complete")
        elif event.endswith(".connect_unix_socket.complete"):
            self._connected = True
        elif event.endswith(".send_request_headers.started"):
            # From now on the connection closes it.
            self.unowned.clear()
            self.kept = not self._connected


def _closed_unanswered(error: BaseException) -> bool:
    # httpx has no type of its own for an end where a status line should be.
    return isinstance(error, (ReadError, WriteError)) or (
        isinstance(error, RemoteProtocolError) and str(error).startswith("Server disconnected")
    )


def connection_failed(error: Exception) -> bool:
    """Return whether a request failed because of its connection.

    The connection was refused, reset or silent, or it ended before the response did. For any other
    error, the request or the response is at fault.
    """
    if isinstance(error, RemoteProtocolError):
        # httpx has no exception types for a response that is cut short.
        return str(error).startswith(("Server disconnected", "peer closed connection"))
    if isinstance(error, ProxyError):
        # An HTTP proxy's error begins with its status.
        status = str(error)[:3]
        return not status.isdecimal() or status in ("408", "429") or status >= "500"
    return isinstance(error, NetworkError | TimeoutException)


def never_connected(error: BaseException | None) -> bool:
    """Return whether a request failed before its connection was made."""
    return isinstance(error, ConnectError | ConnectTimeout)


def _take_lost(client: AsyncClient) -> Iterator[httpcore.AsyncConnectionInterface]:
    """Take from the client's pools what no request has and none can get; the caller closes it.

    Nothing is awaited here: a connection is a request's from when it is in the pool.
    """
    for pool in _pools(client):
        connections: object = getattr(pool, "_connections", None)
        requests: object = getattr(pool, "_requests", None)
        if not isinstance(connections, list) or not isinstance(requests, list):
            continue
        used = [getattr(request, "connection", None) for request in requests]
        for connection in list(connections):
            if not (connection in used or connection.is_idle() or connection.is_closed()):
                connections.remove(connection)
                yield connection


def _pools(client: AsyncClient) -> Iterator[httpcore.AsyncConnectionPool]:
    transports = [getattr(client, "_transport", None), *getattr(client, "_mounts", {}).values()]
    for transport in transports:
        pool = getattr(transport, "_pool", None)
        if isinstance(pool, httpcore.AsyncConnectionPool):
            yield pool


_discreet: Final = ContextVar("trio_layers_discreet", default=False)


@contextmanager
def discreet() -> Iterator[None]:
    """Send a request in the block, and httpx's log has no more of URLs than their hosts, and
    httpcore's no header fields: signatures may be in them, and cookies. Others' requests are
    logged as ever.
    """
    token = _discreet.set(True)
    try:
        yield
    finally:
        _discreet.reset(token)


@final
class _Discretion(logging.Filter):
    # Words of httpcore that fields follow, broken or not, or the login at a proxy.
    _SHOWN_ALONE: Final = (
        "receive_response_headers.",
        "receive_response_body.",
        "setup_socks5_connection.",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        if _discreet.get():
            if isinstance(record.args, tuple):
                record.args = tuple(map(_harmless, record.args))
            words = str(record.msg).partition(" ")[0]
            if words.startswith(self._SHOWN_ALONE):
                record.msg = words
        return True


def _harmless(value: object) -> object:
    if isinstance(value, URL):
        return f"{value.scheme}://{value.netloc.decode('ascii', 'replace')}"
    # A status line's words may have control characters in them.
    return printable_line(value) if isinstance(value, str) else value


# A filter of a logger counts for what is logged there, and not for the loggers below it.
for _name in ("httpx", "httpcore.http11", "httpcore.http2", "httpcore.socks"):
    logging.getLogger(_name).addFilter(_Discretion())


@final
class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self._backend = backend

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(
            await self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        )

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._backend.connect_unix_socket(path, timeout, socket_options))

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


@final
class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max(max_bytes, _AT_ONCE), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return await self._stream.start_tls(ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
